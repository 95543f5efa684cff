"""Kandinsky 2.0, image to image."""

from __future__ import annotations

from typing import Unpack

import torch

from ..decoding import Img2ImgMixin
from ..images import Images
from ..options import ImageStartOptions, Pictures, Prompts, accepts
from .pipeline import KandinskyV20Options, KandinskyV20Pipeline
from .text import TextStates


class KandinskyV20Img2ImgOptions(ImageStartOptions, KandinskyV20Options, total=False):
    """What image-to-image with 2.0 takes."""


class KandinskyV20Img2ImgPipeline(Img2ImgMixin, KandinskyV20Pipeline):
    """Image to image with Kandinsky 2.0. Made of the parts of [`KandinskyV20Pipeline`], which see."""

    @torch.no_grad()
    @accepts(KandinskyV20Img2ImgOptions, TextStates)
    def __call__(
        self,
        prompt: Prompts | None = None,
        image: Images | None = None,
        negative_prompt: Prompts | None = None,
        **options: Unpack[KandinskyV20Img2ImgOptions],
    ) -> Pictures:
        """Draw anew what is in a picture; arguments as for [`KandinskyV20Pipeline.__call__`], and:

        Args:
            image: one for all prompts, or one for each, resized to `height` and `width` (see [`images.pixels_from`]);
                a tensor with the VAE's number of channels is taken for latents.
            options: [`KandinskyV20Img2ImgOptions`] and [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})
