"""Tiny 3.x pipelines of any class, on components that are loaded once from the converted repos."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, VQModel
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3UNet as StockKandinsky3UNet

import kandinsky_diffusers
from kandinsky_diffusers.components import adopt
from kandinsky_diffusers.pipeline_base import KandinskyPipelineMixin


SIZE = {"height": 64, "width": 64}
QUICK = {**SIZE, "num_inference_steps": 2, "output_type": "np"}
REPOS = {
    "3.0": "kandinsky-3",
    "3.0 inpaint": "kandinsky-3-inpaint",
    "3.1": "kandinsky-3-1",
    "flash": "kandinsky-3-1-flash",
    "3.1 inpaint": "kandinsky-3-1-inpaint",
}
Refused = Callable[..., None]
TASKS = ["Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline", "Kandinsky3InpaintPipeline"]


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="session")
def repo(converted_30: Path, converted_31: Path) -> Callable[[str], Path]:
    """The converted folder of a short name."""
    return lambda kind: (converted_30 if kind.startswith("3.0") else converted_31) / REPOS[kind]


@pytest.fixture(scope="session")
def components(repo: Any) -> Callable[[str], dict[str, Any]]:
    """Components of a converted repo by its short name; "stock" is 3.1 without null embedding, on stock's classes.

    "adopted" are copies of these on ours.
    """
    loaded: dict[str, dict[str, Any]] = {}

    def load(kind: str) -> dict[str, Any]:
        if kind not in loaded:
            loaded[kind] = {"stock": stock, "adopted": adopted}.get(kind, lambda: converted(kind))()
        return loaded[kind]

    def converted(kind: str) -> dict[str, Any]:
        return DiffusionPipeline.from_pretrained(repo(kind)).components

    def adopted() -> dict[str, Any]:
        parts = load("stock")
        return {**parts, **{name: adopt(deepcopy(parts[name])) for name in ("unet", "movq")}}

    def stock() -> dict[str, Any]:
        ours = load("3.1")
        unet = StockKandinsky3UNet(**{name: ours["unet"].config[name] for name in STOCK_CONFIG})
        weights = {key: tensor for key, tensor in ours["unet"].state_dict().items() if key != "null_embedding"}
        unet.load_state_dict(weights)
        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
        movq = VQModel.from_pretrained(repo("3.1"), subfolder="movq")
        return {**ours, "unet": unet.eval(), "movq": movq, "scheduler": scheduler}

    return load


def copies(parts: dict[str, Any]) -> dict[str, Any]:
    """Of the models that a test changes, for `make(..., **copies(components("stock")))`."""
    return {name: deepcopy(parts[name]) for name in ("unet", "movq")}


STOCK_CONFIG = (
    "in_channels",
    "time_embedding_dim",
    "groups",
    "attention_head_dim",
    "layers_per_block",
    "block_out_channels",
    "cross_attention_dim",
    "encoder_hid_dim",
)


@pytest.fixture
def make(components: Any) -> Callable[..., Any]:
    """Build a quiet pipeline: `make(Kandinsky3Pipeline, "3.1")`. Our classes never touch the models of "stock"."""

    def build(cls: type, kind: str, **replaced: Any) -> Any:
        is_ours = issubclass(cls, KandinskyPipelineMixin)
        parts = {**components("adopted" if kind == "stock" and is_ours else kind), **replaced}
        parts["scheduler"] = deepcopy(parts["scheduler"])
        pipe = cls(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


@pytest.fixture(scope="session")
def picture() -> PIL.Image.Image:
    rng = np.random.default_rng(0)
    return PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def mask() -> PIL.Image.Image:
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 40))
    return mask


@pytest.fixture
def inputs(picture: Any, mask: Any) -> Callable[..., dict[str, Any]]:
    """Keyword arguments with which a class of this name draws quickly."""

    def arguments(name: str, **changed: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"prompt": "a red fox", **QUICK}
        if "Img2Img" in name:
            given |= {"image": picture, "strength": 0.5, "num_inference_steps": 4}
        if "Inpaint" in name:
            given |= {"image": picture, "mask_image": mask}
        return given | changed

    return arguments


def float64(pipe: Any) -> Any:
    """The pipeline on copies of its models in float64, where batches and single pictures can be told from rounding."""
    parts = {n: _double(c) if isinstance(c, torch.nn.Module) else c for n, c in pipe.components.items()}
    copy = type(pipe)(**parts)
    copy.set_progress_bar_config(disable=True)
    return copy


@functools.cache
def _double(model: torch.nn.Module) -> torch.nn.Module:
    return deepcopy(model).double()


@pytest.fixture
def refused(make: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """`refused(class name, changed arguments, name in the message)`."""

    def check(name: str, changed: dict[str, Any], named: str, kind: str = "3.1", **replaced: Any) -> None:
        pipe = make(getattr(kandinsky_diffusers, name), kind, **replaced)
        for model in ("unet", "movq", "text_encoder"):
            for method in ("forward", "encode", "decode"):
                if hasattr(getattr(pipe, model, None), method):
                    monkeypatch.setattr(getattr(pipe, model), method, lambda *_, **__: pytest.fail("a model ran"))
        with pytest.raises((ValueError, TypeError), match=named):
            pipe(**inputs(name, **changed))

    return check
