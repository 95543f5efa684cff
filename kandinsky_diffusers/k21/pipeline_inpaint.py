"""Kandinsky 2.1, inpainting."""

from __future__ import annotations

from typing import Unpack

import torch
from diffusers.pipelines.kandinsky import KandinskyInpaintPipeline as StockKandinskyInpaintPipeline

from ..images import Images
from ..inpainting import InpaintMixin
from ..mclip import TextStates
from ..options import Embeds, InpaintOptions, Pictures, Prompts, accepts
from .pipeline import KandinskyPipeline


class KandinskyInpaintPipeline(InpaintMixin, KandinskyPipeline, StockKandinskyInpaintPipeline):
    """Inpainting with Kandinsky 2.1. Made of the parts of [`KandinskyPipeline`], which see.

    A UNet with 9 input channels is shown what is known of the picture; for one with 4 the known region is put back,
    noised as far as the rest, after each step. With [`KandinskyAncestralScheduler`] the known latents are put into
    each predicted clean picture too, as the original does.
    """

    @torch.no_grad()
    @accepts(InpaintOptions, TextStates, stock=StockKandinskyInpaintPipeline)
    def __call__(
        self,
        prompt: Prompts | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        image_embeds: Embeds | None = None,
        negative_image_embeds: Embeds | None = None,
        negative_prompt: Prompts | None = None,
        **options: Unpack[InpaintOptions],
    ) -> Pictures:
        """Repaint a region of a picture; arguments as for [`KandinskyPipeline.__call__`], and:

        Args:
            image: one for all prompts, or one for each, resized to `height` and `width` (see [`images.pixels_from`]);
                a tensor with the MoVQ's number of channels is taken for latents.
            mask_image: one for all, or one for each; white or 1 is repainted (see [`images.masks_from`]).
            options: [`InpaintOptions`] and [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})
