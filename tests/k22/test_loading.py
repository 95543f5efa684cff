"""How the 2.2 repositories are loaded: by the AutoPipelines, with the prior from wherever it may come."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

import kandinsky_diffusers
from tests.k22.conftest import REPOS, seeded
from tests.support.fake_hub import FakeHub
from tests.support.parity import assert_same_picture
from tests.support.processes import PythonProcess


Make = Callable[..., Any]
TASKS = [
    (AutoPipelineForText2Image, "kandinsky-2-2-decoder", "KandinskyV22CombinedPipeline"),
    (AutoPipelineForImage2Image, "kandinsky-2-2-decoder", "KandinskyV22Img2ImgCombinedPipeline"),
    (AutoPipelineForInpainting, "kandinsky-2-2-decoder-inpaint", "KandinskyV22InpaintCombinedPipeline"),
    (AutoPipelineForText2Image, "kandinsky-2-2-controlnet-depth", "KandinskyV22ControlnetCombinedPipeline"),
    (AutoPipelineForImage2Image, "kandinsky-2-2-controlnet-depth", "KandinskyV22ControlnetImg2ImgCombinedPipeline"),
]


@pytest.fixture
def lonely(repos_22: Path, tmp_path: Path) -> Path:
    """A decoder's folder without a prior beside it."""
    return shutil.copytree(repos_22 / "kandinsky-2-2-decoder", tmp_path / "lonely")


@pytest.mark.parametrize(("auto", "repo", "name"), TASKS)
def test_auto_pipelines_load_our_combined_pipelines(
    repos_22: Path, inputs: Any, auto: Any, repo: str, name: str
) -> None:
    """From a decoder's folder, with the prior in the folder beside it."""
    pipe = auto.from_pretrained(repos_22 / repo)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is getattr(kandinsky_diffusers, name)
    assert np.isfinite(pipe(**inputs(name)).images).all()


@pytest.mark.parametrize(("repo", "name"), REPOS.items())
def test_diffusion_pipeline_loads_our_classes(repos_22: Path, repo: str, name: str) -> None:
    assert type(diffusers.DiffusionPipeline.from_pretrained(repos_22 / repo)) is getattr(kandinsky_diffusers, name)


def test_a_prior_can_be_given(repos_22: Path, lonely: Path, make: Make) -> None:
    prior = make(kandinsky_diffusers.KandinskyV22PriorPipeline)
    assert AutoPipelineForText2Image.from_pretrained(lonely, prior=prior).prior_prior is prior.prior
    components = {f"prior_{name}": component for name, component in prior.components.items()}
    assert AutoPipelineForText2Image.from_pretrained(lonely, **components).prior_prior is prior.prior
    by_folder = AutoPipelineForText2Image.from_pretrained(lonely, prior=repos_22 / "kandinsky-2-2-prior")
    assert by_folder.prior_prior.config.embedding_dim == prior.prior.config.embedding_dim


def test_the_card_may_name_a_folder(repos_22: Path, lonely: Path) -> None:
    (lonely / "README.md").write_text(f"---\nprior:\n- {repos_22 / 'kandinsky-2-2-prior'}\n---\n")
    assert AutoPipelineForImage2Image.from_pretrained(lonely).prior_prior is not None


def test_the_error_without_a_prior_says_how_to_give_one(lonely: Path) -> None:
    with pytest.raises(ValueError, match=r"`prior=`.*`prior_.*lonely-prior.*README\.md"):
        AutoPipelineForText2Image.from_pretrained(lonely)


@pytest.mark.parametrize("name", ["KandinskyV22InpaintCombinedPipeline", "KandinskyV22ControlnetCombinedPipeline"])
def test_a_folder_with_both_loads_for_every_task(make: Make, inputs: Any, tmp_path: Path, name: str) -> None:
    pipe = make(getattr(kandinsky_diffusers, name))
    pipe.save_pretrained(tmp_path)
    tasks = [(auto, loaded) for auto, _, loaded in TASKS if ("Controlnet" in loaded) == ("Controlnet" in name)]
    drawn = {}
    for auto, loaded in tasks:
        again = auto.from_pretrained(tmp_path)
        assert type(again) is getattr(kandinsky_diffusers, loaded)
        again.set_progress_bar_config(disable=True)
        drawn[loaded] = again
    images = [each(**inputs(name), generator=seeded(0)).images for each in (pipe, drawn[name])]
    assert_same_picture((images[1] * 255).round(), (images[0] * 255).round())


WITHOUT_US = """
import sys
from pathlib import Path
import diffusers, torch
for folder in sys.argv[1:]:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__module__.startswith("diffusers."), type(pipe)
    assert all(not type(part).__module__.startswith("kandinsky_diffusers") for part in pipe.components.values())
combined = diffusers.AutoPipelineForText2Image.from_pretrained(sys.argv[-1])
combined.set_progress_bar_config(disable=True)
combined("a cat", num_inference_steps=2, prior_num_inference_steps=2, height=64, width=64)
"""


def test_what_is_saved_loads_and_draws_without_this_package(
    repos_22: Path, make: Make, tmp_path: Path, stock: PythonProcess
) -> None:
    folders = [tmp_path / repo for repo in REPOS] + [tmp_path / "combined"]
    for folder in folders[:-1]:
        diffusers.DiffusionPipeline.from_pretrained(repos_22 / folder.name).save_pretrained(folder)
    make(kandinsky_diffusers.KandinskyV22CombinedPipeline).save_pretrained(folders[-1])
    stock.run(WITHOUT_US, *folders)


FROM_HUB = """
import kandinsky_diffusers
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
classes = []
for auto, repo in ((AutoPipelineForImage2Image, "decoder"), (AutoPipelineForText2Image, "controlnet-depth")):
    pipe = auto.from_pretrained(f"kandinsky-community/kandinsky-2-2-{repo}")
    classes.append([type(pipe).__module__.split(".")[0], type(pipe).__name__, pipe.prior_prior is not None])
result = classes
"""


def test_repositories_on_the_hub_fetch_the_prior_that_their_card_names(
    repos_22: Path, hub: FakeHub, from_hub: PythonProcess, tmp_path: Path
) -> None:
    prior = "kandinsky-community/kandinsky-2-2-prior"
    repos = {prior: repos_22 / "kandinsky-2-2-prior"}
    for short in ("decoder", "controlnet-depth"):
        folder = shutil.copytree(repos_22 / f"kandinsky-2-2-{short}", tmp_path / short)
        (folder / "README.md").write_text(f"---\nprior:\n- {prior}\ntags:\n- kandinsky\n---\n")
        repos[f"kandinsky-community/kandinsky-2-2-{short}"] = folder
    hub.repos |= repos
    assert from_hub.run(FROM_HUB) == [
        ["kandinsky_diffusers", "KandinskyV22Img2ImgCombinedPipeline", True],
        ["kandinsky_diffusers", "KandinskyV22ControlnetCombinedPipeline", True],
    ]
    assert any(f"{prior}/resolve" in request for request in hub.requests)
