"""What pipelines are called with: the options that many have in common, and call signatures that extend stock's.

An option is declared once, in a `TypedDict`, with its default: `height: Annotated[int, 512]`. A pipeline's `__call__`
ends in `**options: Unpack[...]` for type checkers, and [`accepts`] turns them into ordinary parameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypedDict, get_args, get_type_hints

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput


Prompts = str | list[str]
Embeds = torch.Tensor | list[torch.Tensor]
Generators = torch.Generator | list[torch.Generator] | None
Pictures = ImagePipelineOutput | tuple[Any]
Beautifier = Callable[[list[str]], list[str]]


class SamplingOptions(TypedDict, total=False):
    """What every pipeline takes.

    Args:
        num_images_per_prompt: pictures, or a prior's embeddings, for each prompt.
        generator: one, or one for each picture, which then is the same in any batch.
        latents: standard normal noise to start from instead of drawing it, shaped like the latents.
        return_dict: return a tuple if False.
        callback_on_step_end: called after each step with the pipeline, the step's index, the timestep and a dict of
            tensors; what it returns in a dict replaces them.
        callback_on_step_end_tensor_inputs: names of the tensors it gets, of those in `_callback_tensor_inputs`.
    """

    num_images_per_prompt: Annotated[int, 1]
    generator: Annotated[Generators, None]
    latents: Annotated[torch.Tensor | None, None]
    return_dict: Annotated[bool, True]
    callback_on_step_end: Annotated[Callable[..., dict] | None, None]
    callback_on_step_end_tensor_inputs: Annotated[Sequence[str], ("latents",)]


class PromptOptions(TypedDict, total=False):
    """What every pipeline that takes prompts takes besides.

    Args:
        prompt_beautifier: makes of a list of prompts as many better ones, which are drawn: a [`PromptBeautifier`], or
            a function. Negative prompts, and those of regions, stay as they are.
    """

    prompt_beautifier: Annotated[Beautifier | None, None]


class DrawingOptions(SamplingOptions, total=False):
    """What every pipeline that makes pictures takes besides.

    Args:
        output_type: `"pil"`, `"np"` or `"pt"` (values in [0, 1]), or `"latent"`.
        callback: older form of `callback_on_step_end`: called with index, timestep and latents.
        callback_steps: `callback` is called at every such step; None means each.
        guidance_interval: start and end, shares of the run, between which guidance acts, from 0 before the first step
            to 1 after the last (see [`guidance_interval.guided_steps`]). Anything else than (0, 1) is approximate: the
            other steps run without the unconditional half, at half the cost.
    """

    output_type: Annotated[str, "pil"]
    callback: Annotated[Callable[[int, int, torch.Tensor], None] | None, None]
    callback_steps: Annotated[int | None, 1]
    guidance_interval: Annotated[tuple[float, float], (0.0, 1.0)]


class DecoderOptions(DrawingOptions, total=False):
    """What the decoders of 2.1 and 2.2 take.

    Args:
        height: of the picture in pixels, any.
        width: of the picture in pixels, any.
        num_inference_steps: of the scheduler.
        guidance_scale: 1 draws without guidance.
    """

    height: Annotated[int, 512]
    width: Annotated[int, 512]
    num_inference_steps: Annotated[int, 100]
    guidance_scale: Annotated[float, 4.0]


class ImageStartOptions(TypedDict, total=False):
    """What image-to-image takes besides.

    Args:
        strength: from 0, keep the picture, to 1, forget it: the share of the steps that are made.
    """

    strength: Annotated[float, 0.3]


class RepaintOptions(TypedDict, total=False):
    """What inpainting takes besides.

    Args:
        strength: below 1 the region starts from its noised content and takes that share of the steps.
        padding_mask_crop: paint only the mask and so many pixels around it, at the full `height` and `width`, and put
            it into the picture, which keeps its size.
        preserve_unmasked: give back the pixels outside the mask as they were; else they come from the MoVQ.
        blur_factor: radius in pixels by which the mask is blurred (`VaeImageProcessor.blur`). What is grey then fades
            from known to painted pixels where the two are put together, by `padding_mask_crop` or `preserve_unmasked`;
            the network repaints from middle grey on.
    """

    strength: Annotated[float, 1.0]
    padding_mask_crop: Annotated[int | None, None]
    preserve_unmasked: Annotated[bool, False]
    blur_factor: Annotated[int | None, None]


class Img2ImgOptions(ImageStartOptions, DecoderOptions, total=False):
    """What image-to-image with 2.1 and 2.2 takes."""


class InpaintOptions(RepaintOptions, DecoderOptions, total=False):
    """What inpainting with 2.1 and 2.2 takes."""


class PriorOptions(PromptOptions, SamplingOptions, total=False):
    """What the priors take besides a prompt.

    Args:
        negative_prompt: one for all, or one for each. The negative embeddings are then what the prior makes of it, and
            it takes the place of the empty prompt in the prior's own guidance. Without it the negative embeddings are
            those of no picture.
        num_inference_steps: of the scheduler.
        guidance_scale: of the prior; one for all, or one for each embedding. 1 is without guidance.
        output_type: `"pt"` or `"np"`; `"latent"` leaves out the statistics that make CLIP embeddings of the prior's.
        negative_prior_prompt: the prompt of the prior's own unconditional half only, as in the original of 2.1.
    """

    negative_prompt: Annotated[Prompts | None, None]
    num_inference_steps: Annotated[int, 25]
    guidance_scale: Annotated[float | Sequence[float], 4.0]
    output_type: Annotated[str, "pt"]
    negative_prior_prompt: Annotated[Prompts | None, None]


class PriorOptionsOfCombined(PromptOptions, total=False):
    """What combined pipelines take for their prior: [`PriorOptions`], where need be with `prior_` in front."""

    negative_prompt: Annotated[Prompts | None, None]
    negative_prior_prompt: Annotated[Prompts | None, None]
    prior_guidance_scale: Annotated[float | Sequence[float], 4.0]
    prior_num_inference_steps: Annotated[int, 25]
    prior_callback_on_step_end: Annotated[Callable[..., dict] | None, None]
    prior_callback_on_step_end_tensor_inputs: Annotated[Sequence[str], ("latents",)]


class CombinedOptions(PriorOptionsOfCombined, DecoderOptions, total=False):
    """What combined text-to-image takes besides a prompt."""


class CombinedImg2ImgOptions(PriorOptionsOfCombined, Img2ImgOptions, total=False):
    """What combined image-to-image takes besides prompt and image."""


class CombinedInpaintOptions(PriorOptionsOfCombined, InpaintOptions, total=False):
    """What combined inpainting takes besides prompt, image and mask."""


def accepts(*options: type, stock: type | None = None) -> Callable[[Callable], Callable]:
    """Decorator for a pipeline's `__call__(self, ..., **options)`, which makes its signature an extension of stock's.

    Parameters that stock has come first, in stock's order and with stock's defaults, so that calls written for it mean
    the same; all others follow, by keyword only. A default of None, which leaves the value to the repo's
    configuration, stays. The function gets a value for every option.

    Args:
        options: `TypedDict`s whose fields are `Annotated[type, default]`.
        stock: the pipeline class whose `__call__` is extended, if there is one.
    """

    def decorate(function: Callable) -> Callable:
        signature = _extended(inspect.signature(function), options, stock)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(**bound.arguments)

        vars(call)["__signature__"] = signature
        return call

    return decorate


def complete_arguments(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a pipeline by their names, defaults included.

    Raises:
        TypeError: the pipeline does not take one of them, or needs another one.
    """
    call = inspect.signature(type(pipeline).__call__).bind(pipeline, **arguments)
    call.apply_defaults()
    return call.arguments


def _extended(signature: inspect.Signature, options: Sequence[type], stock: type | None) -> inspect.Signature:
    own = {name: p for name, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    optional = {name: p for option in options for name, p in _parameters_of(option).items()}
    known = {**own, **optional}
    of_stock = inspect.signature(stock.__call__).parameters if stock is not None else {}
    first = [name for name in of_stock or own if name in known]
    for name in first:
        decided_here = name in optional and known[name].default is not None
        if decided_here and name in of_stock and of_stock[name].default is not inspect.Parameter.empty:
            known[name] = known[name].replace(default=of_stock[name].default)
    positional = [known.pop(name).replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in first]
    by_keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in known.values()]
    return signature.replace(parameters=positional + by_keyword)


def _parameters_of(options: type) -> dict[str, inspect.Parameter]:
    hints = get_type_hints(options, include_extras=True)
    return {
        name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in ((name, get_args(hint)) for name, hint in hints.items())
    }
