"""Schedulers that the original code needs and diffusers lacks.

Beside the usual entries, the configuration of any scheduler may carry settings that bring back an original's behaviour
where it is a plain bug and not the default here:

- `threshold_reference="first"`: the dynamic threshold of a whole batch comes from its first sample;
- `noise_beta_start`, `noise_beta_end`: the linear betas with which an input image is noised, if not the model's own;
- `start_timestep="original"`: image-to-image starts where the original starts, see [`start_at`];
- `grow_mask=False`: inpainting repaints the mask as it is (the originals grow it by a latent pixel, and so do we).
"""

from __future__ import annotations

from .ancestral import KandinskyAncestralScheduler, KandinskyUnCLIPScheduler
from .flash import Kandinsky3FlashScheduler
from .image_start import looks_up_on_host, noise_to, start_at
from .kandinsky3 import Kandinsky3AncestralScheduler, Kandinsky3DDPMScheduler
from .strided import KandinskyDDIMScheduler, KandinskyPNDMScheduler
from .tables import respaced_timesteps, strided_timesteps


__all__ = [
    "Kandinsky3AncestralScheduler",
    "Kandinsky3DDPMScheduler",
    "Kandinsky3FlashScheduler",
    "KandinskyAncestralScheduler",
    "KandinskyDDIMScheduler",
    "KandinskyPNDMScheduler",
    "KandinskyUnCLIPScheduler",
    "looks_up_on_host",
    "noise_to",
    "respaced_timesteps",
    "start_at",
    "strided_timesteps",
]
