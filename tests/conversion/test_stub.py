"""Repositories with `pipeline.py`: our pipeline without an import of ours, and everything else as before."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kandinsky_diffusers.conversion import convert
from kandinsky_diffusers.conversion.releases import releases
from kandinsky_diffusers.conversion.stub import write_stubs
from tests.support.fake_hub import FakeHub
from tests.support.processes import PythonProcess


WITHOUT_US = """
import sys
from diffusers import DiffusionPipeline
repo = sys.argv[1]
stock = DiffusionPipeline.from_pretrained(repo)
result = [f"{type(part).__module__.split('.')[0]}.{type(part).__name__}" for part in (stock, stock.prior)]
sys.modules["kandinsky_diffusers"] = None  # as if it were not installed
try:
    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
except ImportError as error:
    result.append(str(error))
finally:
    del sys.modules["kandinsky_diffusers"]
"""

LOAD = """
import sys
assert "kandinsky_diffusers" not in sys.modules
from diffusers import DiffusionPipeline
pipes, classes = [], []
for repo in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
    pipes.append(pipe)
    classes.append([f"{type(part).__module__.split('.')[0]}.{type(part).__name__}" for part in (pipe, pipe.scheduler)])
prior, decoder = pipes[1:3]
embeds = prior("red cat", num_inference_steps=1)
image = decoder("red cat", **embeds, num_inference_steps=1, height=64, width=96).images[0]
result = {"classes": classes, "size": image.size}
"""

OURS = {
    "kandinsky-3-1": ["kandinsky_diffusers.Kandinsky3Pipeline", "kandinsky_diffusers.Kandinsky3AncestralScheduler"],
    "kandinsky-2-1-prior": [
        "kandinsky_diffusers.KandinskyPriorPipeline",
        "kandinsky_diffusers.KandinskyUnCLIPScheduler",
    ],
    "kandinsky-2-1": ["kandinsky_diffusers.KandinskyPipeline", "diffusers.DDIMScheduler"],
}


@pytest.fixture(scope="module")
def repos(
    prior_release: Path, config_21: Path, converted_21: Path, converted_31: Path, tmp_path_factory: Any
) -> dict[str, Path]:
    """Repositories with the stub, by name; the prior's is as it was converted, the others got it later. Read only."""
    folder = tmp_path_factory.mktemp("stubs")
    clip = prior_release / "clip"
    convert(prior_release, folder, original_config=config_21, clip=clip, trust_remote_code_stub=True)
    for place in (converted_21 / "kandinsky-2-1", converted_31 / "kandinsky-3-1"):
        repo = shutil.copytree(place, folder / place.name, copy_function=os.link)
        index = json.loads((repo / "model_index.json").read_text())
        components = {name: entry for name, entry in index.items() if isinstance(entry, list)}
        write_stubs(repo, repo.name, index["_class_name"], components)
    return {name: folder / name for name in OURS}


def test_where_we_are_not_installed_stock_loads_as_before_and_the_stub_says_what_to_install(
    repos: dict[str, Path], stock: PythonProcess
) -> None:
    *classes, message = stock.run(WITHOUT_US, repos["kandinsky-2-1-prior"])

    assert classes == ["diffusers.KandinskyPriorPipeline", "diffusers.PriorTransformer"]
    assert "kandinsky-2-1-prior" in message
    assert "pip install kandinsky-diffusers" in message


def test_without_an_import_of_ours_our_pipelines_load_from_folders_and_by_id(
    repos: dict[str, Path], hub: FakeHub, stock: PythonProcess
) -> None:
    hub.repos |= {f"someone/{name}-with-stub": place for name, place in repos.items()}

    loaded = stock.run_in_child(LOAD, *hub.repos, *repos.values())

    assert loaded == {"classes": list(OURS.values()) * 2, "size": [96, 64]}


AUTO = """
import sys
import kandinsky_diffusers
from diffusers import AutoPipelineForText2Image
result = [type(AutoPipelineForText2Image.from_pretrained(repo).scheduler).__name__ for repo in sys.argv[1:]]
"""


def test_with_an_import_of_ours_auto_pipeline_needs_no_trust(
    repos: dict[str, Path], hub: FakeHub, from_hub: PythonProcess
) -> None:
    hub.repos["someone/kandinsky-3-1-with-stub"] = repos["kandinsky-3-1"]

    loaded = from_hub.run(AUTO, repos["kandinsky-3-1"], "someone/kandinsky-3-1-with-stub")

    assert loaded == ["Kandinsky3AncestralScheduler"] * 2


def test_the_index_goes_on_naming_the_class_as_a_string(repos: dict[str, Path], converted_21: Path) -> None:
    name = "kandinsky-2-1-prior"
    index = json.loads((repos[name] / "model_index.json").read_text())
    assert index == json.loads((converted_21 / name / "model_index.json").read_text())
    assert index["_class_name"] == "KandinskyPriorPipeline"


def test_card_and_record_say_it_where_there_is_a_stub(repos: dict[str, Path], converted_21: Path) -> None:
    call, name = "custom_pipeline=repo", "kandinsky-2-1-prior"
    assert call in (repos[name] / "README.md").read_text()
    assert json.loads((repos[name] / "conversion.json").read_text())["options"]["stub"]
    assert call not in (converted_21 / name / "README.md").read_text()
    assert not list(converted_21.rglob("*.py"))


def test_stubs_of_the_classes_of_a_release_differ_in_size(tmp_path: Path) -> None:
    """Python takes the compiled file of one, copied to the same place in the same second, for that of the other."""
    for release in releases():
        pipelines = {repo.name: repo.pipeline for repo in release.repos if repo.pipeline}
        sizes: dict[int, str] = {}
        for name, pipeline in pipelines.items():
            write_stubs(tmp_path, name, pipeline, {})
            size = (tmp_path / "pipeline.py").stat().st_size
            assert sizes.setdefault(size, pipeline) == pipeline
