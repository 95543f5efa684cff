"""Inpainting: what is known of a picture, at pixel and at latent size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging

from . import sampling
from .decoding import Call, Conditions
from .images import Images, grow_repainted, masks_from, pixels_to, resize_mask
from .inputs import check_at_least, check_strength
from .schedulers import looks_up_on_host, noise_to, start_at


logger = logging.get_logger(__name__)


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
    def around_mask(
        cls,
        image: Any,
        mask_image: Any,
        size: tuple[int, int],
        padding: int,
        output_type: str,
        blur_factor: int | None = None,
    ) -> Crop:
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
        if blur_factor:
            mask_image = VaeImageProcessor.blur(mask_image, blur_factor)
        if mask_image.getbbox() is None:
            raise ValueError("`mask_image` is black everywhere; with `padding_mask_crop` something must be white.")
        height, width = size
        box = VaeImageProcessor.get_crop_region(mask_image, width, height, pad=padding)
        return cls(image, mask_image, box)

    @property
    def whole_size(self) -> tuple[int, int]:
        """Height and width of the whole picture."""
        return self.image.height, self.image.width

    def cut_out(self, rows: torch.Tensor) -> torch.Tensor:
        """What of `[..., height, width]`, of the size of the whole picture, lies in the box."""
        left, top, right, bottom = self.box
        return rows[..., top:bottom, left:right]

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
    conditions: Conditions,
    then: sampling.OnStepEnd | None,
) -> sampling.OnStepEnd:
    """After each step set the known region to the picture's latents, noised as the rest is (for a UNet without mask).

    Args:
        scheduler: for the noise levels.
        timesteps: of the loop.
        conditions: `known_latents`, clean, `[batch, channels, height, width]`; `noise`, standard normal, of the same
            shape; and `mask_image`, `[batch or 2 * batch, 1, height, width]`, 1 keeps, which a callback may change.
        then: what else is called after each step.
    """

    if not looks_up_on_host(scheduler):
        timesteps = timesteps.to(conditions["known_latents"].device)  # all at once, see `RunningCall`

    def on_step_end(index: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        known, keep_mask = conditions["known_latents"], conditions["mask_image"][-len(latents) :]
        if index + 1 < len(timesteps):
            known = noise_to(scheduler, known, conditions["noise"], timesteps[index + 1])
        latents = keep_mask * known + (1.0 - keep_mask) * latents
        return latents if then is None else then(index, timestep, latents)

    return on_step_end


@dataclass(frozen=True)
class Known:
    """What a call knows of the picture it paints in.

    Args:
        pixels: `[batch, 3, height, width]` in [-1, 1], or latents.
        masks: `[batch, 1, h, w]`, 1 repaints.
        soft_masks: the same with a blurred edge, for putting painted and known pixels together.
        crop: where only a part is painted.
    """

    pixels: torch.Tensor
    masks: list[torch.Tensor]
    soft_masks: list[torch.Tensor]
    crop: Crop | None


class InpaintMixin:
    """Mixed in before a family's text-to-image pipeline: a region is painted, the rest of the picture is known."""

    _reimposes_always = False  # else only for a UNet that is not shown what is known

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """For `mask_processor.blur(mask, blur_factor)`, as other inpainting pipelines of diffusers have it."""
        return VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)

    def _check(self, arguments: Mapping[str, Any]) -> Call:
        call = super()._check(arguments)
        check_strength(call["strength"])
        if call["blur_factor"] is not None:
            check_at_least("blur_factor", call["blur_factor"], 0)
        return replace(call, source=self._load_known(call))

    def _timesteps(self, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        return start_at(self.scheduler, call["strength"])

    def _encode(self, call: Call, device: torch.device) -> Conditions:
        return super()._encode(call, device) | self._known_conditions(call, device)

    def _start(
        self, call: Call, conditions: Conditions, noise_timestep: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        shape, dtype, generator, noise = (
            self._latent_shape(call.batch),
            self.unet.dtype,
            call["generator"],
            call["latents"],
        )
        noise = sampling.draw_noise(shape, generator, device, dtype) if noise is None else noise.to(device, dtype)
        conditions["noise"] = noise
        image_latents = None if call["strength"] == 1.0 else conditions["known_latents"]
        return self.prepare_latents(shape, dtype, device, generator, noise, image_latents, noise_timestep)

    def _on_step_end(self, call: Call, conditions: Conditions, timesteps: torch.Tensor) -> sampling.OnStepEnd | None:
        then = super()._on_step_end(call, conditions, timesteps)
        if self._unet_sees_known and not self._reimposes_always:
            return then
        return reimpose_known(self.scheduler, timesteps, conditions, then)

    def _finish(self, call: Call, latents: torch.Tensor) -> Any:
        known: Known = call.source
        if known.crop is None and not call["preserve_unmasked"]:
            return super()._finish(call, latents)
        pixels = self.decode_latents(latents, *call.batch.size)
        if call["preserve_unmasked"]:
            pixels = self._with_known(pixels, call)
        images = pixels_to(pixels, call["output_type"])
        return images if known.crop is None else [known.crop.paste(image) for image in images]

    def _load_known(self, call: Call) -> Known:
        """The picture and its masks among the arguments of a call, after a check that they fit it."""
        image, mask_image, output_type = (call[name] for name in ("image", "mask_image", "output_type"))
        if mask_image is None:
            raise ValueError("`mask_image` is missing; white (1) is repainted, black (0) kept.")
        crop, padding, size = None, call["padding_mask_crop"], call.batch.size
        if padding is not None:
            crop = Crop.around_mask(image, mask_image, size, padding, output_type, call["blur_factor"])
            image, mask_image = crop.image.crop(crop.box), crop.mask_image.crop(crop.box)
        pixels, masks = self._load_image(image, call.batch), self._load_masks(mask_image, size)
        call.batch.expand(resize_mask(masks, 1, 1), "mask_image")
        if call["preserve_unmasked"] and (output_type == "latent" or self._is_latents(pixels)):
            raise ValueError("`preserve_unmasked` needs pixels: neither `image` nor the output can be latents.")
        self._warn_of_inverted(masks if crop is None else masks_from(crop.mask_image))
        soft_masks = masks
        if call["blur_factor"] and crop is None:  # the mask of a crop is blurred already
            soft_masks = [_blurred(mask, call["blur_factor"]) for mask in masks]
            masks = [(mask >= 0.5).float() for mask in soft_masks]
        return Known(pixels, masks, soft_masks, crop)

    def _load_masks(self, mask_image: Images, size: tuple[int, int]) -> list[torch.Tensor]:
        return masks_from(mask_image, size)

    def _warn_of_inverted(self, masks: list[torch.Tensor]) -> None:
        share = max(float(mask.mean()) for mask in masks)
        if 0.5 < share < 1.0 and not getattr(self, "_warned_of_inverted", False):
            self._warned_of_inverted = True
            logger.warning(
                f"`mask_image` has {share:.0%} of the picture repainted: white (1) is repainted, black (0) kept."
                " Before diffusers 0.19 it was the other way round; a mask from such a script has to be inverted"
                " (`1 - mask`, `PIL.ImageOps.invert`)."
            )

    def _known_conditions(self, call: Call, device: torch.device) -> Conditions:
        """Latents of the picture, the mask at their size, and both in the form that inpainting UNets take."""
        known, batch = call.source, call.batch
        latents = self._image_latents(known.pixels, call, device)
        keep_mask = keep_mask_at_latent_size(
            known.masks,
            batch.size,
            self._latent_size(batch.size),
            self.movq_scale_factor,
            grow=self.scheduler.config.get("grow_mask", True),
        )
        keep_mask = batch.expand(keep_mask.to(latents), "mask_image")
        known_conditions = {"known_latents": latents, "keep_mask": keep_mask}
        return {**known_conditions, "masked_image": latents * keep_mask, "mask_image": keep_mask}

    def _with_known(self, pixels: torch.Tensor, call: Call) -> torch.Tensor:
        """`pixels` with those outside the mask as they were."""
        masks = resize_mask(call.source.soft_masks, *call.batch.size)
        masks = call.batch.expand(masks, "mask_image").to(pixels)
        known = call.batch.expand(call.source.pixels, "image").to(pixels)
        return torch.lerp(known, pixels, masks)


def _blurred(masks: torch.Tensor, blur_factor: int) -> torch.Tensor:
    pictures = [PIL.Image.fromarray(mask) for mask in (masks[:, 0] * 255).byte().cpu().numpy()]
    blurred = [np.array(VaeImageProcessor.blur(picture, blur_factor), dtype=np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(blurred))[:, None] / 255.0
