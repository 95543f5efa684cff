"""Tiny 2.1 pipelines of any class, built on components that are loaded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.pipelines import kandinsky

from tests.support.shallow import shallow


SIZE = {"height": 64, "width": 64}
QUICK = {**SIZE, "num_inference_steps": 2}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="session")
def components(converted_21: Path) -> dict[str, dict[str, Any]]:
    """Stock components of the three repos by name, with shallow UNets; decoders with their prior as "combined"."""
    loaded = {
        short: dict(cls.from_pretrained(converted_21 / repo).components)
        for short, cls, repo in (
            ("prior", kandinsky.KandinskyPriorPipeline, "kandinsky-2-1-prior"),
            ("decoder", kandinsky.KandinskyPipeline, "kandinsky-2-1"),
            ("inpaint", kandinsky.KandinskyInpaintPipeline, "kandinsky-2-1-inpaint"),
        )
    }
    for short in ("decoder", "inpaint"):
        loaded[short]["unet"] = shallow(loaded[short]["unet"])
    prior = {f"prior_{name}": component for name, component in loaded["prior"].items()}
    loaded["combined"] = {**loaded["decoder"], **prior}
    loaded["inpaint combined"] = {**loaded["inpaint"], **prior}
    return loaded


@pytest.fixture
def make(components: dict[str, dict[str, Any]]) -> Callable[..., Any]:
    """Build a quiet pipeline of a class on shared tiny components: `make(KandinskyPipeline, "decoder")`."""

    def build(cls: type, kind: str, **replaced: Any) -> Any:
        pipe = cls(**{**components[kind], **replaced})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


@pytest.fixture(scope="session")
def embeds(components: dict[str, dict[str, Any]]) -> Callable[..., dict[str, torch.Tensor]]:
    """Random image embeddings for a decoder: `embeds(rows)`."""
    width = components["prior"]["prior"].config.embedding_dim

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
