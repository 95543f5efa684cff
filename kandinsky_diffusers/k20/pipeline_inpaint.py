"""Kandinsky 2.0, inpainting."""

from __future__ import annotations

from typing import Unpack

import torch

from ..images import Images
from ..inpainting import InpaintMixin
from ..options import Pictures, Prompts, RepaintOptions, accepts
from .pipeline import KandinskyV20Options, KandinskyV20Pipeline
from .text import TextStates


class KandinskyV20InpaintOptions(RepaintOptions, KandinskyV20Options, total=False):
    """What inpainting with 2.0 takes."""


class KandinskyV20InpaintPipeline(InpaintMixin, KandinskyV20Pipeline):
    """Inpainting with Kandinsky 2.0. Made of the parts of [`KandinskyV20Pipeline`], which see.

    A UNet with 9 input channels is shown what is known of the picture; for one with 4 the known region is put back,
    noised as far as the rest, after each step. With [`KandinskyAncestralScheduler`] the known latents are put into
    each predicted clean picture too, as the original does.
    """

    @torch.no_grad()
    @accepts(KandinskyV20InpaintOptions, TextStates)
    def __call__(
        self,
        prompt: Prompts | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        negative_prompt: Prompts | None = None,
        **options: Unpack[KandinskyV20InpaintOptions],
    ) -> Pictures:
        """Repaint a region of a picture; arguments as for [`KandinskyV20Pipeline.__call__`], and:

        Args:
            image: one for all prompts, or one for each, resized to `height` and `width` (see [`images.pixels_from`]);
                a tensor with the VAE's number of channels is taken for latents.
            mask_image: one for all, or one for each; white or 1 is repainted (see [`images.masks_from`]).
            options: [`KandinskyV20InpaintOptions`] and [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})
