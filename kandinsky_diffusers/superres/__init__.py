"""KandiSuperRes x4, x2 and Flash x2: pictures enlarged by diffusion on their pixels, without a text.

Against the other families there are no latents: the UNet sees the noisy picture beside the small one and predicts the
clean picture. Large pictures are drawn in windows that overlap. Flash takes four steps, and then can have the picture
refined by Kandinsky 3.1 Flash. The three releases differ in weights, scheduler and settings. Stock has none of it.
"""

from __future__ import annotations

from .context import KandiSuperResContext
from .pipeline import KandiSuperResPipeline
from .unet import KandiSuperResUNet


__all__ = [
    "KandiSuperResContext",
    "KandiSuperResPipeline",
    "KandiSuperResUNet",
]
