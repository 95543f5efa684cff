"""Kandinsky 2.2, inpainting."""

from __future__ import annotations

from typing import Unpack

import torch
from diffusers.pipelines.kandinsky2_2 import KandinskyV22InpaintPipeline as StockKandinskyV22InpaintPipeline

from ..decoding import Call, Conditions
from ..images import Images
from ..inpainting import InpaintMixin
from ..options import Embeds, InpaintOptions, Pictures, accepts
from .pipeline import KandinskyV22Pipeline


class KandinskyV22InpaintPipeline(InpaintMixin, KandinskyV22Pipeline, StockKandinskyV22InpaintPipeline):
    """Inpainting with Kandinsky 2.2. Made of the parts of [`KandinskyV22Pipeline`], which see.

    After each step the known region is put back, noised as far as the rest, also for a UNet that is shown what is
    known, as the published one is.
    """

    _callback_tensor_inputs = (*KandinskyV22Pipeline._callback_tensor_inputs, "masked_image", "mask_image")
    _reimposes_always = True

    def _encode(self, call: Call, device: torch.device) -> Conditions:
        """Conditions as the step-end callback sees them in stock: picture and mask have both halves too."""
        conditions = super()._encode(call, device)
        halves = self._halves(conditions["known_latents"], conditions)
        shown = ("masked_image", "mask_image")
        return conditions | {name: conditions[name].repeat(halves, 1, 1, 1) for name in shown}

    @torch.no_grad()
    @accepts(InpaintOptions, stock=StockKandinskyV22InpaintPipeline)
    def __call__(
        self,
        image_embeds: Embeds | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        negative_image_embeds: Embeds | None = None,
        **options: Unpack[InpaintOptions],
    ) -> Pictures:
        """Repaint a region of a picture; arguments as for [`KandinskyV22Pipeline.__call__`], and:

        Args:
            image: one for all, or one for each, resized to `height` and `width` (see [`images.pixels_from`]); a tensor
                with the MoVQ's number of channels is taken for latents.
            mask_image: one for all, or one for each; white or 1 is repainted (see [`images.masks_from`]).
            options: [`InpaintOptions`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})
