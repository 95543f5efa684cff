"""Kandinsky for diffusers: `import kandinsky_diffusers`, and the AutoPipelines use our pipelines.

Importing registers; `unregister()` gives diffusers back as it was.
"""

from __future__ import annotations

# first: with another diffusers the rest may fail to import, for reasons that do not name the cause
from .compatibility import UnsupportedDiffusersError


# isort: split
from . import k3, k20, k21, k22, superres
from .beautify import PromptBeautifier
from .k3 import *  # noqa: F403
from .k20 import *  # noqa: F403
from .k21 import *  # noqa: F403 (each family lists its public names)
from .k22 import *  # noqa: F403
from .movq import MoVQ
from .prior import CachedPriorTransformer
from .registry import register, register_pipeline, unregister
from .schedulers import (
    Kandinsky3AncestralScheduler,
    Kandinsky3DDPMScheduler,
    Kandinsky3FlashScheduler,
    KandinskyAncestralScheduler,
    KandinskyDDIMScheduler,
    KandinskyPNDMScheduler,
    KandinskyUnCLIPScheduler,
)
from .superres import *  # noqa: F403


__version__ = "0.1.0"

__all__ = [
    "CachedPriorTransformer",
    "Kandinsky3AncestralScheduler",
    "Kandinsky3DDPMScheduler",
    "Kandinsky3FlashScheduler",
    "KandinskyAncestralScheduler",
    "KandinskyDDIMScheduler",
    "KandinskyPNDMScheduler",
    "KandinskyUnCLIPScheduler",
    "MoVQ",
    "PromptBeautifier",
    "UnsupportedDiffusersError",
    "register",
    "register_pipeline",
    "unregister",
]
__all__ += k3.__all__
__all__ += k20.__all__
__all__ += k21.__all__
__all__ += k22.__all__
__all__ += superres.__all__

register()
