"""Repositories with `pipeline.py`: our pipeline without an import of ours, and everything else as before."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from kandinsky_diffusers.conversion import convert
from kandinsky_diffusers.conversion.releases import releases
from kandinsky_diffusers.conversion.stub import write_stubs
from tests.conftest import Built
from tests.support.fake_hub import FakeHub
from tests.support.goldens import GoldenFamily
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
    release_21: Path, goldens_21: GoldenFamily, release_31: Path, goldens_31: GoldenFamily, built: Built
) -> dict[str, Path]:
    """Converted repositories with the stub, by name. Read only."""

    def convert_both(folder: Path) -> None:
        text_to_image = shutil.ignore_patterns("kandinsky3_*.pt", "projection_*.pt")
        shutil.copytree(release_31, folder / "release", ignore=text_to_image, copy_function=os.link)
        for source, goldens in ((release_21, goldens_21), (folder / "release", goldens_31)):
            config, clip = goldens.path / "hyperparameters.json", release_21 / "clip"
            convert(source, folder, original_config=config, clip=clip, trust_remote_code_stub=True)

    folder = built("repos-with-stub", convert_both)
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
    for name in ("kandinsky-2-1", "kandinsky-2-1-prior"):
        index = json.loads((repos[name] / "model_index.json").read_text())
        assert index == json.loads((converted_21 / name / "model_index.json").read_text())
        assert isinstance(index["_class_name"], str)


def test_the_card_says_it_where_there_is_a_stub(repos: dict[str, Path], converted_21: Path) -> None:
    call = "custom_pipeline=repo"
    for name, place in repos.items():
        assert call in (place / "README.md").read_text()
        assert (place / "pipeline.py").is_file()
        assert json.loads((place / "conversion.json").read_text())["options"]["stub"]
        assert ("**prior(prompt)" in (place / "README.md").read_text()) == (name == "kandinsky-2-1")
    assert call not in (converted_21 / "kandinsky-2-1" / "README.md").read_text()
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
