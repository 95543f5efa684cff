"""The pipeline from a prompt to an image embedding, which 2.1 and 2.2 share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Unpack

import PIL.Image
import torch
from diffusers import DiffusionPipeline, PriorTransformer, UnCLIPScheduler
from diffusers.pipelines.kandinsky.pipeline_kandinsky_prior import KandinskyPriorPipelineOutput
from diffusers.pipelines.kandinsky2_2 import KandinskyV22PriorPipeline as StockKandinskyV22PriorPipeline
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from . import sampling
from .inputs import (
    as_negatives,
    as_prompts,
    as_weights,
    check_at_least,
    check_at_most,
    check_beautifier,
    check_choice,
    check_counts,
    check_generators,
    check_shape,
)
from .lora import KandinskyLoraMixin
from .options import Generators, PriorOptions, Prompts, accepts
from .pipeline_base import KandinskyPipelineMixin
from .prior import CachedPriorTransformer, PriorPrefix, arguments_of, without_padding
from .prior_call import PriorCall, as_scale, check_mixable, texts_of
from .running import RunningCall, RunsCalls
from .schedulers import KandinskyUnCLIPScheduler
from .text import tokenize


CONDITIONS = ("prompt_embeds", "text_encoder_hidden_states", "text_mask")

Embedded = KandinskyPriorPipelineOutput | tuple[Any, Any]


class PriorPipeline(RunsCalls, KandinskyLoraMixin, KandinskyPipelineMixin, DiffusionPipeline):
    """Base of the prior pipelines.

    The part of the prior that does not depend on the step is computed once per call; `exact_reference(True)` switches
    that off. Override `encode_prompt`, `prepare_latents`, `predict_noise` or `decode_latents` to change one part.

    Args:
        prior: predicts the clean embedding.
        image_encoder: CLIP, for pictures in [`interpolate`] and for the embedding of no picture.
        text_encoder: CLIP.
        tokenizer: of the text encoder.
        scheduler: UnCLIP as published.
        image_processor: CLIP's.
    """

    model_cpu_offload_seq = "text_encoder->prior->image_encoder"
    _orders_of_use = (model_cpu_offload_seq, "text_encoder->prior")  # a negative prompt needs no image encoder
    _exclude_from_cpu_offload = ()
    _lora_loadable_modules: ClassVar = ["prior"]
    _callback_tensor_inputs = ("latents", *CONDITIONS)

    # In 2.1 `interpolate` guides the prior by `negative_prior_prompt`, as the original does. In 2.2 it makes, as stock
    # does, an embedding of it, which is the negative one where there is no `negative_prompt`.
    _embeds_negative_prior_prompt = False

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

    @property
    def guidance_scale(self) -> float | torch.Tensor:
        """The guidance scale of the running call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the unconditional half is computed: where the scale is not 1."""
        return bool(torch.as_tensor(self._guidance_scale != 1.0).any())

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running call."""
        return self._num_timesteps

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
        states = self._encode_texts(texts, device)
        if do_classifier_free_guidance:
            negatives = self._encode_texts(as_negatives(negative_prompt, len(texts)), device)
            states = [torch.cat(pair) for pair in zip(negatives, states, strict=True)]
        return tuple(state.repeat_interleave(num_images_per_prompt, dim=0) for state in states)  # pyright: ignore

    def _encode_texts(self, texts: list[str], device: torch.device) -> Sequence[torch.Tensor]:
        length = self.text_encoder.config.max_position_embeddings
        ids, mask = tokenize(self.tokenizer, [self._cleaned(text) for text in texts], length)
        encoded = self.text_encoder(ids.to(device))
        return encoded.text_embeds, encoded.last_hidden_state, mask.bool().to(device)

    def _cleaned(self, text: str) -> str:
        return text

    def prepare_latents(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators = None,
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
        known = {"prefix": prefix} if prefix is not None else arguments_of(conditions)
        return self.prior(latents, timestep=timestep, **known).predicted_image_embedding

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised embeddings as CLIP's image embeddings, by the statistics that the prior carries."""
        if isinstance(self.prior, CachedPriorTransformer):
            return self.prior(latents, post_process=True)
        return self.prior.post_process_latents(latents)

    @torch.no_grad()
    @accepts(PriorOptions, stock=StockKandinskyV22PriorPipeline)
    def __call__(self, prompt: Prompts, **options: Unpack[PriorOptions]) -> Embedded:
        """Image embeddings for prompts, and those of the decoder's unconditional half.

        Args:
            prompt: one or several, in English.
            options: [`PriorOptions`]; `latents` are `[embeddings, width]`, or twice as many rows with a negative
                prompt.

        Returns:
            `image_embeds` and `negative_image_embeds`, each `[embeddings, width]`.

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        call = self._check({**options, **locals()})
        self.scheduler.set_timesteps(call["num_inference_steps"])  # on the host, see `RunningCall`
        return self._embed(call, self.scheduler.timesteps, self._noise(call))

    def _check(self, arguments: Mapping[str, Any]) -> PriorCall:
        steps, images_per_prompt = arguments["num_inference_steps"], arguments["num_images_per_prompt"]
        check_counts(num_inference_steps=steps, num_images_per_prompt=images_per_prompt)
        check_at_most("num_inference_steps", steps, self.scheduler.config.num_train_timesteps)
        if type(self.scheduler) is UnCLIPScheduler:
            check_at_least("num_inference_steps", steps, 2)  # its formula for the timesteps divides by one less
        check_choice("output_type", arguments["output_type"], ("pt", "np", "latent"))
        for name in arguments["callback_on_step_end_tensor_inputs"]:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        check_beautifier(arguments["prompt_beautifier"], arguments["prompt"])
        prompts = as_prompts(arguments["prompt"])
        embeddings = len(prompts) * images_per_prompt
        check_generators(arguments["generator"], embeddings)
        scale = as_scale(arguments["guidance_scale"], embeddings)
        texts, unconditional = texts_of(prompts, arguments["negative_prompt"], arguments["negative_prior_prompt"])
        halves, latents = len(texts) // len(prompts), arguments["latents"]
        if latents is not None:
            latents = latents.repeat(halves, 1) if len(latents) == embeddings else latents
            check_shape(latents, (halves * embeddings, self.prior.config.embedding_dim), "latents")
        return PriorCall(arguments, texts, unconditional, embeddings, halves, scale, latents)

    def _noise(self, call: PriorCall) -> torch.Tensor:
        shape = (call.halves * call.embeddings, self.prior.config.embedding_dim)
        dtype, device = self.text_encoder.dtype, self._execution_device
        return self.prepare_latents(shape, dtype, device, call["generator"], call.latents)

    def _embed(self, call: PriorCall, timesteps: torch.Tensor, latents: torch.Tensor) -> Embedded:
        """Embeddings of the texts of a call, denoised from `latents`."""
        call = call.with_beautified_prompts()
        device = self._execution_device
        self._guidance_scale = call.scale
        guided, each = self.do_classifier_free_guidance, call["num_images_per_prompt"]
        encoded = self.encode_prompt(call.texts, device, each, guided, call.unconditional)
        conditions: dict[str, torch.Tensor] = dict(zip(CONDITIONS, encoded, strict=True))
        names = call["callback_on_step_end_tensor_inputs"]
        on_step_end = sampling.step_end_callback(self, conditions, call["callback_on_step_end"], names)
        if isinstance(call.scale, torch.Tensor):
            self._guidance_scale = call.scale.to(latents).repeat(call.halves)[:, None]
        latents = self._denoise(latents, timesteps, conditions, call["generator"], on_step_end)
        embeds = latents if call["output_type"] == "latent" else self.decode_latents(latents)
        if call.halves == 1:
            embeds = torch.cat([embeds, self.get_zero_embed(call.embeddings, device).to(embeds)])
        self.maybe_free_model_hooks()
        pair = embeds.chunk(2)
        if call["output_type"] == "np":
            pair = [rows.cpu().float().numpy() for rows in pair]
        return KandinskyPriorPipelineOutput(*pair) if call["return_dict"] else tuple(pair)  # pyright: ignore

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: dict[str, Any],
        generator: Any,
        on_step_end: sampling.OnStepEnd | None,
    ) -> torch.Tensor:
        self._num_timesteps = len(timesteps)
        following = iter([*timesteps[1:], None])
        # the original's DDIM derives the noise from the clamped prediction, which in diffusers is an option of DDIM
        offered = {"use_clipped_model_output": True}
        accepted = inspect.signature(self.scheduler.step).parameters
        options: dict[str, Any] = {name: value for name, value in offered.items() if name in accepted}

        def step(prediction: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
            if "prev_timestep" in accepted:
                options["prev_timestep"] = next(following)
            make = partial(self.scheduler.step, timestep=running.on_host(timestep), **options)
            if type(self.scheduler) is UnCLIPScheduler and isinstance(generator, list):
                return _step_each(make, prediction, sample, generator)
            if "generator" in accepted:
                make.keywords["generator"] = generator
            return make(prediction, sample=sample).prev_sample

        running = RunningCall(timesteps, latents.device, watched=on_step_end is not None)
        steps: Any = self.progress_bar(running.timesteps)  # pyright: ignore
        with self._as_running(running):
            return sampling.denoise(
                latents,
                steps,
                predict=lambda x, t: self.predict_noise(x, t, conditions, self._prefix(running, conditions)),
                combine=lambda prediction: self._combine(prediction, latents),
                step=step,
                on_step_end=on_step_end,
            )

    def _prefix(self, running: RunningCall, conditions: dict[str, torch.Tensor]) -> PriorPrefix | None:
        """What `predict_noise` may use instead of the conditions, None where there is no cache."""
        if self._exact_reference or not getattr(self.prior, "supports_prefix", False):
            return None

        def prefill() -> PriorPrefix:
            return self.prior(prefill=True, **without_padding(arguments_of(conditions)))

        return running.once(self.prior, list(conditions.values()), prefill)

    def _combine(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if len(prediction) == len(latents):
            return prediction
        return sampling.guide_from_uncond(prediction, self._guidance_scale)

    @torch.no_grad()
    def interpolate(
        self,
        images_and_prompts: Sequence[str | PIL.Image.Image | torch.Tensor],
        weights: Sequence[float] | Sequence[Sequence[float]],
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
            images_and_prompts: prompts, pictures, or pixel values `[1, 3, height, width]` as the image encoder takes
                them.
            weights: one for each; they need not sum to 1. A list of such lists makes a series.
            num_images_per_prompt: embeddings to make for each list of weights.
            num_inference_steps: for each prompt.
            generator: one, or one for each embedding.
            latents: noise to start each prompt from.
            negative_prior_prompt: as in [`__call__`].
            negative_prompt: as in [`__call__`]; the empty one gives the embedding of no picture.
            guidance_scale: of the prior.
            device: where the pictures are encoded.

        Returns:
            `image_embeds` and `negative_image_embeds`, each `[lists of weights * num_images_per_prompt, width]`.

        Raises:
            TypeError: an item is none of these.
            ValueError: there are not as many weights, or nothing to mix.
        """
        series = as_weights(weights, len(images_and_prompts))
        check_mixable(images_and_prompts)
        device = torch.device(device) if device is not None else self._execution_device
        embeds_negative = self._embeds_negative_prior_prompt
        from_text = partial(
            self._embed_text,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            generator=generator,
            latents=latents,
            guidance_scale=guidance_scale,
            **{"negative_prompt" if embeds_negative else "negative_prior_prompt": negative_prior_prompt},
        )
        embeds: Any = [
            from_text(item).image_embeds
            if isinstance(item, str)
            else self._encode_image(item, device).expand(num_images_per_prompt, -1)
            for item in images_and_prompts
        ]
        mixed = torch.cat(
            [torch.stack([e * w for e, w in zip(embeds, row, strict=True)]).sum(dim=0) for row in series]
        )
        if negative_prompt:
            negative = from_text(negative_prompt).image_embeds
        elif embeds_negative and (negative_prior_prompt is not None or self._exact_reference):
            negative = from_text("").negative_image_embeds  # also for the noise that stock takes from the generator
        else:
            negative = self.get_zero_embed(num_images_per_prompt, device)
        self.maybe_free_model_hooks()
        return KandinskyPriorPipelineOutput(mixed, negative.repeat(len(series), 1))

    def _embed_text(self, prompt: str, **options: Any) -> KandinskyPriorPipelineOutput:
        return self(prompt, **options)

    def _encode_image(self, image: PIL.Image.Image | torch.Tensor, device: torch.device) -> torch.Tensor:
        """CLIP's embedding of a picture, or of pixel values `[batch, 3, height, width]`."""
        if not isinstance(image, torch.Tensor):
            image = self._pixel_values(image)
        return self.image_encoder(image.to(device, self.image_encoder.dtype)).image_embeds

    def _pixel_values(self, image: PIL.Image.Image) -> torch.Tensor:
        return self.image_processor(image, return_tensors="pt").pixel_values


def _step_each(step: Any, prediction: torch.Tensor, sample: torch.Tensor, generators: list) -> torch.Tensor:
    """One step for the rows of each generator (see [`sampling.draw_noise`]): stock's scheduler takes one for all."""
    previous = torch.empty_like(sample)
    for index, generator in enumerate(generators):
        rows = slice(index, None, len(generators))
        previous[rows] = step(prediction[rows], sample=sample[rows], generator=generator).prev_sample
    return previous
