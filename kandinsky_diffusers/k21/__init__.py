"""Kandinsky 2.1: a prior makes an image embedding of the prompt, a decoder draws from both.

Against 2.0 it has the prior and the image embedding, one text encoder instead of two, and a MoVQ instead of a KL
autoencoder. The models are stock classes; the pipelines repair and extend the stock ones.
"""

from __future__ import annotations

from .pipeline import KandinskyPipeline
from .pipeline_combined import (
    KandinskyCombinedPipeline,
    KandinskyImg2ImgCombinedPipeline,
    KandinskyInpaintCombinedPipeline,
)
from .pipeline_img2img import KandinskyImg2ImgPipeline
from .pipeline_inpaint import KandinskyInpaintPipeline
from .pipeline_prior import KandinskyPriorPipeline


__all__ = [
    "KandinskyCombinedPipeline",
    "KandinskyImg2ImgCombinedPipeline",
    "KandinskyImg2ImgPipeline",
    "KandinskyInpaintCombinedPipeline",
    "KandinskyInpaintPipeline",
    "KandinskyPipeline",
    "KandinskyPriorPipeline",
]
