"""What all pipelines that draw share: from conditions to pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from . import sampling
from .attention import keeps_layout
from .images import OUTPUT_TYPES, latent_size, pad_to, pixels_from, pixels_to
from .inputs import (
    as_prompts,
    as_rows,
    beautified,
    check_at_most,
    check_beautifier,
    check_choice,
    check_counts,
    check_generators,
    check_shape,
    check_strength,
    count_images,
    expand,
)
from .lora import KandinskyLoraMixin
from .options import Pictures
from .running import RunningCall, RunsCalls
from .schedulers import noise_to, start_at


Conditions = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """How many pictures a call makes, and of what size.

    Args:
        prompts: number of prompts.
        images: number of pictures, a multiple of `prompts`; those of one prompt follow each other.
        size: height and width in pixels.
    """

    prompts: int
    images: int
    size: tuple[int, int]

    @property
    def images_per_prompt(self) -> int:
        """Pictures for each prompt."""
        return self.images // self.prompts

    def expand(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """One row for each picture, see [`inputs.expand`]."""
        return expand(rows, self.prompts, self.images, name)


@dataclass(frozen=True)
class Call:
    """One call of a pipeline, checked.

    Args:
        arguments: of `__call__`, by their names; `call[name]` is one of them.
        batch: how many pictures, and of what size.
        embeds: image embeddings as given, for the decoders of 2.1 and 2.2.
        text: prompts and negative prompts, for the pipelines that take any.
        source: pixels, or what is known of them, where a picture is given.
        hint: a depth map or control image `[1 or prompts or pictures, 3, height, width]`, where one is taken.
        image_prompts: what IP-Adapters are shown, where any are loaded.
        regions: prompts for parts of the picture, for the pipelines that take any.
    """

    arguments: Mapping[str, Any]
    batch: Batch
    embeds: Conditions
    text: Any = None
    source: Any = None
    hint: torch.Tensor | None = None
    image_prompts: Any = None
    regions: Sequence[Any] = ()

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def with_beautified_prompts(self) -> Call:
        """The same call with better prompts, if it has a `prompt_beautifier`."""
        beautifier = self.arguments.get("prompt_beautifier")
        if beautifier is None:
            return self
        return replace(self, text=replace(self.text, prompt=beautified(as_prompts(self.text.prompt), beautifier)))


class DecoderMixin(RunsCalls, KandinskyLoraMixin):
    """Mixed in before a stock pipeline; it works with the components `unet`, `scheduler` and an autoencoder.

    A pipeline's `__call__` hands its arguments to `_generate`. A family defines what to check and to encode, a task
    ([`Img2ImgMixin`], [`InpaintMixin`]) where to start.
    """

    _image_by_unit_range = False  # see `images.pixels_from`
    _reducing_gap: float | None = 1.0  # likewise
    _scale_without_guidance = 1.0  # u + g (c - u) is c there
    _inpainting_inputs = ("masked_image", "mask_image")  # after the latents, in the order in which the UNet has them

    @property
    def _embeds_width(self) -> int | None:
        """Width of the image embeddings; None for a pipeline without them."""
        return None

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the unconditional half is computed: at all scales but the one at which it vanishes."""
        return self._guidance_scale != self._scale_without_guidance

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running call."""
        return self._num_timesteps

    def prepare_latents(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image_latents: torch.Tensor | None = None,
        noise_timestep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The latents to start from: noise, or a noised picture.

        Args:
            shape: `[pictures, channels, height, width]`.
            dtype: of the latents.
            device: of the latents.
            generator: for the noise.
            latents: standard normal noise to use instead.
            image_latents: clean latents of a picture, shaped like `shape`.
            noise_timestep: to which the picture is noised; None leaves it clean.

        Raises:
            ValueError: `latents` has another shape.
        """
        if latents is not None:
            check_shape(latents, shape, "latents")
        if image_latents is not None and noise_timestep is None:
            return image_latents
        noise = sampling.draw_noise(shape, generator, device, dtype) if latents is None else latents.to(device, dtype)
        if image_latents is None or noise_timestep is None:
            start = noise * self.scheduler.init_noise_sigma
            begin = getattr(self.scheduler, "noised_start", None)  # Flash's
            return start if begin is None else begin(start, generator)
        return noise_to(self.scheduler, image_latents, noise, noise_timestep)

    def encode_pixels(self, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Latents `[batch, channels, height, width]` of pictures.

        Args:
            pixels: `[batch, 3, height, width]` in [-1, 1], padded to whole latents by repeating the border; or latents
                already, told by their number of channels.
            device: where the MoVQ runs.
        """
        if self._is_latents(pixels):
            return pixels.to(device, self.unet.dtype)
        return self._encoded(pixels, device).latents.to(self.unet.dtype)

    def _encoded(self, pixels: torch.Tensor, device: torch.device) -> Any:
        """What the autoencoder says of padded pictures."""
        size = (size * self.movq_scale_factor for size in self._latent_size(pixels.shape[-2:]))
        return self._autoencoder.encode(pad_to(pixels, *size).to(device, self._autoencoder.dtype))

    def _image_latents(self, pixels: torch.Tensor, call: Call, device: torch.device) -> torch.Tensor:
        """Latents of pictures, or such latents, one for each picture of the batch."""
        latents = self.encode_pixels(pixels, device)
        # left as they lie in memory where they can be: last bits depend on it
        return latents if len(latents) == call.batch.images else call.batch.expand(latents, "image")

    def decode_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Pixels `[batch, 3, height, width]` around [-1, 1], cropped to the size asked for.

        (The published models draw in blocks of 64 pixels; the original crops as well, the stock pipelines do not.)
        """
        latents = latents.to(self.movq.dtype)
        pixels = self.movq.decode(latents, force_not_quantize=True, **self._decoding).sample
        return pixels[..., :height, :width]

    def _latent_size(self, size: Sequence[int]) -> tuple[int, int]:
        return latent_size(size[0], size[1], self.movq_scale_factor)

    def _latent_shape(self, batch: Batch) -> tuple[int, int, int, int]:
        return (batch.images, self._autoencoder.config.latent_channels, *self._latent_size(batch.size))

    def _is_latents(self, image: Any) -> bool:
        channels = self._autoencoder.config.latent_channels
        return isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == channels != 3

    def _generate(self, arguments: Mapping[str, Any]) -> Pictures:
        """Pictures for the arguments of `__call__`; nothing runs before all of them are checked."""
        call, timesteps, noise_timestep = self._plan(arguments)
        device = self._execution_device
        call = call.with_beautified_prompts()
        conditions = self._encode(call, device)
        latents = self._start(call, conditions, noise_timestep, device)
        on_step_end = self._on_step_end(call, conditions, timesteps)
        latents = self._denoise(latents, timesteps, conditions, call, on_step_end)
        images = self._finish(call, latents)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if call["return_dict"] else (images,)

    def _plan(self, arguments: Mapping[str, Any]) -> tuple[Call, torch.Tensor, torch.Tensor | None]:
        """The call, checked, and what [`_timesteps`] says; no model runs."""
        call = self._check(arguments)
        self.scheduler.set_timesteps(call["num_inference_steps"])  # on the host, see `RunningCall`
        return call, *self._timesteps(call)

    def _check_common(self, arguments: Mapping[str, Any], prompts: int) -> Call:
        """What all decoders check, and what follows from it.

        Args:
            arguments: of `__call__`, by their names.
            prompts: how many there are.
        """
        counts = ("height", "width", "num_inference_steps", "num_images_per_prompt")
        check_counts(**{name: arguments[name] for name in counts})
        limit = self.scheduler.config.num_train_timesteps
        check_at_most("num_inference_steps", arguments["num_inference_steps"], limit)
        check_choice("output_type", arguments["output_type"], OUTPUT_TYPES)
        for name in arguments["callback_on_step_end_tensor_inputs"]:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        callback_for(arguments)
        check_beautifier(arguments.get("prompt_beautifier"), arguments.get("prompt"))
        self._guidance_scale = float(arguments["guidance_scale"])
        embeds = self._check_embeds(arguments)
        rows = len(embeds["image_embeds"]) if embeds else prompts
        images = count_images(prompts, arguments["num_images_per_prompt"], rows)
        batch = Batch(prompts, images, (arguments["height"], arguments["width"]))
        for name, rows in embeds.items():
            batch.expand(rows, name)
        check_generators(arguments["generator"], images)
        if arguments["latents"] is not None:
            check_shape(arguments["latents"], self._latent_shape(batch), "latents")
        return Call(arguments, batch, embeds)

    def _check_embeds(self, arguments: Mapping[str, Any]) -> Conditions:
        if self._embeds_width is None:
            return {}
        names = ["image_embeds", "negative_image_embeds"] if self.do_classifier_free_guidance else ["image_embeds"]
        return {name: as_rows(arguments[name], self._embeds_width, name) for name in names}

    def _timesteps(self, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The timesteps to walk down, and the one to which a picture is noised before."""
        return self.scheduler.timesteps, None

    def _start(
        self, call: Call, conditions: Conditions, noise_timestep: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        shape, dtype = self._latent_shape(call.batch), self.unet.dtype
        return self.prepare_latents(shape, dtype, device, call["generator"], call["latents"])

    def _on_step_end(self, call: Call, conditions: Conditions, timesteps: torch.Tensor) -> sampling.OnStepEnd | None:
        names = call["callback_on_step_end_tensor_inputs"]
        return sampling.step_end_callback(self, conditions, callback_for(call.arguments), names)

    def _finish(self, call: Call, latents: torch.Tensor) -> Any:
        """Pictures, or the latents left alone, in the form asked for."""
        if call["output_type"] == "latent":
            return latents
        return pixels_to(self.decode_latents(latents, *call.batch.size), call["output_type"])

    def _embeds_for(self, call: Call, device: torch.device) -> Conditions:
        dtype = self.unet.dtype
        return {name: call.batch.expand(rows.to(device, dtype), name) for name, rows in call.embeds.items()}

    def _load_image(self, image: Any, batch: Batch) -> torch.Tensor:
        """Pixels of the input picture, or its latents where such are given, after a check that they fit the batch."""
        if self._is_latents(image):
            check_shape(image[:1], (1, *self._latent_shape(batch)[1:]), "image")
        else:
            loading = {"by_unit_range": self._image_by_unit_range, "reducing_gap": self._reducing_gap}
            image = pixels_from(image, *batch.size, **loading)
        batch.expand(image, "image")
        return image

    def _halves(self, latents: torch.Tensor, conditions: Conditions) -> int:
        """2 where the network runs with and without the conditions, for guidance."""
        return 2 if self.do_classifier_free_guidance else 1

    @property
    def _unet_sees_known(self) -> bool:
        """Whether the UNet, one for inpainting, takes latents of a picture and a mask after the noisy latents."""
        return self.unet.config.in_channels == 2 * self._autoencoder.config.latent_channels + 1

    def _unet_input(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Scaled latents for each half; an inpainting UNet gets the known ones and the mask too, empty by default."""
        scaled = self.scheduler.scale_model_input(latents, self._on_host(timestep))
        sample = torch.cat([scaled] * self._halves(latents, conditions))
        if self._unet_sees_known:
            empty = {"masked_image": torch.zeros_like(latents), "mask_image": torch.zeros_like(latents[:, :1])}
            shown = [conditions.get(name, empty[name]) for name in self._inpainting_inputs]
            shown = [_repeated(part[-len(sample) :], len(sample)) for part in shown]
            sample = torch.cat([sample, *shown], dim=1)
        return sample

    def _attention_arguments(self, sample: torch.Tensor) -> dict[str, Any] | None:
        """What the UNet of 2.x hands on to its attention, for an input like `sample`."""
        if self._exact_reference or sample.device.type != "cpu" or not keeps_layout(self.unet):
            return None  # other processors would warn, and on other devices nothing has been measured
        return {"keeps_layout": True}

    def _combine(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Guidance; a predicted variance is kept where the scheduler uses one, and is left out of everything else."""
        channels = latents.shape[1]
        learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        prediction = prediction if learned else prediction[:, :channels]
        if len(prediction) == len(latents):
            return prediction
        if prediction.shape[1] == channels:
            return sampling.guide_from_uncond(prediction, self.guidance_scale)
        return sampling.guide_keep_variance(prediction, self.guidance_scale, channels)

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Conditions,
        call: Call,
        on_step_end: sampling.OnStepEnd | None,
    ) -> torch.Tensor:
        """The loop. Of the generator and inpainting's known region the scheduler's `step` gets what it takes."""
        offered = {"generator": call["generator"], **{k: conditions.get(k) for k in ("known_latents", "keep_mask")}}
        accepted = inspect.signature(self.scheduler.step).parameters
        step = partial(self.scheduler.step, **{k: v for k, v in offered.items() if k in accepted})
        self._num_timesteps = len(timesteps)
        running = RunningCall(timesteps, latents.device, watched=callback_for(call.arguments) is not None)
        with self._as_running(running):
            return sampling.denoise(
                latents,
                self.progress_bar(running.timesteps),
                predict=lambda x, t: self.predict_noise(x, t, conditions),
                combine=lambda prediction: self._combine(prediction, latents),
                step=lambda prediction, t, x: step(prediction, running.on_host(t), x).prev_sample,
                on_step_end=on_step_end,
            )


class Img2ImgMixin:
    """Mixed in before a family's text-to-image pipeline: the start is a picture, noised as far as `strength` says."""

    def _check(self, arguments: Mapping[str, Any]) -> Call:
        call = super()._check(arguments)
        check_strength(call["strength"])
        return replace(call, source=self._load_image(call["image"], call.batch))

    def _timesteps(self, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        return start_at(self.scheduler, call["strength"])

    def _start(
        self, call: Call, conditions: Conditions, noise_timestep: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        image_latents = self._image_latents(call.source, call, device).contiguous()  # as in stock, to the last bit
        return self.prepare_latents(
            self._latent_shape(call.batch),
            self.unet.dtype,
            device,
            call["generator"],
            call["latents"],
            image_latents,
            noise_timestep,
        )


def _repeated(rows: torch.Tensor, count: int) -> torch.Tensor:
    return rows.repeat(count // len(rows), 1, 1, 1)


def callback_for(arguments: Mapping[str, Any]) -> Callable[..., dict] | None:
    """The step-end callback among the arguments of a call; it may be of the older form `(index, timestep, latents)`.

    Raises:
        ValueError: both forms are given, or `callback_steps` is no positive number.
    """
    callback, every = arguments["callback"], arguments["callback_steps"]
    if callback is None:
        return arguments["callback_on_step_end"]
    if arguments["callback_on_step_end"] is not None:
        raise ValueError("`callback` and `callback_on_step_end` are both given; accepted is one of them.")
    if every is not None and every < 1:
        raise ValueError(f"`callback_steps` is {every}; accepted is 1 or more.")

    def on_step_end(pipeline: Any, index: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        if index % (every or 1) == 0:
            callback(index, timestep, tensors["latents"])
        return {}

    return on_step_end
