"""Kandinsky 2.2: a prior makes an image embedding of the prompt, a decoder draws from it alone.

Against 2.1 the decoder has no text encoder, CLIP and the embedding are larger, and a UNet may take a depth map. The
models are stock classes; the pipelines repair and extend the stock ones.
"""

from __future__ import annotations

from .pipeline import KandinskyV22ControlnetPipeline, KandinskyV22Pipeline
from .pipeline_combined import (
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetCombinedPipeline,
    KandinskyV22ControlnetImg2ImgCombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
)
from .pipeline_img2img import KandinskyV22ControlnetImg2ImgPipeline, KandinskyV22Img2ImgPipeline
from .pipeline_inpaint import KandinskyV22InpaintPipeline
from .pipeline_prior import KandinskyV22PriorEmb2EmbPipeline, KandinskyV22PriorPipeline


__all__ = [
    "KandinskyV22CombinedPipeline",
    "KandinskyV22ControlnetCombinedPipeline",
    "KandinskyV22ControlnetImg2ImgCombinedPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
    "KandinskyV22ControlnetPipeline",
    "KandinskyV22Img2ImgCombinedPipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22InpaintCombinedPipeline",
    "KandinskyV22InpaintPipeline",
    "KandinskyV22Pipeline",
    "KandinskyV22PriorEmb2EmbPipeline",
    "KandinskyV22PriorPipeline",
]
