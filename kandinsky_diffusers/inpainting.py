"""Inpainting: what is known of a picture, at pixel and at latent size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor

from . import sampling
from .decoding import Batch, Conditions
from .images import grow_repainted, masks_from, resize_mask
from .schedulers import noise_to


@dataclass(frozen=True)
class Crop:
    """The part of a picture around its mask that is painted larger than it is (`padding_mask_crop`).

    Args:
        image: the whole picture.
        mask_image: its mask, of the same size; white is repainted.
        box: left, top, right, bottom in pixels.
    """

    image: PIL.Image.Image
    mask_image: PIL.Image.Image
    box: tuple[int, int, int, int]

    @classmethod
    def around_mask(cls, image: Any, mask_image: Any, size: tuple[int, int], padding: int, output_type: str) -> Crop:
        """Crop to the mask and `padding` pixels around it, widened to the proportions of `size` (height, width).

        Raises:
            ValueError: image and mask are not single PIL pictures of one size, the output is not `"pil"`, the padding
                is negative, or the mask is empty.
        """
        if not isinstance(image, PIL.Image.Image) or not isinstance(mask_image, PIL.Image.Image):
            raise ValueError("`padding_mask_crop` needs `image` and `mask_image` as single PIL pictures.")
        if image.size != mask_image.size:
            raise ValueError(f"`mask_image` is {mask_image.size}; accepted with `padding_mask_crop` is {image.size}.")
        if output_type != "pil":
            raise ValueError(f"`output_type` is {output_type!r}; accepted with `padding_mask_crop` is 'pil'.")
        if padding < 0:
            raise ValueError(f"`padding_mask_crop` is {padding}; accepted is 0 or more.")
        mask_image = mask_image.convert("L").point([0] * 128 + [255] * 128)
        if mask_image.getbbox() is None:
            raise ValueError("`mask_image` is black everywhere; with `padding_mask_crop` something must be white.")
        height, width = size
        box = VaeImageProcessor.get_crop_region(mask_image, width, height, pad=padding)
        return cls(image, mask_image, box)

    def paste(self, painted: PIL.Image.Image) -> PIL.Image.Image:
        """The whole picture with the repainted part put in; everything outside the mask is left as it was."""
        return VaeImageProcessor().apply_overlay(self.mask_image, self.image, painted, self.box)


def keep_mask_at_latent_size(
    masks: list[torch.Tensor], size: tuple[int, int], latent_size: tuple[int, int], scale_factor: int, grow: bool
) -> torch.Tensor:
    """Masks `[batch, 1, latent height, latent width]`, 1 keeps, as the inpainting UNets take them.

    Args:
        masks: as users give them, 1 repaints, `[batch, 1, h, w]` of any size.
        size: of the picture in pixels.
        latent_size: height and width in latents, which may reach beyond the picture; nothing is repainted there.
        scale_factor: pixels per latent.
        grow: whether to grow the repainted region, see [`images.grow_repainted`].
    """
    padded = (latent_size[0] * scale_factor, latent_size[1] * scale_factor)
    if padded != size:
        pixels = resize_mask(masks, *size)
        masks = [F.pad(pixels, (0, padded[1] - size[1], 0, padded[0] - size[0]))]
    keep_mask = 1.0 - resize_mask(masks, *latent_size)
    return grow_repainted(keep_mask) if grow else keep_mask


def reimpose_known(
    scheduler: Any,
    timesteps: torch.Tensor,
    known_latents: torch.Tensor,
    keep_mask: torch.Tensor,
    noise: torch.Tensor,
    then: sampling.OnStepEnd | None,
) -> sampling.OnStepEnd:
    """After each step set the known region to the picture's latents, noised as the rest is (for a UNet without mask).

    Args:
        scheduler: for the noise levels.
        timesteps: of the loop.
        known_latents: clean, `[batch, channels, height, width]`.
        keep_mask: `[batch, 1, height, width]`, 1 keeps.
        noise: standard normal, shaped like `known_latents`.
        then: what else is called after each step.
    """

    def on_step_end(index: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        known = known_latents
        if index + 1 < len(timesteps):
            known = noise_to(scheduler, known_latents, noise, timesteps[index + 1])
        latents = keep_mask * known + (1.0 - keep_mask) * latents
        return latents if then is None else then(index, timestep, latents)

    return on_step_end


@dataclass(frozen=True)
class Known:
    """What a call knows of the picture it paints in.

    Args:
        pixels: `[batch, 3, height, width]` in [-1, 1], or latents.
        masks: `[batch, 1, h, w]`, 1 repaints.
        crop: where only a part is painted.
        preserve: whether the pixels outside the mask come back as they were.
    """

    pixels: torch.Tensor
    masks: list[torch.Tensor]
    crop: Crop | None
    preserve: bool


class InpaintMixin:
    """Mixed in beside [`DecoderMixin`]."""

    def _load_known(self, arguments: Mapping[str, Any], batch: Batch) -> Known:
        """The picture and its masks among the arguments of a call, after a check that they fit it."""
        image, mask_image, output_type = (arguments[name] for name in ("image", "mask_image", "output_type"))
        if mask_image is None:
            raise ValueError("`mask_image` is missing; white (1) is repainted, black (0) kept.")
        crop = None
        if arguments["padding_mask_crop"] is not None:
            crop = Crop.around_mask(image, mask_image, batch.size, arguments["padding_mask_crop"], output_type)
            image, mask_image = crop.image.crop(crop.box), crop.mask_image.crop(crop.box)
        pixels, masks = self._load_image(image, batch), masks_from(mask_image)
        batch.expand(resize_mask(masks, 1, 1), "mask_image")
        if arguments["preserve_unmasked"] and (output_type == "latent" or self._is_latents(pixels)):
            raise ValueError("`preserve_unmasked` needs pixels: neither `image` nor the output can be latents.")
        return Known(pixels, masks, crop, arguments["preserve_unmasked"])

    def _known_conditions(self, known: Known, batch: Batch, device: torch.device) -> Conditions:
        """Latents of the picture, the mask at their size, and both in the form that inpainting UNets take."""
        latents = batch.expand(self.encode_pixels(known.pixels, device), "image")
        keep_mask = keep_mask_at_latent_size(
            known.masks,
            batch.size,
            self._latent_size(batch.size),
            self.movq_scale_factor,
            grow=self.scheduler.config.get("grow_mask", True),
        )
        keep_mask = batch.expand(keep_mask.to(latents), "mask_image")
        return {"known_latents": latents, "keep_mask": keep_mask, "masked_latents": latents * keep_mask}

    def _reimpose(
        self, conditions: Conditions, timesteps: torch.Tensor, noise: torch.Tensor, then: sampling.OnStepEnd | None
    ) -> sampling.OnStepEnd | None:
        """What a UNet that is not shown the mask needs after each step."""
        if self.unet.config.in_channels != noise.shape[1]:
            return then
        return reimpose_known(
            self.scheduler, timesteps, conditions["known_latents"], conditions["keep_mask"], noise, then
        )

    def _preserve(self, pixels: torch.Tensor, known: Known, batch: Batch) -> torch.Tensor:
        """`pixels` with those outside the mask as they were, where that is asked for."""
        if not known.preserve:
            return pixels
        repainted = batch.expand(resize_mask(known.masks, *batch.size), "mask_image").to(pixels.device) > 0.5
        return torch.where(repainted, pixels, batch.expand(known.pixels, "image").to(pixels))
