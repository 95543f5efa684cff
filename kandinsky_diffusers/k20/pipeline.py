"""Kandinsky 2.0, text to image."""

from __future__ import annotations

from typing import Annotated, ClassVar, Unpack

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.kandinsky import MultilingualCLIP
from transformers import MT5EncoderModel, T5Tokenizer, XLMRobertaTokenizer

from .. import sampling
from ..decoding import Call, DecoderMixin
from ..mclip import States, TextConditionsMixin, encode_with_mclip
from ..movq import pixels_per_latent
from ..options import DecoderOptions, Pictures, Prompts, accepts
from ..pipeline_base import KandinskyPipelineMixin
from .text import TextInputs, TextStates, encode_with_mt5
from .unet import KandinskyV20UNet


class KandinskyV20Options(DecoderOptions, total=False):
    """What the pipelines of 2.0 take.

    Args:
        guidance_scale: 1 draws without guidance.
    """

    guidance_scale: Annotated[float, 7.0]


class KandinskyV20Pipeline(TextConditionsMixin, DecoderMixin, KandinskyPipelineMixin, DiffusionPipeline):
    """Text to image with Kandinsky 2.0.

    To change one part, subclass it and override `encode_prompt`, `prepare_latents`, `predict_noise` or
    `decode_latents`; image-to-image and inpainting are made of the same parts.

    Args:
        text_encoder: M-CLIP, the multilingual text encoder.
        tokenizer: of M-CLIP.
        text_encoder_2: the encoder of mT5.
        tokenizer_2: of mT5.
        unet: with 4 input channels; one with 9, made for inpainting, is given an empty mask.
        scheduler: DDIM as published; any diffusers scheduler for noise prediction works.
        vae: the image autoencoder.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _orders_of_use = ("text_encoder->text_encoder_2->vae->unet->vae",)
    _text_inputs = TextInputs
    _added_conditions: ClassVar = {"text_embeds": "pooled_prompt_embeds", "text_embeds_2": "prompt_embeds_2"}
    _callback_tensor_inputs = ("latents", *TextInputs.state_names())

    def __init__(
        self,
        text_encoder: MultilingualCLIP,
        tokenizer: XLMRobertaTokenizer,
        text_encoder_2: MT5EncoderModel,
        tokenizer_2: T5Tokenizer,
        unet: KandinskyV20UNet,
        scheduler: DDIMScheduler | DDPMScheduler,
        vae: AutoencoderKL,
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            vae=vae,
        )
        self.movq_scale_factor = self.vae_scale_factor = pixels_per_latent(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, resample="bicubic")
        self._guidance_scale = 1.0

    @property
    def _autoencoder(self) -> AutoencoderKL:
        return self.vae

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
        prompt_embeds_2: torch.Tensor | None = None,
        negative_prompt_embeds_2: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """States of both text encoders for the UNet, one row for each image.

        Args:
            prompt: one or several, in any language that the encoders know; None with `prompt_embeds`.
            device: where the text encoders run.
            num_images_per_prompt: how often each row is repeated.
            do_classifier_free_guidance: whether to make the negative ones too.
            negative_prompt: one for all, or one for each prompt; None is the empty one.
            prompt_embeds: hidden states `[prompts, 77, width]` of M-CLIP instead of a prompt, with
                `pooled_prompt_embeds` and `prompt_embeds_2`.
            negative_prompt_embeds: the same for the negative prompt, as all that are negative.
            pooled_prompt_embeds: pooled states `[prompts, image width]` of M-CLIP.
            negative_pooled_prompt_embeds: see `negative_prompt_embeds`.
            prompt_embeds_2: hidden states `[prompts, 77, width]` of mT5.
            negative_prompt_embeds_2: see `negative_prompt_embeds`.

        Returns:
            `prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds,
            prompt_embeds_2, negative_prompt_embeds_2`, the negative ones None without guidance.

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
            prompt_embeds_2,
            negative_prompt_embeds_2,
        )

        def encode(texts: list[str]) -> States:
            states = encode_with_mclip(self.text_encoder, self.tokenizer, texts, device)
            return *states, encode_with_mt5(self.text_encoder_2, self.tokenizer_2, texts, device)

        return text.encoded(encode, num_images_per_prompt, do_classifier_free_guidance, device, self._text_dtype)

    def encode_pixels(self, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Latents as for 2.1, here the mean of the posterior; image to image and inpainting draw a sample of it."""
        if self._is_latents(pixels):
            return super().encode_pixels(pixels, device)
        mean = self._encoded(pixels, device).latent_dist.mean
        return (mean * self.vae.config.scaling_factor).to(self.unet.dtype)

    def _image_latents(self, pixels: torch.Tensor, call: Call, device: torch.device) -> torch.Tensor:
        """A sample of the posterior, as in the original, drawn for each picture of the batch."""
        if self._is_latents(pixels):
            return super()._image_latents(pixels, call, device)
        posterior = self._encoded(pixels, device).latent_dist
        mean, std = (call.batch.expand(rows, "image") for rows in (posterior.mean, posterior.std))
        noise = sampling.draw_noise(mean.shape, call["generator"], device, mean.dtype)
        return ((mean + std * noise) * self.vae.config.scaling_factor).to(self.unet.dtype)

    def decode_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Pixels `[batch, 3, height, width]` around [-1, 1], cropped to the size asked for."""
        pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return pixels[..., :height, :width]

    @torch.no_grad()
    @accepts(KandinskyV20Options, TextStates)
    def __call__(
        self,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        **options: Unpack[KandinskyV20Options],
    ) -> Pictures:
        """Draw.

        Args:
            prompt: one or several.
            negative_prompt: one for all, or one for each prompt; None is the empty one.
            options: [`KandinskyV20Options`]; and states of the text encoders instead of prompts, [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})
