"""Kandinsky 2.0: one UNet that reads the states of two multilingual text encoders, without a prior.

Against 2.1 there is a second text encoder (mT5) in the place of the image embedding, a VAE in the place of MoVQ, and
another noise schedule. Stock diffusers does not have it.
"""

from __future__ import annotations

from .pipeline import KandinskyV20Pipeline
from .pipeline_img2img import KandinskyV20Img2ImgPipeline
from .pipeline_inpaint import KandinskyV20InpaintPipeline
from .unet import KandinskyV20UNet


__all__ = [
    "KandinskyV20Img2ImgPipeline",
    "KandinskyV20InpaintPipeline",
    "KandinskyV20Pipeline",
    "KandinskyV20UNet",
]
