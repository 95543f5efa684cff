"""Kandinsky 3.0, 3.1 and Flash with a ControlNet, for text to image, image to image and inpainting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, TypedDict, Unpack

import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3UNet as StockKandinsky3UNet
from diffusers.utils.torch_utils import unwrap_module
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, T5EncoderModel, T5Tokenizer

from .. import sampling
from ..decoding import Call, Conditions
from ..images import Images, hint_size, hints_from, pad_to, scales_from
from ..movq import MoVQ
from ..options import Pictures, Prompts, accepts
from .controlnet import Kandinsky3ControlNetModel
from .pipeline import Kandinsky3Options, Kandinsky3Pipeline, Scheduler
from .pipeline_img2img import Kandinsky3Img2ImgOptions, Kandinsky3Img2ImgPipeline
from .pipeline_inpaint import Kandinsky3InpaintOptions, Kandinsky3InpaintPipeline
from .text import TextStates
from .unet import Kandinsky3UNet


SCALE = "controlnet_conditioning_scale"
READ_BY_CONTROLNET = ("control_context", "context", "context_mask", "context_lengths", "control_image")


class ControlNetOptions(TypedDict, total=False):
    """What the pipelines with a ControlNet take besides.

    Args:
        controlnet_conditioning_scale: how strongly the control image acts, 0 not at all: a number, or a map of the
            picture (see [`images.scales_from`]); one for all, or one for each.
        control_guidance_start: share of the steps after which the control begins.
        control_guidance_end: share of the steps after which it ends. Of n steps counted from 0, those from
            `int(n * start)` to `int(n * end)`, both included, are controlled.
    """

    controlnet_conditioning_scale: Annotated[float | Sequence[float] | Images, 1.0]
    control_guidance_start: Annotated[float, 0.0]
    control_guidance_end: Annotated[float, 1.0]


class Kandinsky3ControlNetOptions(ControlNetOptions, Kandinsky3Options, total=False):
    """What text-to-image with a ControlNet takes; `height` and `width` are those of the control image by default."""


class Kandinsky3ControlNetImg2ImgOptions(ControlNetOptions, Kandinsky3Img2ImgOptions, total=False):
    """What image-to-image with a ControlNet takes."""


class Kandinsky3ControlNetInpaintOptions(ControlNetOptions, Kandinsky3InpaintOptions, total=False):
    """What inpainting with a ControlNet takes."""


class Kandinsky3ControlNetPipeline(Kandinsky3Pipeline):
    """Text to image with Kandinsky 3.0, 3.1 or Flash and a ControlNet. Made of the parts of [`Kandinsky3Pipeline`].

    Args:
        tokenizer: see [`Kandinsky3Pipeline`], as for the others.
        text_encoder: likewise.
        unet: likewise.
        scheduler: likewise.
        movq: likewise.
        controlnet: sees the control image, and adds to what the UNet has computed on its way down.
        image_encoder: see [`Kandinsky3Pipeline`].
        feature_extractor: likewise.

    Raises:
        TypeError: `controlnet` is something else.
    """

    _callback_tensor_inputs = (*Kandinsky3Pipeline._callback_tensor_inputs, "control_image")
    _control_arguments: ClassVar = ("image", "control_image")

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        unet: StockKandinsky3UNet | Kandinsky3UNet,
        scheduler: Scheduler,
        movq: VQModel | MoVQ,
        controlnet: Kandinsky3ControlNetModel,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
    ):
        if not isinstance(unwrap_module(controlnet), Kandinsky3ControlNetModel):
            raise TypeError(
                f"`controlnet` is a {type(controlnet).__name__}; accepted is one Kandinsky3ControlNetModel."
            )
        super().__init__(tokenizer, text_encoder, unet, scheduler, movq, image_encoder, feature_extractor)
        self.register_modules(controlnet=controlnet)

    def _default_size(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        name, control_image = self._control_image(arguments)
        return hint_size(control_image, name, self.controlnet.config.conditioning_channels)

    def _control_image(self, arguments: Mapping[str, Any]) -> tuple[str, Any]:
        """The control image, and the name of the argument that it was given as."""
        given = [(name, arguments[name]) for name in self._control_arguments if arguments[name] is not None]
        if len(given) != 1:
            names = " or ".join(f"`{name}`" for name in self._control_arguments)
            raise ValueError(f"{len(given)} control images are given; accepted is one, as {names}.")
        return given[0]

    def _check(self, arguments: Mapping[str, Any]) -> Call:
        self._check_controlnet()
        _check_interval(arguments["control_guidance_start"], arguments["control_guidance_end"])
        name, control_image = self._control_image(arguments)
        call = super()._check(arguments)
        hint = self._hint(control_image, call.batch.size, name)
        call.batch.expand(hint, name)
        scale = scales_from(call[SCALE], *call.batch.size, name=SCALE)
        call.batch.expand(scale, SCALE)
        return replace(call, hint=hint, arguments={**call.arguments, SCALE: scale})

    def _hint(self, control_image: Images, size: tuple[int, int], name: str) -> torch.Tensor:
        return hints_from(control_image, *size, name=name, channels=self.controlnet.config.conditioning_channels)

    def _check_controlnet(self) -> None:
        of_unet, own = self.unet.config, self.controlnet.config
        sizes = (*own.block_out_channels, own.cross_attention_dim)
        wanted = (*of_unet.block_out_channels[:-1], of_unet.cross_attention_dim)
        if sizes != wanted:
            raise ValueError(
                f"`controlnet` has levels and a context of {sizes} channels; accepted with this UNet are {wanted}."
            )

    def _encode(self, call: Call, device: torch.device) -> Conditions:
        size = tuple(side * self.movq_scale_factor for side in self._latent_size(call.batch.size))
        conditions = super()._encode(call, device)
        control = {"control_image": call.hint, "control_scale": call[SCALE]}
        for name, rows in control.items():
            if rows.shape[-2:] == call.batch.size:
                rows = pad_to(rows, *size)
            rows = rows if len(rows) == 1 else call.batch.expand(rows, name)
            conditions[name] = rows.to(device, self.controlnet.dtype)
        return conditions

    def _context(self, conditions: Conditions, images: int) -> Conditions:
        """For a UNet without null embedding, which projects the text itself, also the context for the ControlNet."""
        parts = super()._context(conditions, images)
        if not self._has_null_embedding:
            parts["control_context"] = self.unet(project=True, encoder_hidden_states=parts["context"])
        return parts

    def _on_step_end(self, call: Call, conditions: Conditions, timesteps: torch.Tensor) -> sampling.OnStepEnd | None:
        """Also takes the control off, and puts it on again, as the call wants it."""
        then, scale = super()._on_step_end(call, conditions, timesteps), conditions["control_scale"]
        steps = controlled_steps(len(timesteps), call["control_guidance_start"], call["control_guidance_end"])
        steps = steps if bool(call[SCALE].any()) else ()

        def switch(index: int) -> None:
            conditions.pop("control_scale", None)
            if index in steps:
                conditions["control_scale"] = scale

        def on_step_end(index: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            latents = latents if then is None else then(index, timestep, latents)
            switch(index + 1)
            return latents

        switch(0)
        return on_step_end

    def _unet_arguments(self, sample: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> dict[str, Any]:
        arguments = super()._unet_arguments(sample, timestep, conditions)
        if "control_scale" in conditions:
            arguments["down_block_additional_residuals"] = self._control(sample, timestep, conditions)
        return arguments

    def _control(
        self, sample: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> tuple[torch.Tensor, ...]:
        """What the ControlNet adds; of the input of an inpainting UNet it sees the noisy latents."""
        dtype = self.controlnet.dtype
        cache = self._context_cache(self.controlnet, [*map(conditions.get, READ_BY_CONTROLNET), len(sample)])
        return self.controlnet(
            sample[:, : self.controlnet.config.in_channels].to(dtype),
            timestep,
            conditions.get("control_context", conditions["context"]).to(dtype),
            conditions["context_mask"],
            conditions["control_image"],
            conditions["control_scale"],
            return_dict=False,
            context_lengths=conditions.get("context_lengths"),
            cache=cache,
        )[0]

    @torch.no_grad()
    @accepts(Kandinsky3ControlNetOptions, TextStates)
    def __call__(
        self,
        prompt: Prompts | None = None,
        image: Images | None = None,
        negative_prompt: Prompts | None = None,
        control_image: Images | None = None,
        **options: Unpack[Kandinsky3ControlNetOptions],
    ) -> Pictures:
        """Draw; arguments as for [`Kandinsky3Pipeline.__call__`], and:

        Args:
            image: the control image, such as edges, white on black: one for all, or one for each (see
                [`images.hints_from`]).
            control_image: the same, under the name that it has in the other tasks.
            options: [`Kandinsky3ControlNetOptions`] and [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})


class Kandinsky3ControlNetImg2ImgPipeline(Kandinsky3Img2ImgPipeline, Kandinsky3ControlNetPipeline):
    """Image to image with a ControlNet, see [`Kandinsky3Img2ImgPipeline`] and [`Kandinsky3ControlNetPipeline`]."""

    _control_arguments: ClassVar = ("control_image",)

    @torch.no_grad()
    @accepts(Kandinsky3ControlNetImg2ImgOptions, TextStates)
    def __call__(
        self,
        prompt: Prompts | None = None,
        image: Images | None = None,
        control_image: Images | None = None,
        negative_prompt: Prompts | None = None,
        **options: Unpack[Kandinsky3ControlNetImg2ImgOptions],
    ) -> Pictures:
        """Draw anew what is in a picture; arguments as for [`Kandinsky3Img2ImgPipeline.__call__`], and:

        Args:
            control_image: see [`Kandinsky3ControlNetPipeline.__call__`].
            options: [`Kandinsky3ControlNetImg2ImgOptions`] and [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})


class Kandinsky3ControlNetInpaintPipeline(Kandinsky3InpaintPipeline, Kandinsky3ControlNetPipeline):
    """Inpainting with a ControlNet, see [`Kandinsky3InpaintPipeline`] and [`Kandinsky3ControlNetPipeline`]."""

    _control_arguments: ClassVar = ("control_image",)

    def _check(self, arguments: Mapping[str, Any]) -> Call:
        """With `padding_mask_crop` the control image and its scale are those of the whole picture, and cropped."""
        call = super()._check(arguments)
        crop = call.source.crop
        if crop is None:
            return call
        hint = crop.cut_out(self._hint(arguments["control_image"], crop.whole_size, "control_image"))
        scale = scales_from(arguments[SCALE], *crop.whole_size, name=SCALE)
        if scale.shape[-2:] == crop.whole_size:
            scale = scales_from(crop.cut_out(scale), *call.batch.size, name=SCALE)
        hint = F.interpolate(hint, call.batch.size, mode="bilinear", antialias=True)
        return replace(call, hint=hint, arguments={**call.arguments, SCALE: scale})

    @torch.no_grad()
    @accepts(Kandinsky3ControlNetInpaintOptions, TextStates)
    def __call__(
        self,
        prompt: Prompts | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        control_image: Images | None = None,
        negative_prompt: Prompts | None = None,
        **options: Unpack[Kandinsky3ControlNetInpaintOptions],
    ) -> Pictures:
        """Repaint a region of a picture; arguments as for [`Kandinsky3InpaintPipeline.__call__`], and:

        Args:
            control_image: see [`Kandinsky3ControlNetPipeline.__call__`].
            options: [`Kandinsky3ControlNetInpaintOptions`] and [`TextStates`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})


def controlled_steps(count: int, start: float, end: float) -> range:
    """Which of `count` steps are controlled, see [`ControlNetOptions`].

    (The original's ControlNet pipelines, pipelines/kandinsky3 of kandinsky3-diffusers, compare so.)
    """
    return range(int(count * start), int(count * end) + 1)


def _check_interval(start: Any, end: Any) -> None:
    if not all(isinstance(share, (int, float)) for share in (start, end)) or not 0.0 <= start <= end <= 1.0:
        raise ValueError(
            f"`control_guidance_start` is {start!r} and `control_guidance_end` {end!r}; accepted are numbers with"
            " 0 <= start <= end <= 1."
        )
