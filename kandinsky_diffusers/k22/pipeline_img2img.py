"""Kandinsky 2.2, image to image, without and with a depth map."""

from __future__ import annotations

from typing import Unpack

import torch
from diffusers.pipelines.kandinsky2_2 import (
    KandinskyV22ControlnetImg2ImgPipeline as StockKandinskyV22ControlnetImg2ImgPipeline,
)
from diffusers.pipelines.kandinsky2_2 import KandinskyV22Img2ImgPipeline as StockKandinskyV22Img2ImgPipeline

from ..decoding import Img2ImgMixin
from ..images import Images
from ..options import Embeds, Img2ImgOptions, Pictures, accepts
from .pipeline import KandinskyV22Pipeline


class KandinskyV22Img2ImgPipeline(Img2ImgMixin, KandinskyV22Pipeline, StockKandinskyV22Img2ImgPipeline):
    """Image to image with Kandinsky 2.2. Made of the parts of [`KandinskyV22Pipeline`], which see."""

    _image_by_unit_range = True

    @torch.no_grad()
    @accepts(Img2ImgOptions, stock=StockKandinskyV22Img2ImgPipeline)
    def __call__(
        self,
        image_embeds: Embeds | None = None,
        image: Images | None = None,
        negative_image_embeds: Embeds | None = None,
        **options: Unpack[Img2ImgOptions],
    ) -> Pictures:
        """Draw anew what is in a picture; arguments as for [`KandinskyV22Pipeline.__call__`], and:

        Args:
            image: one for all, or one for each, resized to `height` and `width` (see [`images.pixels_from`]); a tensor
                with the MoVQ's number of channels is taken for latents.
            options: [`Img2ImgOptions`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})


class KandinskyV22ControlnetImg2ImgPipeline(
    Img2ImgMixin, KandinskyV22Pipeline, StockKandinskyV22ControlnetImg2ImgPipeline
):
    """Image to image with Kandinsky 2.2 and a depth map, see [`KandinskyV22Img2ImgPipeline`]."""

    _image_by_unit_range = True

    @torch.no_grad()
    @accepts(Img2ImgOptions, stock=StockKandinskyV22ControlnetImg2ImgPipeline)
    def __call__(
        self,
        image_embeds: Embeds | None = None,
        image: Images | None = None,
        negative_image_embeds: Embeds | None = None,
        hint: Images | None = None,
        **options: Unpack[Img2ImgOptions],
    ) -> Pictures:
        """Draw anew what is in a picture; arguments as for [`KandinskyV22Img2ImgPipeline.__call__`], and:

        Args:
            hint: a depth map, one for all or one for each, see [`images.hints_from`].
        """
        return self._generate({**options, **locals()})
