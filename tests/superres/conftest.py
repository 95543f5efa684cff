"""Narrow KandiSuperRes pipelines that are built on the spot."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DPMSolverMultistepScheduler

from kandinsky_diffusers import Kandinsky3FlashScheduler, KandiSuperResPipeline, KandiSuperResUNet


KINDS = ["x4", "x2", "flash"]
SETTINGS: dict[str, dict[str, Any]] = {
    "x4": {"scale": 4},
    "x2": {"scale": 2},
    "flash": {"scale": 2, "size_multiple": 32, "shrinks_input": True},
}
SMALL_WINDOWS: Any = {"window_size": 64, "window_stride": 48, "view_batch_size": 4}
NARROW: dict[str, Any] = {
    "init_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1),
    "time_embedding_dim": 8,
    "groups": 4,
}


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return KandiSuperResUNet(**NARROW).state_dict()


def narrow_pipeline(kind: str) -> Any:
    """A quiet pipeline of one of `KINDS`, with the settings of its repo but small windows."""
    unet: Any = KandiSuperResUNet(**NARROW)
    unet.load_state_dict(weights())
    scheduler: Any = DPMSolverMultistepScheduler(beta_schedule="linear", prediction_type="sample")
    if kind == "flash":
        scheduler = Kandinsky3FlashScheduler(beta_schedule="linear", prediction_type="sample")
    pipe: Any = KandiSuperResPipeline(unet.eval(), scheduler, **SETTINGS[kind], **SMALL_WINDOWS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
