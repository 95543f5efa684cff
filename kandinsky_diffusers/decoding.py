"""What the decoders of 2.1 and 2.2 share: from image embeddings to pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from . import sampling
from .images import OUTPUT_TYPES, latent_size, pad_to, pixels_from, pixels_to
from .inputs import (
    as_rows,
    check_at_most,
    check_choice,
    check_counts,
    check_generators,
    check_shape,
    count_images,
    expand,
)
from .schedulers import noise_to


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


class DecoderMixin:
    """Mixed in before a stock decoder pipeline; it works with the components `unet`, `scheduler` and `movq`."""

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the unconditional half is computed. At a scale of 1 it would vanish from u + g (c - u)."""
        return self._guidance_scale != 1.0

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
            return noise * self.scheduler.init_noise_sigma
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
        size = (size * self.movq_scale_factor for size in self._latent_size(pixels.shape[-2:]))
        padded = pad_to(pixels, *size).to(device, self.movq.dtype)
        return self.movq.encode(padded).latents.to(self.unet.dtype)

    def decode_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Pixels `[batch, 3, height, width]` around [-1, 1], cropped to the size asked for.

        (The published models draw in blocks of 64 pixels; the original crops as well, the stock pipelines do not.)
        """
        pixels = self.movq.decode(latents.to(self.movq.dtype), force_not_quantize=True).sample
        return pixels[..., :height, :width]

    def _latent_size(self, size: Sequence[int]) -> tuple[int, int]:
        return latent_size(size[0], size[1], self.movq_scale_factor)

    def _latent_shape(self, batch: Batch) -> tuple[int, int, int, int]:
        return (batch.images, self.movq.config.latent_channels, *self._latent_size(batch.size))

    def _is_latents(self, image: Any) -> bool:
        channels = self.movq.config.latent_channels
        return isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == channels != 3

    def _check_common(self, arguments: Mapping[str, Any], prompts: int) -> tuple[Batch, Conditions]:
        """What a call makes, after a check of all that decoders have in common; and the embeddings it needs.

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
        self._guidance_scale = float(arguments["guidance_scale"])
        names = ["image_embeds", "negative_image_embeds"] if self.do_classifier_free_guidance else ["image_embeds"]
        rows = {name: as_rows(arguments[name], name) for name in names}
        images = count_images(prompts, arguments["num_images_per_prompt"], len(rows["image_embeds"]))
        batch = Batch(prompts, images, (arguments["height"], arguments["width"]))
        for name, value in rows.items():
            batch.expand(value, name)
        check_generators(arguments["generator"], images)
        if arguments["latents"] is not None:
            check_shape(arguments["latents"], self._latent_shape(batch), "latents")
        return batch, rows

    def _on_step_end(self, arguments: Mapping[str, Any], conditions: Conditions) -> sampling.OnStepEnd | None:
        names = arguments["callback_on_step_end_tensor_inputs"]
        return sampling.step_end_callback(self, conditions, callback_for(arguments), names)

    def _embeds_for(self, batch: Batch, rows: Conditions, device: torch.device) -> Conditions:
        return {name: batch.expand(value.to(device, self.unet.dtype), name) for name, value in rows.items()}

    def _load_image(self, image: Any, batch: Batch) -> torch.Tensor:
        """Pixels of the input picture, or its latents where such are given, after a check that they fit the batch."""
        if self._is_latents(image):
            check_shape(image[:1], (1, *self._latent_shape(batch)[1:]), "image")
        else:
            image = pixels_from(image, *batch.size)
        batch.expand(image, "image")
        return image

    def _both(self, conditions: Conditions, name: str) -> torch.Tensor:
        """A condition for the network: the unconditional half first, where there is guidance."""
        if not self.do_classifier_free_guidance:
            return conditions[name]
        return torch.cat([conditions[f"negative_{name}"], conditions[name]])

    def _unet_input(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Scaled latents for each half; an inpainting UNet gets the known ones and the mask too, empty by default."""
        sample = self.scheduler.scale_model_input(latents, timestep)
        if self.unet.config.in_channels != latents.shape[1]:
            known, keep_mask = conditions.get("masked_latents"), conditions.get("keep_mask")
            if known is None or keep_mask is None:
                known, keep_mask = torch.zeros_like(sample), torch.zeros_like(sample[:, :1])
            sample = torch.cat([sample, known, keep_mask], dim=1)
        return torch.cat([sample] * 2) if self.do_classifier_free_guidance else sample

    def _combine(self, prediction: torch.Tensor, channels: int) -> torch.Tensor:
        if self.do_classifier_free_guidance:
            prediction = sampling.guide_keep_variance(prediction, self.guidance_scale, channels)
        learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        return prediction if learned else prediction[:, :channels]

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Conditions,
        generator: Any,
        on_step_end: sampling.OnStepEnd | None,
    ) -> torch.Tensor:
        """The loop. Of the generator and inpainting's known region the scheduler's `step` gets what it takes."""
        offered = {"generator": generator, **{k: conditions.get(k) for k in ("known_latents", "keep_mask")}}
        accepted = inspect.signature(self.scheduler.step).parameters
        step = partial(self.scheduler.step, **{k: v for k, v in offered.items() if k in accepted})
        self._num_timesteps = len(timesteps)
        return sampling.denoise(
            latents,
            self.progress_bar(timesteps),
            predict=lambda x, t: self.predict_noise(x, t, conditions),
            combine=lambda prediction: self._combine(prediction, latents.shape[1]),
            step=lambda prediction, t, x: step(prediction, t, x).prev_sample,
            on_step_end=on_step_end,
        )

    def _output(
        self, images: Any, output_type: str, return_dict: bool, crop: Any = None
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pixels (or latents, left alone) in the form asked for; a crop is put into the picture it comes from."""
        self.maybe_free_model_hooks()
        if output_type != "latent":
            images = pixels_to(images, output_type)
        if crop is not None:
            images = [crop.paste(image) for image in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)


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
    if not every or every < 1:
        raise ValueError(f"`callback_steps` is {every}; accepted is 1 or more.")

    def on_step_end(pipeline: Any, index: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        if index % every == 0:
            callback(index, timestep, tensors["latents"])
        return {}

    return on_step_end
