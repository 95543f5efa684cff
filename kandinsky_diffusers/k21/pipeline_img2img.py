"""Kandinsky 2.1, image to image."""

from __future__ import annotations

from typing import Unpack

import torch
from diffusers.pipelines.kandinsky import KandinskyImg2ImgPipeline as StockKandinskyImg2ImgPipeline

from ..decoding import Img2ImgMixin
from ..images import Images
from ..mclip import TextStates
from ..options import Embeds, Img2ImgOptions, Pictures, Prompts, accepts
from .pipeline import KandinskyPipeline


class KandinskyImg2ImgPipeline(Img2ImgMixin, KandinskyPipeline, StockKandinskyImg2ImgPipeline):
    """Image to image with Kandinsky 2.1. Made of the parts of [`KandinskyPipeline`], which see."""

    @torch.no_grad()
    @accepts(Img2ImgOptions, TextStates, stock=StockKandinskyImg2ImgPipeline)
    def __call__(
        self,
        prompt: Prompts | None = None,
        image: Images | None = None,
        image_embeds: Embeds | None = None,
        negative_image_embeds: Embeds | None = None,
        negative_prompt: Prompts | None = None,
        **options: Unpack[Img2ImgOptions],
    ) -> Pictures:
        """Draw anew what is in a picture; arguments as for [`KandinskyPipeline.__call__`], and:

        Args:
            image: one for all prompts, or one for each, resized to `height` and `width` (see [`images.pixels_from`]);
                a tensor with the MoVQ's number of channels is taken for latents.
            options: [`Img2ImgOptions`] and [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})
