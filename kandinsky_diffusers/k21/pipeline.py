"""Kandinsky 2.1, text to image: the decoder that draws from image embeddings and a prompt."""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, VQModel
from diffusers import UNet2DConditionModel as StockUNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.kandinsky import KandinskyPipeline as StockKandinskyPipeline
from diffusers.pipelines.kandinsky import MultilingualCLIP
from transformers import XLMRobertaTokenizer

from ..decoding import DecoderMixin
from ..mclip import States, TextConditionsMixin, TextInputs, TextStates, encode_with_mclip
from ..movq import MoVQ, pixels_per_latent
from ..options import DecoderOptions, Embeds, Pictures, Prompts, accepts
from ..pipeline_base import KandinskyPipelineMixin
from ..unet import UNet2DConditionModel


class KandinskyPipeline(TextConditionsMixin, DecoderMixin, KandinskyPipelineMixin, StockKandinskyPipeline):
    """Text to image with Kandinsky 2.1, from the image embeddings of [`KandinskyPriorPipeline`].

    To change one part, subclass it and override `encode_prompt`, `prepare_latents`, `predict_noise` or
    `decode_latents`; image-to-image and inpainting are made of the same parts.

    Args:
        text_encoder: M-CLIP, the multilingual text encoder.
        tokenizer: of the text encoder.
        unet: with 4 input channels; one with 9, made for inpainting, is given an empty mask.
        scheduler: DDIM as published; any diffusers scheduler for noise prediction works.
        movq: the image autoencoder.
    """

    model_cpu_offload_seq = "text_encoder->unet->movq"
    _orders_of_use = ("text_encoder->movq->unet->movq",)
    _added_conditions: ClassVar = {"text_embeds": "pooled_prompt_embeds", "image_embeds": "image_embeds"}
    _callback_tensor_inputs = (
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "image_embeds",
        "negative_image_embeds",
    )

    def __init__(
        self,
        text_encoder: MultilingualCLIP,
        tokenizer: XLMRobertaTokenizer,
        unet: StockUNet2DConditionModel | UNet2DConditionModel,
        scheduler: DDIMScheduler | DDPMScheduler,
        movq: VQModel | MoVQ,
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(
            text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, movq=movq
        )
        self.movq_scale_factor = pixels_per_latent(movq)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.movq_scale_factor, resample="bicubic")
        self._guidance_scale = 1.0

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Text states for the UNet, one row for each image.

        Args:
            prompt: one or several, in any language M-CLIP knows; None with `prompt_embeds`.
            device: where the text encoder runs.
            num_images_per_prompt: how often each row is repeated.
            do_classifier_free_guidance: whether to make the negative ones too.
            negative_prompt: one for all, or one for each prompt; None is the empty one.
            prompt_embeds: hidden states `[prompts, 77, width]` instead of a prompt, with `pooled_prompt_embeds`.
            negative_prompt_embeds: hidden states instead of a negative prompt, with `negative_pooled_prompt_embeds`.
            pooled_prompt_embeds: pooled states `[prompts, image width]`.
            negative_pooled_prompt_embeds: pooled states `[prompts, image width]`.

        Returns:
            `prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds`, the negative
            ones None without guidance.

        Raises:
            TypeError: a prompt is no str.
            ValueError: a prompt and its states are both given, or neither; or numbers do not fit each other.
        """
        device = device or self._execution_device
        text = TextInputs(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
        )

        def encode(texts: list[str]) -> States:
            return encode_with_mclip(self.text_encoder, self.tokenizer, texts, device)

        return text.encoded(  # pyright: ignore[reportReturnType] (as many as there are names)
            encode, num_images_per_prompt, do_classifier_free_guidance, device, self._text_dtype
        )

    @property
    def _embeds_width(self) -> int:
        return self.unet.config.cross_attention_dim

    @torch.no_grad()
    @accepts(DecoderOptions, TextStates, stock=StockKandinskyPipeline)
    def __call__(
        self,
        prompt: Prompts | None = None,
        image_embeds: Embeds | None = None,
        negative_image_embeds: Embeds | None = None,
        negative_prompt: Prompts | None = None,
        **options: Unpack[DecoderOptions],
    ) -> Pictures:
        """Draw.

        Args:
            prompt: one or several; one for all image embeddings if there are more of these.
            image_embeds: `[prompts, width]` from the prior, or one row for each image.
            negative_image_embeds: of the unconditional half; not needed at a guidance scale of 1.
            negative_prompt: one for all, or one for each prompt; None is the empty one.
            options: [`DecoderOptions`]; and states of the text encoder instead of prompts, [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})
