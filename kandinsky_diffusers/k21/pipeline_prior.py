"""Kandinsky 2.1, the prior: from a prompt to the image embedding that the decoder draws from."""

from __future__ import annotations

import PIL.Image
import torch
from diffusers.pipelines.kandinsky import KandinskyPriorPipeline as StockKandinskyPriorPipeline

from ..images import center_crop
from ..prior_pipeline import PriorPipeline
from ..text import clean_text


class KandinskyPriorPipeline(PriorPipeline, StockKandinskyPriorPipeline):
    """Text to image embedding with Kandinsky 2.1, see [`PriorPipeline`].

    Of a stock UnCLIP scheduler the float64 version is taken on; texts are cleaned and pictures cropped as by OpenAI's
    CLIP, which the original uses.
    """

    _adopted_schedulers = ("scheduler",)

    def _cleaned(self, text: str) -> str:
        return clean_text(text)

    def _pixel_values(self, image: PIL.Image.Image) -> torch.Tensor:
        processed = self.image_processor(image, do_center_crop=False, return_tensors="pt")
        return center_crop(processed.pixel_values, self.image_processor.crop_size)
