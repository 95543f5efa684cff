"""Kandinsky for diffusers: `import kandinsky_diffusers`, and the AutoPipelines use our pipelines.

Importing registers; `unregister()` gives diffusers back as it was.
"""

from __future__ import annotations

from .k21 import (
    KandinskyCombinedPipeline,
    KandinskyImg2ImgCombinedPipeline,
    KandinskyImg2ImgPipeline,
    KandinskyInpaintCombinedPipeline,
    KandinskyInpaintPipeline,
    KandinskyPipeline,
    KandinskyPriorPipeline,
)
from .movq import MoVQ
from .prior import CachedPriorTransformer
from .registry import UnsupportedDiffusersError, register, register_pipeline, unregister
from .schedulers import (
    KandinskyAncestralScheduler,
    KandinskyDDIMScheduler,
    KandinskyPNDMScheduler,
    KandinskyUnCLIPScheduler,
)


__version__ = "0.1.0"

__all__ = [
    "CachedPriorTransformer",
    "KandinskyAncestralScheduler",
    "KandinskyCombinedPipeline",
    "KandinskyDDIMScheduler",
    "KandinskyImg2ImgCombinedPipeline",
    "KandinskyImg2ImgPipeline",
    "KandinskyInpaintCombinedPipeline",
    "KandinskyInpaintPipeline",
    "KandinskyPNDMScheduler",
    "KandinskyPipeline",
    "KandinskyPriorPipeline",
    "KandinskyUnCLIPScheduler",
    "MoVQ",
    "UnsupportedDiffusersError",
    "register",
    "register_pipeline",
    "unregister",
]

register()
