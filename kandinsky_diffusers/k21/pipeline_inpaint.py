"""Kandinsky 2.1, inpainting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.kandinsky import KandinskyInpaintPipeline as StockKandinskyInpaintPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from .. import sampling
from ..images import Images
from ..inpainting import InpaintMixin
from ..inputs import check_strength
from ..schedulers import start_at
from .pipeline import Call, KandinskyPipeline


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
        arguments = dict(locals())
        call = self._check(arguments)

        device, dtype, shape = self._execution_device, self.unet.dtype, self._latent_shape(call.batch)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps, noise_timestep = start_at(self.scheduler, strength)
        conditions = self._encode(call, device) | self._known_conditions(call.source, call.batch, device)
        noise = sampling.draw_noise(shape, generator, device, dtype) if latents is None else latents.to(device, dtype)
        image_latents = None if strength == 1.0 else conditions["known_latents"]
        latents = self.prepare_latents(shape, dtype, device, generator, noise, image_latents, noise_timestep)
        on_step_end = self._reimpose(conditions, timesteps, noise, self._on_step_end(arguments, conditions))
        latents = self._denoise(latents, timesteps, conditions, generator, on_step_end)
        if output_type == "latent":
            return self._output(latents, output_type, return_dict)
        pixels = self._preserve(self.decode_latents(latents, height, width), call.source, call.batch)
        return self._output(pixels, output_type, return_dict, call.source.crop)

    def _check(self, arguments: Mapping[str, Any]) -> Call:
        call = super()._check(arguments)
        check_strength(arguments["strength"])
        return call._replace(source=self._load_known(arguments, call.batch))
