"""Kandinsky 2.1, inpainting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.kandinsky import KandinskyInpaintPipeline as StockKandinskyInpaintPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from .. import sampling
from ..decoding import callback_for
from ..images import Images
from ..inpainting import InpaintMixin
from ..schedulers import start_at
from .pipeline import KandinskyPipeline
from .text import TextInputs


class KandinskyInpaintPipeline(InpaintMixin, KandinskyPipeline, StockKandinskyInpaintPipeline):
    """Inpainting with Kandinsky 2.1. Made of the parts of [`KandinskyPipeline`], which see.

    A UNet with 9 input channels is shown what is known of the picture; for one with 4 the known region is put back,
    noised as far as the rest, after each step. With [`KandinskyAncestralScheduler`] the known latents are put into
    each predicted clean picture too, as the original does.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        image_embeds: torch.Tensor | list[torch.Tensor] | None = None,
        negative_image_embeds: torch.Tensor | list[torch.Tensor] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback: Callable[[int, int, torch.Tensor], None] | None = None,
        callback_steps: int | None = 1,
        return_dict: bool = True,
        strength: float = 1.0,
        padding_mask_crop: int | None = None,
        preserve_unmasked: bool = False,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Repaint a region of a picture; arguments as for [`KandinskyPipeline.__call__`], and:

        Args:
            image: one for all prompts, or one for each, resized to `height` and `width` (see [`images.pixels_from`]);
                a tensor with the MoVQ's number of channels is taken for latents.
            mask_image: one for all, or one for each; white or 1 is repainted (see [`images.masks_from`]).
            strength: below 1 the region starts from its noised content and takes that share of the steps.
            padding_mask_crop: paint only the mask and so many pixels around it, at the full `height` and `width`, and
                put it into the picture, which keeps its size.
            preserve_unmasked: give back the pixels outside the mask as they were; else they come from the MoVQ.
            latents: the noise to start from.

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        callback_on_step_end = callback_for(callback_on_step_end, callback, callback_steps)
        text = TextInputs(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
        )
        batch, rows = self._check(
            text.count,
            {"image_embeds": image_embeds, "negative_image_embeds": negative_image_embeds},
            (height, width),
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=guidance_scale,
            generator=generator,
            latents=latents,
            output_type=output_type,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        known = self._load_known(image, mask_image, batch, padding_mask_crop, preserve_unmasked, output_type)

        device, dtype, shape = self._execution_device, self.unet.dtype, self._latent_shape(batch)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps, noise_timestep = start_at(self.scheduler, strength)
        conditions = self._encode(text, batch, rows, device)
        conditions |= self._known_conditions(known, batch, device)
        noise = sampling.draw_noise(shape, generator, device, dtype) if latents is None else latents.to(device, dtype)
        image_latents = None if strength == 1.0 else conditions["known_latents"]
        latents = self.prepare_latents(shape, dtype, device, generator, noise, image_latents, noise_timestep)
        on_step_end = sampling.step_end_callback(
            self, conditions, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        on_step_end = self._reimpose(conditions, timesteps, noise, on_step_end)
        latents = self._denoise(latents, timesteps, conditions, generator, on_step_end)
        if output_type == "latent":
            return self._output(latents, output_type, return_dict)
        pixels = self._preserve(self.decode_latents(latents, height, width), known, batch)
        return self._output(pixels, output_type, return_dict, known.crop)
