"""Kandinsky 3.0, 3.1 and Flash, text to image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Unpack

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3UNet as StockKandinsky3UNet
from diffusers.pipelines.kandinsky3 import Kandinsky3Pipeline as StockKandinsky3Pipeline
from diffusers.utils import logging
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, T5EncoderModel, T5Tokenizer

from .. import sampling
from ..decoding import Batch, Call, Conditions, DecoderMixin
from ..images import made_rgb
from ..inputs import check_shape
from ..movq import MoVQ, pixels_per_latent
from ..options import DrawingOptions, Pictures, Prompts, accepts
from ..pipeline_base import KandinskyPipelineMixin
from ..schedulers import Kandinsky3AncestralScheduler, Kandinsky3DDPMScheduler, Kandinsky3FlashScheduler
from .ip_adapter import EMBEDS, IPAdapterOptions, Kandinsky3IPAdapterMixin
from .regions import Regions, RegionsMixin
from .text import TextEncoder, TextInputs, TextStates, context_of, fitted, no_text, stock_context_of
from .unet import Kandinsky3UNet


logger = logging.get_logger(__name__)

Scheduler = DDPMScheduler | Kandinsky3DDPMScheduler | Kandinsky3AncestralScheduler | Kandinsky3FlashScheduler

STOCK_DEFAULTS = {"num_inference_steps": 25, "guidance_scale": 3.0}  # for repos that do not say
REGIONAL = ("regional_context", "regional_context_mask")
READ_BY_UNET = ("context", "context_mask", "context_lengths", *REGIONAL, EMBEDS)  # the same at every step
SIDE = 1024  # pixels, of a picture when no size is given


class Kandinsky3Options(IPAdapterOptions, DrawingOptions, total=False):
    """What the pipelines of 3.x take; None leaves it to the repo's scheduler, and to the input picture.

    Args:
        height: of the picture in pixels, any; 1024 for None.
        width: likewise.
        num_inference_steps: of the scheduler.
        guidance_scale: 0 draws without guidance.
        regions: prompts for parts of the picture: a list of (prompt, mask), white or 1 where the prompt counts, or of
            [`Region`]. Where they overlap the later one counts, where there is none the prompt of the call.
        regional_base_ratio: from 0 to 1, the share of the prompt of the call inside of regions.
    """

    height: Annotated[int | None, None]
    width: Annotated[int | None, None]
    num_inference_steps: Annotated[int | None, None]
    guidance_scale: Annotated[float | None, None]
    regions: Annotated[Regions | None, None]
    regional_base_ratio: Annotated[float, 0.0]


class Kandinsky3Pipeline(
    Kandinsky3IPAdapterMixin, RegionsMixin, DecoderMixin, KandinskyPipelineMixin, StockKandinsky3Pipeline
):
    """Text to image with Kandinsky 3.0, 3.1 or Flash; which one is a matter of its components.

    To change one part, subclass it and override `encode_prompt`, `prepare_latents`, `predict_noise` or
    `decode_latents`; image-to-image and inpainting are made of the same parts. In half precision the MoVQ stays in
    float32, in which it does not overflow; `pipe.movq.to(torch.float16)` insists.

    Args:
        tokenizer: of T5.
        text_encoder: the encoder of Flan-UL2; may be None where prompts come as states.
        unet: with a null embedding texts are handled as in the original, without it as in stock. It has 4 input
            channels; one with 9, made for inpainting, is given an empty mask. It may be None where only
            `encode_prompt` is used.
        scheduler: decides on the sampler, and on the default number of steps and guidance scale.
        movq: the image autoencoder.
        image_encoder: CLIP, for IP-Adapters; `load_ip_adapter` brings it, if need be.
        feature_extractor: makes the image encoder's pixel values; likewise.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->movq"
    _orders_of_use = ("text_encoder->unet->image_encoder->movq->controlnet->unet->movq",)
    _optional_components: ClassVar = ["image_encoder", "feature_extractor"]
    _callback_tensor_inputs = (
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "attention_mask",
        "negative_attention_mask",
    )
    _adopted_schedulers = ("scheduler",)
    _float32_components = ("movq",)
    _side = SIDE
    _reducing_gap = None
    _scale_without_guidance = 0.0
    _inpainting_inputs = ("mask_image", "masked_image")

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        unet: StockKandinsky3UNet | Kandinsky3UNet,
        scheduler: Scheduler,
        movq: VQModel | MoVQ,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=scheduler,
            movq=self._in_float32(movq),
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.movq_scale_factor = pixels_per_latent(movq)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.movq_scale_factor, resample="bicubic")
        self._guidance_scale = self._scale_without_guidance

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """States of the text encoder, before the projection, and masks; one row for each image.

        What it returns can be given to a call in the place of the prompts, when the text encoder is gone. How states
        are understood says [`k3.text.context_of`].

        Args:
            prompt: one or several; None with `prompt_embeds`.
            do_classifier_free_guidance: whether to make the negative ones too.
            num_images_per_prompt: how often each row is repeated.
            device: where the text encoder runs.
            negative_prompt: one for all, or one for each prompt; cut to the length of the prompt, as in the original.
                None is no text: the null embedding, or in a repo that has none what stock puts in its place.
            prompt_embeds: states `[prompts, tokens, width]` instead of a prompt, with `attention_mask`.
            negative_prompt_embeds: states instead of a negative prompt, with `negative_attention_mask`.
            attention_mask: `[prompts, tokens]`, 1 at tokens.
            negative_attention_mask: the same.

        Returns:
            `prompt_embeds, negative_prompt_embeds, attention_mask, negative_attention_mask`, the negative ones None
            without guidance.

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
            attention_mask,
            negative_attention_mask,
        )
        self._check_encoder(text)
        encoder = TextEncoder(self.tokenizer, self.text_encoder, device, self._has_null_embedding)
        batch = Batch(text.count, text.count * num_images_per_prompt, (0, 0))
        positive = _moved(prompt_embeds, attention_mask, device) or encoder.encode(text.prompts)
        states, mask = (batch.expand(rows, "prompt_embeds") for rows in positive)
        if not do_classifier_free_guidance:
            return states, None, mask, None
        negative = _moved(negative_prompt_embeds, negative_attention_mask, device)
        if negative is None and negative_prompt is None:
            negative = no_text(*positive, self._has_null_embedding)
        elif negative is None:
            negative = encoder.encode_negative(text.negatives, positive[1])
        negative_states, negative_mask = (
            batch.expand(fitted(rows, mask.shape[1]), "negative_prompt_embeds") for rows in negative
        )
        return states, negative_states.to(states), mask, negative_mask

    @property
    def _has_null_embedding(self) -> bool:
        """Of a pipeline that was loaded for its text encoder alone, what the UNet of its repo has."""
        if self.unet is not None:
            return self.unet.config.get("has_null_embedding", False)
        repo = self.config.get("_name_or_path")
        if repo is None:
            return True
        config: Any = Kandinsky3UNet.load_config(repo, subfolder="unet")
        return config.get("has_null_embedding", False)

    def _latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rounded up to what the UNet can halve at each of its levels but the last."""
        multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        side = self.movq_scale_factor * multiple
        return tuple(-(-pixels // side) * multiple for pixels in size)  # pyright: ignore

    def encode_pixels(self, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
        # as the original has them; norms of pictures whose channels lie side by side are less precise on the CPU
        return super().encode_pixels(pixels.contiguous(), device)

    def _load_image(self, image: Any, batch: Batch) -> torch.Tensor:
        """Pictures are made RGB before they are resized, as in the original; in those of 2.x it is after."""
        return super()._load_image(made_rgb(image), batch)

    def _check(self, arguments: Mapping[str, Any]) -> Call:
        arguments = self._with_defaults(arguments)
        text = TextInputs.of(arguments)
        self._check_text(text)
        call = replace(self._check_common(arguments, text.count), text=text)
        return self._with_regions(replace(call, image_prompts=self._check_image_prompts(call)))

    def _check_text(self, text: TextInputs) -> None:
        self._check_encoder(text)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            if (states := getattr(text, name)) is not None:
                check_shape(states, (*states.shape[:2], self.unet.config.encoder_hid_dim), name)

    def _check_encoder(self, text: TextInputs) -> None:
        if text.needs_encoder and (self.text_encoder is None or self.tokenizer is None):
            raise ValueError(
                "`prompt` or `negative_prompt` is given, and the pipeline has no text encoder; accepted are"
                " `prompt_embeds` and `attention_mask` (and the negative ones), as `encode_prompt` has made them."
            )

    def _with_defaults(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        config = self.scheduler.config
        defaults = {name: config.get(f"default_{name}", value) for name, value in STOCK_DEFAULTS.items()}
        defaults |= dict(zip(("height", "width"), self._default_size(arguments), strict=True))
        return {**arguments, **{name: value for name, value in defaults.items() if arguments[name] is None}}

    def _default_size(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        return SIDE, SIDE

    def _encode(self, call: Call, device: torch.device) -> Conditions:
        conditions = self._states_of(call.text, call.batch.images, device)
        conditions |= self._context(conditions, call.batch.images)
        return conditions | self._regional_conditions(call, device) | self._image_conditions(call, device)

    def _states_of(self, text: TextInputs, images: int, device: torch.device) -> Conditions:
        """States as the step-end callback sees them in stock: `prompt_embeds` and its mask have both halves."""
        states, negative_states, mask, negative_mask = self.encode_prompt(
            device=device,
            num_images_per_prompt=images // text.count,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            **vars(text),
        )
        conditions = {"prompt_embeds": states.to(self.unet.dtype), "attention_mask": mask}
        if negative_states is not None and negative_mask is not None:
            negative = {"prompt_embeds": negative_states.to(self.unet.dtype), "attention_mask": negative_mask}
            conditions = {name: torch.cat([negative[name], rows]) for name, rows in conditions.items()}
            conditions |= {f"negative_{name}": rows for name, rows in negative.items()}
        return conditions

    def _context(self, conditions: Conditions, images: int) -> Conditions:
        states, mask = conditions["prompt_embeds"], conditions["attention_mask"]
        if self._has_null_embedding:
            return context_of(self.unet, states, mask, images)
        if not getattr(self, "_told_of_missing_null_embedding", False):
            self._told_of_missing_null_embedding = True
            logger.warning(
                "This UNet has no null embedding, which the original draws with: texts are handled as in stock"
                " diffusers. A conversion of the original checkpoint has one."
            )
        return stock_context_of(states, mask, images)

    def _on_step_end(self, call: Call, conditions: Conditions, timesteps: torch.Tensor) -> sampling.OnStepEnd | None:
        then = super()._on_step_end(call, conditions, timesteps)
        if then is None:
            return None

        def on_step_end(index: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            texts = [conditions[name] for name in ("prompt_embeds", "attention_mask")]
            latents = then(index, timestep, latents)
            now = [conditions[name] for name in ("prompt_embeds", "attention_mask")]
            if any(new is not old for new, old in zip(now, texts, strict=True)):
                conditions.pop("context_lengths", None)
                conditions.update(self._context(conditions, len(latents)))
            return latents

        return on_step_end

    def _halves(self, latents: torch.Tensor, conditions: Conditions) -> int:
        return len(conditions["context"]) // len(latents)

    def predict_noise(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The noise that the UNet sees in `latents` at `timestep`.

        Args:
            latents: `[batch, 4, height, width]`.
            timestep: a training timestep.
            conditions: named tensors: `context`, `context_mask` and, if samples differ in it, `context_lengths`, with
                the unconditional half first where guidance is on (see [`k3.text.context_of`]); `masked_image` and
                `mask_image` (latents, 1 keeps) when inpainting; `ip_adapter_image_embeds` with an IP-Adapter.

        Returns:
            `[2 * batch or batch, 4, height, width]`.
        """
        sample = self._unet_input(latents, timestep, conditions)
        arguments = self._unet_arguments(sample, timestep, conditions)
        return self.unet(sample, timestep, return_dict=False, **arguments)[0]

    def _unet_arguments(self, sample: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> dict[str, Any]:
        """What the UNet is called with besides its input and the timestep."""
        cache = self._context_cache(self.unet, [*map(conditions.get, READ_BY_UNET), len(sample)])
        return {
            "encoder_hidden_states": conditions["context"],
            "encoder_attention_mask": conditions["context_mask"],
            "projected": self._has_null_embedding,
            "context_lengths": conditions.get("context_lengths"),
            "added_cond_kwargs": self._added_conditions(conditions, len(sample)),
            "regional_hidden_states": conditions.get("regional_context"),
            "regional_attention_mask": conditions.get("regional_context_mask"),
            "cache": cache,
        }

    def _combine(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if len(prediction) == len(latents):
            return prediction
        return sampling.guide_beyond_cond(prediction, self.guidance_scale)

    @torch.no_grad()
    @accepts(Kandinsky3Options, TextStates, stock=StockKandinsky3Pipeline)
    def __call__(
        self,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        **options: Unpack[Kandinsky3Options],
    ) -> Pictures:
        """Draw.

        Args:
            prompt: one or several.
            negative_prompt: one for all, or one for each prompt; see `encode_prompt`.
            options: [`Kandinsky3Options`]; and states of the text encoder instead of prompts, [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})


def _moved(
    states: torch.Tensor | None, mask: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if states is None or mask is None:
        return None
    return states.to(device), mask.to(device)
