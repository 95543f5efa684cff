"""Tiny 2.2 pipelines of any class, on components that are made once; stock pipelines get copies of their own."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.pipelines import kandinsky2_2

from tests.support import tiny22


SIZE = {"height": 64, "width": 64}
QUICK = {**SIZE, "num_inference_steps": 2}

PRIORS = ["KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"]
DECODERS = [
    "KandinskyV22Pipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22InpaintPipeline",
    "KandinskyV22ControlnetPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
]
STOCK_COMBINED = [
    "KandinskyV22CombinedPipeline",
    "KandinskyV22Img2ImgCombinedPipeline",
    "KandinskyV22InpaintCombinedPipeline",
]
COMBINED = [
    *STOCK_COMBINED,
    "KandinskyV22ControlnetCombinedPipeline",
    "KandinskyV22ControlnetImg2ImgCombinedPipeline",
]
REPOS = {
    "kandinsky-2-2-prior": "KandinskyV22PriorPipeline",
    "kandinsky-2-2-decoder": "KandinskyV22Pipeline",
    "kandinsky-2-2-decoder-inpaint": "KandinskyV22InpaintPipeline",
    "kandinsky-2-2-controlnet-depth": "KandinskyV22ControlnetPipeline",
}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def is_stock(cls: type) -> bool:
    return cls.__module__.startswith("diffusers.")


def components_for(name: str, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Those of a pipeline class, told by its name; those of the prior have a prefix in combined classes."""
    if "Prior" in name:
        return made["prior"]
    kind = next((kind for kind in ("inpaint", "controlnet") if kind in name.lower()), "decoder")
    prior = {f"prior_{name}": component for name, component in made["prior"].items()} if "Combined" in name else {}
    return {**made[kind], **prior}


@pytest.fixture(scope="session")
def components() -> Callable[..., dict[str, dict[str, Any]]]:
    """Components by the kind of repo: `components("ours")`, `("stock")` or `("float64")`, all with the same weights.

    They are copies, because our pipelines change how the attention of their models is computed.
    """
    tasks = {"decoder": "text2image", "inpaint": "inpaint", "controlnet": "controlnet"}
    originals = {kind: tiny22.decoder_components(task) for kind, task in tasks.items()}
    originals["prior"] = tiny22.prior_components()

    @cache
    def copied(owner: str) -> dict[str, dict[str, Any]]:
        made = deepcopy(originals)
        if owner == "float64":
            for kind in made.values():
                for component in kind.values():
                    if isinstance(component, torch.nn.Module):
                        component.double()
        return made

    return copied


@pytest.fixture
def make(components: Callable[..., dict[str, dict[str, Any]]]) -> Callable[..., Any]:
    """Build a quiet pipeline with a scheduler of its own: `make(KandinskyV22Pipeline, movq=another)`."""

    def build(cls: type, *, dtype: torch.dtype = torch.float32, **replaced: Any) -> Any:
        owner = "stock" if is_stock(cls) else "float64" if dtype == torch.float64 else "ours"
        own = {**components_for(cls.__name__, components(owner)), **replaced}
        own = {name: deepcopy(part) if name.endswith("scheduler") else part for name, part in own.items()}
        pipe = cls(**own)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


@pytest.fixture(scope="session")
def embeds(components: Callable[..., dict[str, dict[str, Any]]]) -> Callable[..., dict[str, torch.Tensor]]:
    """Random image embeddings for a decoder: `embeds(rows)`."""
    width = components("ours")["prior"]["prior"].config.embedding_dim

    def draw(rows: int = 1) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(rows)
        return {name: torch.randn(rows, width, generator=rng) for name in ("image_embeds", "negative_image_embeds")}

    return draw


@pytest.fixture(scope="session")
def picture() -> PIL.Image.Image:
    rng = np.random.default_rng(0)
    return PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def mask() -> PIL.Image.Image:
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 40))
    return mask


@pytest.fixture(scope="session")
def hint() -> torch.Tensor:
    """A depth map `[1, 3, 64, 64]` in [0, 1], near in the middle, in whole steps of 1 / 255."""
    distance = torch.linspace(-1, 1, 64)[:, None] ** 2 + torch.linspace(-1, 1, 64)[None] ** 2
    return ((255 * (1 - distance / 2)).round() / 255).expand(1, 3, 64, 64).clone()


@pytest.fixture
def inputs(embeds: Any, picture: Any, mask: Any, hint: Any) -> Callable[..., dict[str, Any]]:
    """Keyword arguments with which a class of this name draws quickly: `inputs("KandinskyV22Pipeline", **changed)`."""

    def arguments(name: str, **changed: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"num_inference_steps": 2}
        if "Prior" in name or "Combined" in name:
            given |= {"prompt": "a cat"}
        if "Prior" not in name:
            given |= {**SIZE, "output_type": "np"}
            given |= {"prior_num_inference_steps": 2} if "Combined" in name else embeds()
        if "Img2Img" in name or "Emb2Emb" in name:
            given |= {"image": picture, "strength": 0.5, "num_inference_steps": 4}
        if "Inpaint" in name:
            given |= {"image": picture, "mask_image": mask}
        if "Controlnet" in name:
            given |= {"hint": hint}
        return given | changed

    return arguments


@pytest.fixture(scope="session")
def repos_22(components: Callable[..., dict[str, dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four published repositories, as stock saves them (without cards). Read only."""
    folder = tmp_path_factory.mktemp("repos-2-2")
    for repo, name in REPOS.items():
        cls = getattr(kandinsky2_2, name)
        cls(**components_for(name, components("stock"))).save_pretrained(folder / repo)
    return folder
