"""Kandinsky 3.0, 3.1 and Flash: one UNet that reads the text itself, without a prior.

Against 2.x the text goes from T5's encoder through a projection into the UNet, guidance is `(g + 1) c - g u`, and
without a negative prompt u is drawn with a learned null embedding. The three releases differ in weights and sampler,
which the components say. Stock has the UNet and two pipelines, without null embedding, inpainting and the samplers.
"""

from __future__ import annotations

from .controlnet import Kandinsky3ControlNetModel
from .hed import KandinskyHEDDetector
from .pipeline import Kandinsky3Pipeline
from .pipeline_controlnet import (
    Kandinsky3ControlNetImg2ImgPipeline,
    Kandinsky3ControlNetInpaintPipeline,
    Kandinsky3ControlNetPipeline,
)
from .pipeline_img2img import Kandinsky3Img2ImgPipeline
from .pipeline_inpaint import Kandinsky3InpaintPipeline
from .regions import Region
from .unet import Kandinsky3UNet


__all__ = [
    "Kandinsky3ControlNetImg2ImgPipeline",
    "Kandinsky3ControlNetInpaintPipeline",
    "Kandinsky3ControlNetModel",
    "Kandinsky3ControlNetPipeline",
    "Kandinsky3Img2ImgPipeline",
    "Kandinsky3InpaintPipeline",
    "Kandinsky3Pipeline",
    "Kandinsky3UNet",
    "KandinskyHEDDetector",
    "Region",
]
