"""Repositories on the Hub (a fake one on this machine): what `from_pretrained` makes of an id instead of a folder.

Loading by id takes another path through diffusers than loading a folder: it decides from `model_index.json` and the
model card which files and which further repository to fetch, before any class is known.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.fake_hub import FakeHub
from tests.support.processes import PythonProcess


NAMESPACE = "kandinsky-community"


@pytest.fixture(autouse=True)
def repos(hub: FakeHub, converted_21: Path) -> None:
    hub.repos |= {f"{NAMESPACE}/{folder.name}": folder for folder in converted_21.iterdir() if folder.is_dir()}


DRAW_FROM_HUB = """
import sys
if "with us" in sys.argv:
    import kandinsky_diffusers
from diffusers import AutoPipelineForText2Image
pipe = AutoPipelineForText2Image.from_pretrained("kandinsky-community/kandinsky-2-1")
pipe.set_progress_bar_config(disable=True)
image = pipe("red cat", num_inference_steps=2, prior_num_inference_steps=2, height=64, width=64).images[0]
result = {"class": type(pipe).__name__, "module": type(pipe).__module__, "size": image.size}
"""


def test_text_to_image_by_id_fetches_the_prior_that_the_card_names(hub: FakeHub, from_hub: PythonProcess) -> None:
    drawn = from_hub.run(DRAW_FROM_HUB, "with us")

    assert drawn["class"] == "KandinskyCombinedPipeline"
    assert drawn["module"].startswith("kandinsky_diffusers.")
    assert drawn["size"] == [64, 64]
    assert any(f"{NAMESPACE}/kandinsky-2-1-prior/resolve" in request for request in hub.requests)


def test_stock_diffusers_draws_from_the_same_repositories(stock: PythonProcess) -> None:
    drawn = stock.run(DRAW_FROM_HUB)

    assert drawn["class"] == "KandinskyCombinedPipeline"
    assert drawn["module"].startswith("diffusers.")
    assert drawn["size"] == [64, 64]


LOAD_COMPONENT = """
import sys
import kandinsky_diffusers
from diffusers import DiffusionPipeline

def describe(name):
    scheduler = DiffusionPipeline.from_pretrained(name).scheduler
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return {"class": type(scheduler).__name__, "module": type(scheduler).__module__, "config": config}

result = [describe(name) for name in sys.argv[1:]]
"""


def test_component_of_this_package_loads_by_id_and_from_a_folder(
    hub: FakeHub, from_hub: PythonProcess, converted_21: Path, tmp_path: Path
) -> None:
    repo = shutil.copytree(converted_21 / "kandinsky-2-1", tmp_path / "ancestral")
    shutil.rmtree(repo / "scheduler")
    (repo / "ancestral_scheduler").rename(repo / "scheduler")
    index = json.loads((repo / "model_index.json").read_text())
    index["scheduler"] = ["kandinsky_diffusers", "KandinskyAncestralScheduler"]
    (repo / "model_index.json").write_text(json.dumps(index))
    hub.repos["someone/ancestral"] = repo

    by_id, by_folder = from_hub.run(LOAD_COMPONENT, "someone/ancestral", repo)

    assert by_id == by_folder
    assert by_id["class"] == "KandinskyAncestralScheduler"
    assert by_id["module"].startswith("kandinsky_diffusers.")
