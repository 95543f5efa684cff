"""Kandinsky 2.1, the prior: from a prompt to the image embedding that the decoder draws from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline, PriorTransformer, UnCLIPScheduler
from diffusers.pipelines.kandinsky import KandinskyPriorPipeline as StockKandinskyPriorPipeline
from diffusers.pipelines.kandinsky.pipeline_kandinsky_prior import KandinskyPriorPipelineOutput
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from .. import sampling
from ..images import center_crop
from ..inputs import as_negatives, as_prompts, check_at_most, check_choice, check_counts, check_generators, check_shape
from ..pipeline_base import KandinskyPipelineMixin
from ..prior import CachedPriorTransformer
from ..schedulers import KandinskyUnCLIPScheduler
from ..text import clean_text, tokenize


CONDITIONS = ("prompt_embeds", "text_encoder_hidden_states", "text_mask")


class KandinskyPriorPipeline(KandinskyPipelineMixin, StockKandinskyPriorPipeline):
    """Text to image embedding with Kandinsky 2.1.

    The part of the prior that does not depend on the step is computed once per call; `exact_reference(True)` switches
    that off.

    Args:
        prior: predicts the clean embedding.
        image_encoder: CLIP, for pictures in [`interpolate`] and for the embedding of no picture.
        text_encoder: CLIP.
        tokenizer: of the text encoder.
        scheduler: UnCLIP as published; its float64 version is taken on.
        image_processor: CLIP's.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->prior"
    _exclude_from_cpu_offload = ()
    _callback_tensor_inputs = ("latents", *CONDITIONS)

    def __init__(
        self,
        prior: PriorTransformer | CachedPriorTransformer,
        image_encoder: CLIPVisionModelWithProjection,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        scheduler: UnCLIPScheduler | KandinskyUnCLIPScheduler,
        image_processor: CLIPImageProcessor,
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(
            prior=prior,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            image_processor=image_processor,
        )

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the prior knows of the prompts; with guidance the rows of the negative prompts come first.

        Args:
            prompt: one or several, in English.
            device: where the text encoder runs.
            num_images_per_prompt: how often each row is repeated.
            do_classifier_free_guidance: whether to make rows for the negative prompts too.
            negative_prompt: one for all, or one for each prompt; None is the empty one.

        Returns:
            pooled states `[rows, width]`, hidden states `[rows, 77, width]`, and a mask `[rows, 77]`, True at tokens.

        Raises:
            TypeError, ValueError: a prompt is no str, or their numbers do not fit.
        """
        device = device or self._execution_device
        texts = as_prompts(prompt)
        if do_classifier_free_guidance:
            texts = as_negatives(negative_prompt, len(texts)) + texts
        length = self.text_encoder.config.max_position_embeddings
        ids, mask = tokenize(self.tokenizer, [clean_text(text) for text in texts], length)
        encoded = self.text_encoder(ids.to(device))
        states = (encoded.text_embeds, encoded.last_hidden_state, mask.bool().to(device))
        return tuple(state.repeat_interleave(num_images_per_prompt, dim=0) for state in states)  # pyright: ignore

    def prepare_latents(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise `[embeddings, width]` to start from; `latents` are used instead where given.

        Raises:
            ValueError: `latents` has another shape.
        """
        if latents is None:
            latents = sampling.draw_noise(shape, generator, device, dtype)
        check_shape(latents, shape, "latents")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def predict_noise(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor], prefix: Any = None
    ) -> torch.Tensor:
        """The clean embeddings that the prior predicts, `[rows, width]`, those of the negative prompts first.

        Args:
            latents: `[embeddings, width]`.
            timestep: a training timestep.
            conditions: what [`encode_prompt`] returned, by the names of the callback's tensors.
            prefix: what the prior already knows of them, or None.
        """
        rows = len(conditions["prompt_embeds"])
        latents = torch.cat([latents] * (rows // len(latents)))
        known = {"prefix": prefix} if prefix is not None else _for_prior(conditions)
        return self.prior(latents, timestep=timestep, **known).predicted_image_embedding

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised embeddings as CLIP's image embeddings, by the statistics that the prior carries."""
        if isinstance(self.prior, CachedPriorTransformer):
            return self.prior(latents, post_process=True)
        return self.prior.post_process_latents(latents)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        guidance_scale: float | Sequence[float] = 4.0,
        output_type: str = "pt",
        return_dict: bool = True,
        negative_prior_prompt: str | list[str] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> KandinskyPriorPipelineOutput | tuple[Any, Any]:
        """Image embeddings for prompts, and those of the decoder's unconditional half.

        Args:
            prompt: one or several, in English.
            negative_prompt: one for all, or one for each. The negative embeddings are then what the prior makes of it,
                and it takes the place of the empty prompt in the prior's own guidance. Without it the negative
                embeddings are those of no picture.
            num_images_per_prompt: embeddings for each prompt.
            num_inference_steps: of the scheduler.
            generator: one, or one for each embedding of a prompt.
            latents: noise to start from, `[embeddings, width]`, or twice as many rows with a negative prompt.
            guidance_scale: of the prior; one for all, or one for each embedding. 1 is without guidance.
            output_type: `"pt"` or `"np"`.
            return_dict: return a tuple if False.
            negative_prior_prompt: the prompt of the prior's own unconditional half only, as in the original.
            callback_on_step_end: called after each step with the pipeline, the step's index, the timestep and a dict
                of tensors; what it returns in a dict replaces them.
            callback_on_step_end_tensor_inputs: names of the tensors it gets.

        Returns:
            `image_embeds` and `negative_image_embeds`, each `[embeddings, width]`.

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        check_counts(num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
        check_at_most("num_inference_steps", num_inference_steps, self.scheduler.config.num_train_timesteps)
        check_choice("output_type", output_type, ("pt", "np"))
        for name in callback_on_step_end_tensor_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        prompts = as_prompts(prompt)
        embeddings = len(prompts) * num_images_per_prompt
        check_generators(generator, embeddings)
        scale = _scale(guidance_scale, embeddings)
        texts, unconditional = _texts(prompts, negative_prompt, negative_prior_prompt)
        halves = len(texts) // len(prompts)
        shape = (halves * embeddings, self.prior.config.embedding_dim)
        if latents is not None:
            latents = latents.repeat(halves, 1) if len(latents) == embeddings else latents
            check_shape(latents, shape, "latents")

        device = self._execution_device
        guided = bool(torch.as_tensor(scale != 1.0).any())
        encoded = self.encode_prompt(texts, device, num_images_per_prompt, guided, unconditional)
        conditions: dict[str, torch.Tensor] = dict(zip(CONDITIONS, encoded, strict=True))
        zero_embeds = self.get_zero_embed(embeddings, device) if halves == 1 else None
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self.prepare_latents(shape, encoded[0].dtype, device, generator, latents)
        on_step_end = sampling.step_end_callback(
            self, conditions, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        if isinstance(scale, torch.Tensor):
            scale = scale.to(latents).repeat(halves)[:, None]
        latents = self._denoise(latents, conditions, scale if guided else None, generator, on_step_end)
        embeds = self.decode_latents(latents)
        self.maybe_free_model_hooks()

        image_embeds, negative_image_embeds = embeds.chunk(2) if zero_embeds is None else (embeds, zero_embeds)
        if output_type == "np":
            image_embeds, negative_image_embeds = (
                rows.cpu().float().numpy() for rows in (image_embeds, negative_image_embeds)
            )
        if not return_dict:
            return image_embeds, negative_image_embeds
        return KandinskyPriorPipelineOutput(image_embeds, negative_image_embeds)

    def _denoise(
        self,
        latents: torch.Tensor,
        conditions: dict[str, Any],
        scale: float | torch.Tensor | None,
        generator: Any,
        on_step_end: sampling.OnStepEnd | None,
    ) -> torch.Tensor:
        # the original's DDIM derives the noise from the clamped prediction, which in diffusers is an option of DDIM
        offered = {"generator": generator, "use_clipped_model_output": True}
        accepted = inspect.signature(self.scheduler.step).parameters
        step = partial(self.scheduler.step, **{k: v for k, v in offered.items() if k in accepted})
        prefix = _Prefix(self.prior, enabled=not self._exact_reference)
        timesteps: Any = self.progress_bar(self.scheduler.timesteps)
        return sampling.denoise(
            latents,
            timesteps,
            predict=lambda x, t: self.predict_noise(x, t, conditions, prefix.of(conditions)),
            combine=lambda prediction: prediction if scale is None else sampling.guide_from_uncond(prediction, scale),
            step=lambda prediction, t, x: step(prediction, t, x).prev_sample,
            on_step_end=on_step_end,
        )

    @torch.no_grad()
    def interpolate(
        self,
        images_and_prompts: Sequence[str | PIL.Image.Image | torch.Tensor],
        weights: Sequence[float],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        negative_prior_prompt: str | None = None,
        negative_prompt: str = "",
        guidance_scale: float = 4.0,
        device: torch.device | str | None = None,
    ) -> KandinskyPriorPipelineOutput:
        """The weighted sum of embeddings of prompts and pictures (`mix_images` of the original).

        Args:
            images_and_prompts: prompts, pictures, or pixel values `[batch, 3, height, width]` as the image encoder
                takes them.
            weights: one for each; they need not sum to 1.
            num_images_per_prompt: embeddings to make.
            num_inference_steps: for each prompt.
            generator: one, or one for each embedding.
            latents: noise to start each prompt from.
            negative_prior_prompt: as in [`__call__`].
            negative_prompt: as in [`__call__`]; the empty one gives the embedding of no picture.
            guidance_scale: of the prior.
            device: where the pictures are encoded.

        Raises:
            TypeError: an item is none of these.
            ValueError: there are not as many weights, or nothing to mix.
        """
        if len(images_and_prompts) != len(weights) or not len(weights):
            raise ValueError(
                f"`weights` has {len(weights)} items; accepted is one for each of {len(images_and_prompts)} in"
                " `images_and_prompts`, at least one."
            )
        for item in images_and_prompts:
            if not isinstance(item, (str, PIL.Image.Image, torch.Tensor)):
                raise TypeError(
                    f"`images_and_prompts` has a {type(item).__name__}; accepted are str, PIL pictures and tensors."
                )
        device = torch.device(device) if device is not None else self._execution_device
        from_text = partial(
            self,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            generator=generator,
            latents=latents,
            negative_prior_prompt=negative_prior_prompt,
            guidance_scale=guidance_scale,
        )
        mixed = sum(
            weight * (from_text(item).image_embeds if isinstance(item, str) else self._encode_image(item, device))
            for item, weight in zip(images_and_prompts, weights, strict=True)
        )
        mixed = mixed.expand(num_images_per_prompt, -1)
        if negative_prompt:
            return KandinskyPriorPipelineOutput(mixed, from_text(negative_prompt).image_embeds)
        zero_embeds = self.get_zero_embed(num_images_per_prompt, device)
        self.maybe_free_model_hooks()
        return KandinskyPriorPipelineOutput(mixed, zero_embeds)

    def _encode_image(self, image: PIL.Image.Image | torch.Tensor, device: torch.device) -> torch.Tensor:
        if isinstance(image, PIL.Image.Image):
            processed = self.image_processor(image, do_center_crop=False, return_tensors="pt")
            image = center_crop(processed.pixel_values, self.image_processor.crop_size)
        return self.image_encoder(image.to(device, self.image_encoder.dtype)).image_embeds


class _Prefix:
    """The prior's cache of one call, made anew when a callback has replaced a condition."""

    def __init__(self, prior: Any, enabled: bool):
        self._prior = prior if enabled and getattr(prior, "supports_prefix", False) else None
        self._made_of: list[torch.Tensor] = []
        self._prefix: Any = None

    def of(self, conditions: dict[str, torch.Tensor]) -> Any:
        """What `predict_noise` may use instead of the conditions, None where there is no cache."""
        if self._prior is None:
            return None
        tensors = list(conditions.values())
        if [id(tensor) for tensor in tensors] != [id(tensor) for tensor in self._made_of]:
            self._made_of = tensors
            self._prefix = self._prior(prefill=True, **_for_prior(conditions))
        return self._prefix


def _for_prior(conditions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "proj_embedding": conditions["prompt_embeds"],
        "encoder_hidden_states": conditions["text_encoder_hidden_states"],
        "attention_mask": conditions["text_mask"],
    }


def _texts(prompts: list[str], negative: Any, negative_prior: Any) -> tuple[list[str], list[str]]:
    """The texts that the prior turns into embeddings, and those of its unconditional half."""
    unconditional = as_negatives(negative_prior, len(prompts), "negative_prior_prompt")
    if negative is None:
        return prompts, unconditional
    negatives = as_negatives(negative, len(prompts))
    if negative_prior is None:
        unconditional = negatives
    return prompts + negatives, unconditional * 2


def _scale(guidance_scale: float | Sequence[float], embeddings: int) -> float | torch.Tensor:
    if isinstance(guidance_scale, (int, float)):
        return float(guidance_scale)
    scale = torch.as_tensor(guidance_scale)
    if scale.shape != (embeddings,):
        raise ValueError(
            f"`guidance_scale` has the shape {list(scale.shape)}; accepted is one number or {embeddings}."
        )
    return scale
