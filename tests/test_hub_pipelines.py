"""Pipelines push themselves to the Hub (a fake one on this machine): AutoPipelines load what has arrived."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.support.fake_hub import FakeHub, Fault
from tests.support.processes import PythonProcess


PRIOR = "kandinsky-community/kandinsky-2-1-prior"

PUSH = """
import sys
import kandinsky_diffusers
from diffusers import AutoPipelineForText2Image, DiffusionPipeline

loader, folder, repo_id = sys.argv[1:]
pipe = {"auto": AutoPipelineForText2Image, "plain": DiffusionPipeline}[loader].from_pretrained(folder)
result = [type(pipe).__name__, str(pipe.push_to_hub(repo_id))]
"""
LOAD = """
import sys
if "with us" in sys.argv:
    import kandinsky_diffusers
from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained(sys.argv[1])
result = [type(pipe).__name__, type(pipe).__module__.split(".")[0]]
"""


def card_of(hub: FakeHub, repo_id: str) -> ModelCard:
    return ModelCard.load(hub.repos[repo_id] / "README.md")


def test_a_decoder_has_a_card_that_names_its_prior(
    hub: FakeHub, from_hub: PythonProcess, stock: PythonProcess, converted_21: Path
) -> None:
    hub.repos[PRIOR] = converted_21 / "kandinsky-2-1-prior"

    name, url = from_hub.run(PUSH, "plain", converted_21 / "kandinsky-2-1", "someone/decoder")

    assert name == "KandinskyPipeline"
    assert url.startswith(f"{hub.url}/someone/decoder/commit/")
    assert len(hub.commits["someone/decoder"]) == 1
    assert card_of(hub, "someone/decoder").data["prior"] == [PRIOR]
    assert {"ddpm_scheduler/scheduler_config.json", "ancestral_scheduler/scheduler_config.json"} <= set(
        hub.files("someone/decoder")
    )
    assert from_hub.run(LOAD, "someone/decoder", "with us") == ["KandinskyCombinedPipeline", "kandinsky_diffusers"]
    assert stock.run(LOAD, "someone/decoder") == ["KandinskyCombinedPipeline", "diffusers"]


def test_a_combined_pipeline_is_pushed_with_its_prior(
    hub: FakeHub, from_hub: PythonProcess, stock: PythonProcess, converted_21: Path
) -> None:
    name, _ = from_hub.run(PUSH, "auto", converted_21 / "kandinsky-2-1", "combined")

    assert name == "KandinskyCombinedPipeline"
    assert "prior" not in card_of(hub, "someone/combined").data.to_dict()
    assert from_hub.run(LOAD, "someone/combined", "with us") == ["KandinskyCombinedPipeline", "kandinsky_diffusers"]
    assert stock.run(LOAD, "someone/combined") == ["KandinskyCombinedPipeline", "diffusers"]


@pytest.mark.parametrize("kind", ["3.0", "3.1"])
def test_a_pipeline_of_3_is_pushed(
    hub: FakeHub, from_hub: PythonProcess, stock: PythonProcess, converted_30: Path, converted_31: Path, kind: str
) -> None:
    folder = {"3.0": converted_30 / "kandinsky-3", "3.1": converted_31 / "kandinsky-3-1"}[kind]

    from_hub.run(PUSH, "auto", folder, f"someone/of-{kind}")

    assert card_of(hub, f"someone/of-{kind}").data.pipeline_tag == "text-to-image"
    assert from_hub.run(LOAD, f"someone/of-{kind}", "with us") == ["Kandinsky3Pipeline", "kandinsky_diffusers"]
    if kind == "3.0":
        assert stock.run(LOAD, f"someone/of-{kind}") == ["Kandinsky3Pipeline", "diffusers"]


SAVE = """
import sys
import kandinsky_diffusers

source, folder, repo_id, private = sys.argv[1:]
pipe = kandinsky_diffusers.KandinskyPriorPipeline.from_pretrained(source)
pipe.save_pretrained(folder, variant="x", push_to_hub=True, repo_id=repo_id, private=private == "private")
"""


def test_what_is_saved_is_pushed_and_a_card_that_is_there_stays(
    hub: FakeHub, from_hub: PythonProcess, converted_21: Path, tmp_path: Path
) -> None:
    hub.repos["ns/mine"] = tmp_path / "there"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "README.md").write_text("---\nlicense: mit\n---\n\n# My own words\n")

    from_hub.run(SAVE, converted_21 / "kandinsky-2-1-prior", tmp_path / "saved", "ns/mine", "")

    card = card_of(hub, "ns/mine")
    assert "# My own words" in card.text
    assert (card.data.license, card.data.library_name) == ("mit", "diffusers")
    saved = {file.relative_to(tmp_path / "saved").as_posix() for file in (tmp_path / "saved").rglob("*.*")}
    assert "prior/diffusion_pytorch_model.x.safetensors" in saved
    assert set(hub.files("ns/mine")) == {"README.md", *saved}


def test_nothing_is_saved_for_a_hub_that_refuses(
    hub: FakeHub, from_hub: PythonProcess, converted_21: Path, tmp_path: Path
) -> None:
    hub.repos["ns/mine"] = shutil.copytree(converted_21 / "kandinsky-2-1-prior", tmp_path / "there")
    with pytest.raises(AssertionError, match=r"HubError: ns/mine is there and public, but `private` is True"):
        from_hub.run(SAVE, converted_21 / "kandinsky-2-1-prior", tmp_path / "saved", "ns/mine", "private")
    hub.fault = Fault(1, 403)
    with pytest.raises(AssertionError, match=r"HubError: Making ns/other failed: the token may not write there"):
        from_hub.run(SAVE, converted_21 / "kandinsky-2-1-prior", tmp_path / "saved", "ns/other", "")
    assert not (tmp_path / "saved").exists()
