"""Kandinsky 3.0, 3.1 and Flash, inpainting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

import torch
import torch.nn.functional as F

from ..decoding import Call, Conditions
from ..images import Images, masks_from, pad_to, size_of
from ..inpainting import InpaintMixin
from ..options import Pictures, Prompts, RepaintOptions, accepts
from .pipeline import SIDE, Kandinsky3Options, Kandinsky3Pipeline
from .text import TextStates


class Kandinsky3InpaintOptions(RepaintOptions, Kandinsky3Options, total=False):
    """What inpainting takes.

    `height` and `width` are by default those of the picture, made smaller to at most as many pixels as 1024 x 1024,
    and to multiples of 64, as in the original.
    """


class Kandinsky3InpaintPipeline(InpaintMixin, Kandinsky3Pipeline):
    """Inpainting with Kandinsky 3.0, 3.1 or Flash. Made of the parts of [`Kandinsky3Pipeline`], which see.

    A UNet with 9 input channels is shown what is known of the picture; for one with 4 the known region is put back,
    noised as far as the rest, after each step.
    """

    def _check(self, arguments: Mapping[str, Any]) -> Call:
        """With `padding_mask_crop` the masks of `regions` are those of the whole picture, and cropped."""
        call = super()._check(arguments)
        crop = call.source.crop
        return call if crop is None else replace(call, regions=[region.inside(crop) for region in call.regions])

    def _default_size(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """(`resize_image_for_diffusion` in kandinsky3/utils.py of the original.)"""
        if self._is_latents(arguments["image"]):
            height, width = (side * self.movq_scale_factor for side in arguments["image"].shape[-2:])
            return height, width
        height, width = size_of(arguments["image"])
        reduction = max(1.0, math.sqrt(height * width / SIDE**2))
        height, width = (max(round(side / reduction) // 64, 1) * 64 for side in (height, width))
        return height, width

    def _load_masks(self, mask_image: Images, size: tuple[int, int]) -> list[torch.Tensor]:
        return masks_from(mask_image)

    def _known_conditions(self, call: Call, device: torch.device) -> Conditions:
        """The mask at latent size; latents of the picture without what is repainted, or of the picture, or both.

        Masks are resized bilinearly to the picture, and then to the latents with the nearest pixel. A pixel that is
        repainted even a little is hidden (kandinsky3/inpainting_pipeline.py and kandinsky3/utils.py of the original).
        """
        known, batch, size = call.source, call.batch, self._latent_size(call.batch.size)
        masks = torch.cat([F.interpolate(mask, batch.size, mode="bilinear") for mask in known.masks])
        keep_mask = 1.0 - pad_to(masks, *(side * self.movq_scale_factor for side in size))
        keep_latents = F.interpolate(keep_mask, size, mode="nearest").to(device, self.unet.dtype)
        conditions = {"mask_image": batch.expand(keep_latents, "mask_image")}
        if self._unet_sees_known:
            hidden = keep_latents if self._is_latents(known.pixels) else 1.0 - masks.to(known.pixels)
            shown = known.pixels * (hidden == 1.0).to(known.pixels)
            conditions["masked_image"] = self._image_latents(shown, call, device)
        if not self._unet_sees_known or call["strength"] < 1.0:
            conditions["known_latents"] = self._image_latents(known.pixels, call, device)
        return conditions

    @torch.no_grad()
    @accepts(Kandinsky3InpaintOptions, TextStates)
    def __call__(
        self,
        prompt: Prompts | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        negative_prompt: Prompts | None = None,
        **options: Unpack[Kandinsky3InpaintOptions],
    ) -> Pictures:
        """Repaint a region of a picture; arguments as for [`Kandinsky3Pipeline.__call__`], and:

        Args:
            image: one for all prompts, or one for each, resized to `height` and `width` (see [`images.pixels_from`]);
                a tensor with the MoVQ's number of channels is taken for latents.
            mask_image: one for all, or one for each; white or 1 is repainted (see [`images.masks_from`]).
            options: [`Kandinsky3InpaintOptions`] and [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})
