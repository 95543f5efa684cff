"""Kandinsky 2.1, image to image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.kandinsky import KandinskyImg2ImgPipeline as StockKandinskyImg2ImgPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..images import Images
from ..inputs import check_strength
from ..schedulers import start_at
from .pipeline import Call, KandinskyPipeline


class KandinskyImg2ImgPipeline(KandinskyPipeline, StockKandinskyImg2ImgPipeline):
    """Image to image with Kandinsky 2.1. Made of the parts of [`KandinskyPipeline`], which see."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Images | None = None,
        image_embeds: torch.Tensor | list[torch.Tensor] | None = None,
        negative_image_embeds: torch.Tensor | list[torch.Tensor] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        strength: float = 0.3,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback: Callable[[int, int, torch.Tensor], None] | None = None,
        callback_steps: int | None = 1,
        return_dict: bool = True,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw anew what is in a picture; arguments as for [`KandinskyPipeline.__call__`], and:

        Args:
            image: one for all prompts, or one for each, resized to `height` and `width` (see [`images.pixels_from`]);
                a tensor with the MoVQ's number of channels is taken for latents.
            strength: from 0, keep the picture, to 1, forget it: the share of the steps that are made.
            latents: the noise that is put on the picture, shaped like its latents.

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        arguments = dict(locals())
        call = self._check(arguments)

        device, shape = self._execution_device, self._latent_shape(call.batch)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps, noise_timestep = start_at(self.scheduler, strength)
        conditions = self._encode(call, device)
        image_latents = call.batch.expand(self.encode_pixels(call.source, device), "image")
        latents = self.prepare_latents(
            shape, self.unet.dtype, device, generator, latents, image_latents, noise_timestep
        )
        on_step_end = self._on_step_end(arguments, conditions)
        latents = self._denoise(latents, timesteps, conditions, generator, on_step_end)
        images = latents if output_type == "latent" else self.decode_latents(latents, height, width)
        return self._output(images, output_type, return_dict)

    def _check(self, arguments: Mapping[str, Any]) -> Call:
        call = super()._check(arguments)
        check_strength(arguments["strength"])
        return call._replace(source=self._load_image(arguments["image"], call.batch))
