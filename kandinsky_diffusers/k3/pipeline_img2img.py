"""Kandinsky 3.0, 3.1 and Flash, image to image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from diffusers.pipelines.kandinsky3 import Kandinsky3Img2ImgPipeline as StockKandinsky3Img2ImgPipeline

from ..decoding import Img2ImgMixin
from ..images import Images, size_of
from ..options import ImageStartOptions, Pictures, Prompts, accepts
from .pipeline import Kandinsky3Options, Kandinsky3Pipeline
from .text import TextStates


class Kandinsky3Img2ImgOptions(ImageStartOptions, Kandinsky3Options, total=False):
    """What image-to-image takes; `height` and `width` are those of the picture by default."""


class Kandinsky3Img2ImgPipeline(Img2ImgMixin, Kandinsky3Pipeline, StockKandinsky3Img2ImgPipeline):
    """Image to image with Kandinsky 3.0, 3.1 or Flash. Made of the parts of [`Kandinsky3Pipeline`], which see.

    With Flash it refines a picture in a step or two: `strength` chooses at which of its four timesteps it starts.
    """

    _reducing_gap = 1.0

    def _default_size(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        if not self._is_latents(arguments["image"]):
            return size_of(arguments["image"])
        height, width = (side * self.movq_scale_factor for side in arguments["image"].shape[-2:])
        return height, width

    @torch.no_grad()
    @accepts(Kandinsky3Img2ImgOptions, TextStates, stock=StockKandinsky3Img2ImgPipeline)
    def __call__(
        self,
        prompt: Prompts | None = None,
        image: Images | None = None,
        negative_prompt: Prompts | None = None,
        **options: Unpack[Kandinsky3Img2ImgOptions],
    ) -> Pictures:
        """Draw anew what is in a picture; arguments as for [`Kandinsky3Pipeline.__call__`], and:

        Args:
            image: one for all prompts, or one for each, resized to `height` and `width` if they are given (see
                [`images.pixels_from`]); a tensor with the MoVQ's number of channels is taken for latents.
            options: [`Kandinsky3Img2ImgOptions`] and [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})
