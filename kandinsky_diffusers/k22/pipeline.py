"""Kandinsky 2.2, text to image: the decoder that draws from image embeddings alone, or with a depth map besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, VQModel
from diffusers import UNet2DConditionModel as StockUNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.kandinsky2_2 import KandinskyV22ControlnetPipeline as StockKandinskyV22ControlnetPipeline
from diffusers.pipelines.kandinsky2_2 import KandinskyV22Pipeline as StockKandinskyV22Pipeline

from ..decoding import Call, Conditions, DecoderMixin
from ..images import Images, hints_from, pad_to
from ..inputs import as_rows
from ..movq import MoVQ, pixels_per_latent
from ..options import DecoderOptions, Embeds, Pictures, accepts
from ..pipeline_base import KandinskyPipelineMixin
from ..unet import UNet2DConditionModel


class KandinskyV22Pipeline(DecoderMixin, KandinskyPipelineMixin, StockKandinskyV22Pipeline):
    """Text to image with Kandinsky 2.2, from the image embeddings of [`KandinskyV22PriorPipeline`].

    To change one part, subclass it and override `prepare_latents`, `predict_noise` or `decode_latents`; the other
    tasks are made of the same parts.

    Args:
        unet: with 4 input channels; one with 9, made for inpainting, is given an empty mask. Where it has the
            `addition_embed_type` `"image_hint"`, as for the ControlNet pipelines, a depth map is needed too.
        scheduler: DDPM as published; any diffusers scheduler for noise prediction works.
        movq: the image autoencoder.
    """

    model_cpu_offload_seq = "unet->movq"
    _orders_of_use = ("movq->unet->movq",)
    _callback_tensor_inputs = ("latents", "image_embeds", "negative_image_embeds")

    def __init__(
        self, unet: StockUNet2DConditionModel | UNet2DConditionModel, scheduler: DDPMScheduler, movq: VQModel | MoVQ
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(unet=unet, scheduler=scheduler, movq=movq)
        self.movq_scale_factor = pixels_per_latent(movq)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.movq_scale_factor, resample="bicubic")
        self._guidance_scale = 1.0

    @property
    def _embeds_width(self) -> int:
        return self.unet.config.encoder_hid_dim

    def _check(self, arguments: Mapping[str, Any]) -> Call:
        prompts = len(as_rows(arguments["image_embeds"], self._embeds_width, "image_embeds"))
        call = self._check_common(arguments, prompts)
        hint, takes_hint = arguments.get("hint"), self.unet.config.addition_embed_type == "image_hint"
        if takes_hint != (hint is not None):
            raise ValueError(
                "`hint` is missing; this UNet needs a depth map: a PIL picture, an array or a tensor."
                if takes_hint
                else "`hint` is given, but this UNet takes none (its `addition_embed_type` is not 'image_hint')."
            )
        if hint is None:
            return call
        hint = hints_from(hint, *call.batch.size)
        call.batch.expand(hint, "hint")
        return replace(call, hint=hint)

    def _encode(self, call: Call, device: torch.device) -> Conditions:
        """Conditions as the step-end callback sees them in stock: `image_embeds` has both halves."""
        conditions = self._embeds_for(call, device)
        if self.do_classifier_free_guidance:
            halves = [conditions["negative_image_embeds"], conditions["image_embeds"]]
            conditions["image_embeds"] = torch.cat(halves)
        if call.hint is not None:
            size = (side * self.movq_scale_factor for side in self._latent_size(call.batch.size))
            hint = pad_to(call.hint, *size).to(device, self.unet.dtype)
            conditions["hint"] = call.batch.expand(hint, "hint")
        return conditions

    def _halves(self, latents: torch.Tensor, conditions: Conditions) -> int:
        return len(conditions["image_embeds"]) // len(latents)

    def predict_noise(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """What the UNet says of `latents` at `timestep`.

        Args:
            latents: `[batch, 4, height, width]`.
            timestep: a training timestep.
            conditions: named tensors: `image_embeds`, `[2 * batch, width]` with the unconditional half first, or
                `[batch, width]` where guidance is off; and one row for each image of `hint`, and of `masked_image` and
                `mask_image` (latents, 1 keeps) when inpainting.

        Returns:
            Noise and variance, `[2 * batch or batch, 8, height, width]`.
        """
        halves, hint = self._halves(latents, conditions), conditions.get("hint")
        cache = self._context_cache(self.unet, [conditions["image_embeds"], hint, halves])
        added = {"image_embeds": conditions["image_embeds"], "cache": cache}
        if hint is not None:
            added["hint"] = torch.cat([hint] * halves)
        sample = self._unet_input(latents, timestep, conditions)
        return self.unet(
            sample=sample,
            timestep=timestep,
            encoder_hidden_states=None,
            cross_attention_kwargs=self._attention_arguments(sample),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    @torch.no_grad()
    @accepts(DecoderOptions, stock=StockKandinskyV22Pipeline)
    def __call__(
        self,
        image_embeds: Embeds | None = None,
        negative_image_embeds: Embeds | None = None,
        **options: Unpack[DecoderOptions],
    ) -> Pictures:
        """Draw.

        Args:
            image_embeds: `[prompts, width]` from the prior.
            negative_image_embeds: of the unconditional half; not needed at a guidance scale of 1.
            options: [`DecoderOptions`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})


class KandinskyV22ControlnetPipeline(KandinskyV22Pipeline, StockKandinskyV22ControlnetPipeline):
    """Text to image with Kandinsky 2.2 and a depth map. Made of the parts of [`KandinskyV22Pipeline`], which see."""

    @torch.no_grad()
    @accepts(DecoderOptions, stock=StockKandinskyV22ControlnetPipeline)
    def __call__(
        self,
        image_embeds: Embeds | None = None,
        negative_image_embeds: Embeds | None = None,
        hint: Images | None = None,
        **options: Unpack[DecoderOptions],
    ) -> Pictures:
        """Draw; arguments as for [`KandinskyV22Pipeline.__call__`], and:

        Args:
            hint: a depth map, one for all or one for each, see [`images.hints_from`].
        """
        return self._generate({**options, **locals()})
