"""KandiSuperRes: x4, x2 and Flash x2."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, VQModel
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3UNet as StockKandinsky3UNet
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from .. import sampling
from ..footprint import Load
from ..images import Images, as_list, made_rgb, pad_to, pixels_from, pixels_to, resize_pixels, size_of
from ..inputs import check_at_most, check_choice, check_counts, check_generators
from ..k3 import Kandinsky3UNet
from ..movq import MoVQ, pixels_per_latent
from ..options import Generators, Pictures, accepts
from ..pipeline_base import KandinskyPipelineMixin
from ..running import RunningCall, RunsCalls
from ..schedulers import Kandinsky3FlashScheduler
from .context import KandiSuperResContext
from .refiner import TILE, Refiner
from .sizes import Side, SizeRule
from .unet import KandiSuperResUNet
from .windows import Windows


STEPS = 5  # of the original, for schedulers that do not say
OUTPUT_TYPES = ("pil", "np", "pt")
COUNTS = ("scale", "num_inference_steps", "window_size", "window_stride", "view_batch_size")


class SuperResOptions(TypedDict, total=False):
    """What the pipeline takes besides pictures.

    Args:
        num_inference_steps: of the scheduler; None for 5, with Flash 4.
        refine: whether Flash's refiner redraws fine detail; None for yes if the pipeline has one.
        seed: of the noise of each picture where no generator is given; None draws from the global generator.
        generator: one, or one for each picture.
        window_size: side of the windows that the UNet sees at once, in pixels of the enlarged picture; a multiple of
            what the UNet can halve.
        window_stride: from one window to the next.
        view_batch_size: how many windows the UNet sees at once.
        canvas_device: where pictures of full size are; the accelerator only ever holds windows and tiles.
        output_type: `"pil"`, `"np"` or `"pt"` (values in [0, 1]).
        return_dict: return a tuple if False.
        callback_on_step_end: called after each step with the pipeline, the step's index, the timestep and a dict of
            tensors; what it returns in a dict replaces them.
        callback_on_step_end_tensor_inputs: names of the tensors it gets: `"latents"`, the pixels being drawn, and
            `"image"`, the input stretched to their size.
    """

    num_inference_steps: Annotated[int | None, None]
    refine: Annotated[bool | None, None]
    seed: Annotated[int | None, 0]
    generator: Annotated[Generators, None]
    window_size: Annotated[int | None, None]
    window_stride: Annotated[int | None, None]
    view_batch_size: Annotated[int | None, None]
    canvas_device: Annotated[torch.device | str, "cpu"]
    output_type: Annotated[str, "pil"]
    return_dict: Annotated[bool, True]
    callback_on_step_end: Annotated[Callable[..., dict] | None, None]
    callback_on_step_end_tensor_inputs: Annotated[Sequence[str], ("latents",)]


@dataclass(frozen=True)
class Call:
    """One call, checked.

    Args:
        arguments: of `__call__`, by their names, with the repo's values for those left out.
        pictures: of each its pixels `[1, 3, h, w]`, fitted to the network, and its own height and width.
        times: how often each is enlarged.
        rule: how pictures are fitted.
        windows: what the UNet sees.
    """

    arguments: Mapping[str, Any]
    pictures: list[tuple[torch.Tensor, tuple[int, int]]]
    times: int
    rule: SizeRule
    windows: Windows

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def generator(self, index: int) -> torch.Generator | None:
        """The generator of picture `index`; that of a seed starts anew with each enlargement, as in a new call."""
        given, seed = self["generator"], self["seed"]
        if isinstance(given, list):
            return given[index]
        return given if given is not None or seed is None else torch.Generator().manual_seed(seed)


class KandiSuperResPipeline(RunsCalls, KandinskyPipelineMixin, DiffusionPipeline):
    """Enlarges pictures with KandiSuperRes; x4, x2 or Flash x2 is a matter of its components and settings.

    A picture of any size comes out `scale` times as high and wide. Large ones are drawn in windows, which overlap and
    are averaged after each step (MultiDiffusion, https://arxiv.org/abs/2302.08113), so that the accelerator's memory
    depends on the window and not on the picture. Below the size of a window everything is as in the original; above
    it, the original draws Flash whole.

    Flash can have a refiner, Kandinsky 3.1 Flash, that redraws fine detail: then `refiner`, `refiner_scheduler`,
    `movq` and `context` belong together. In half precision the MoVQ stays in float32.

    Args:
        unet: predicts the clean picture.
        scheduler: with `prediction_type="sample"`.
        refiner: a UNet of Kandinsky 3.1.
        refiner_scheduler: its timesteps say how much is redrawn.
        movq: the refiner's autoencoder; it works in tiles, as its `enable_tiling` says or in those of the original.
        context: what the refiner reads in the place of a text.
        scale: of the UNet.
        size_multiple: the original makes sides multiples of this,
        shrinks_input: by resizing the picture down; else by stretching it on the canvas.
        window_size: see [`SuperResOptions`].
        window_stride: likewise.
        view_batch_size: likewise.
    """

    model_cpu_offload_seq = "unet->context->refiner->movq"
    _orders_of_use = ("unet->movq->context->refiner->movq",)
    _optional_components = ["refiner", "refiner_scheduler", "movq", "context"]  # noqa: RUF012 (as in diffusers)
    _callback_tensor_inputs = ("latents", "image")
    _float32_components = ("movq",)

    def __init__(
        self,
        unet: KandiSuperResUNet,
        scheduler: DPMSolverMultistepScheduler | Kandinsky3FlashScheduler,
        refiner: StockKandinsky3UNet | Kandinsky3UNet | None = None,
        refiner_scheduler: Kandinsky3FlashScheduler | None = None,
        movq: VQModel | MoVQ | None = None,
        context: KandiSuperResContext | None = None,
        scale: int = 4,
        size_multiple: int = 2,
        shrinks_input: bool = False,
        window_size: int = 1024,
        window_stride: int = 800,
        view_batch_size: int = 15,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            refiner=refiner,
            refiner_scheduler=refiner_scheduler,
            movq=self._in_float32(movq),
            context=context,
        )
        self.register_to_config(
            scale=scale,
            size_multiple=size_multiple,
            shrinks_input=shrinks_input,
            window_size=window_size,
            window_stride=window_stride,
            view_batch_size=view_batch_size,
        )

    @property
    def _side(self) -> int:
        return self.config.window_size

    def _load_of(self, component: str, size: tuple[int, int], batch_size: int) -> Load:
        """Windows for the UNet, tiles for the refiner; pictures are drawn one after the other."""
        if component != "unet":
            load, scale = super()._load_of(component, size, 1), pixels_per_latent(self.movq)
            tile = TILE if component == "refiner" or self.movq is None else self.movq.tile_sample_min_size // scale
            height, width = (min(length, tile) for length in load.latents)
            return Load(1, 1, (height * scale, width * scale), (height, width))
        windows, multiple = Windows(*(self.config[name] for name in COUNTS[-3:])), self.unet.size_multiple
        at_once = min(math.prod(len(windows.starts(length)) for length in size), windows.batch)
        height, width = (-(-min(length, windows.size) // multiple) * multiple for length in size)
        return Load(at_once, at_once, (height, width), (height, width))

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running enlargement."""
        return self._num_timesteps

    @property
    def _autoencoder(self) -> Any:
        if self.movq is None:
            raise ValueError("this pipeline has no `movq`: only one with a refiner has.")
        return self.movq

    def prepare_latents(
        self, shape: Sequence[int], device: torch.device | str, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The noise `shape` `[1, 3, height, width]` to start from, in float32 on `device`."""
        noise = sampling.draw_noise(shape, generator, device, torch.float32) * self.scheduler.init_noise_sigma
        begin = getattr(self.scheduler, "noised_start", None)  # Flash's
        return noise if begin is None else begin(noise, generator)

    def predict_sample(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor], windows: Windows
    ) -> torch.Tensor:
        """The clean picture that the UNet sees in `latents` at `timestep`, window by window.

        Args:
            latents: noisy pixels `[1, 3, height, width]`.
            timestep: a training timestep.
            conditions: `image`, the input picture stretched to the size of `latents`.
            windows: what the UNet gets at once; only this goes to its device.
        """
        device, dtype = self._execution_device, self.unet.dtype

        def predict(sample: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
            return self.unet(sample.to(device, dtype), timestep.to(device), image.to(device, dtype)).sample

        scaled = self.scheduler.scale_model_input(latents, self._on_host(timestep))
        return windows.average(predict, (scaled, conditions["image"]))

    @torch.no_grad()
    @accepts(SuperResOptions)
    def __call__(self, image: Images, scale: int | None = None, **options: Unpack[SuperResOptions]) -> Pictures:
        """Enlarge pictures.

        Args:
            image: one or several, of any sizes: PIL pictures, arrays or tensors, also the `.images` of any pipeline.
                Floats with negative values count as [-1, 1], others as [0, 1], integers as 0..255.
            scale: a power of the model's own scale; higher ones enlarge repeatedly. None for the model's own.
            options: [`SuperResOptions`].

        Returns:
            Pictures exactly `scale` times as high and wide. Arrays or tensors of different sizes come as a list.

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._generate({**options, **locals()})

    def _generate(self, arguments: Mapping[str, Any]) -> Pictures:
        call = self._check(arguments)
        images = [self._enlarge(call, index) for index in range(len(call.pictures))]
        self.maybe_free_model_hooks()
        together = _joined(images)
        return ImagePipelineOutput(images=together) if call["return_dict"] else (together,)

    def _check(self, arguments: Mapping[str, Any]) -> Call:
        given = self._with_defaults(arguments)
        check_counts(**{name: given[name] for name in COUNTS})
        check_at_most("num_inference_steps", given["num_inference_steps"], self._most_steps)
        check_choice("output_type", given["output_type"], OUTPUT_TYPES)
        for name in given["callback_on_step_end_tensor_inputs"]:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        self._check_windows(given)
        self._check_refiner(given["refine"])
        times = _exponent(given["scale"], self.config.scale)
        settings = self.config.scale, self.config.size_multiple, self.config.shrinks_input
        rule = SizeRule(*settings, self.unet.size_multiple, given["window_size"])
        pictures = _loaded(given["image"], rule)
        check_generators(given["generator"], len(pictures))
        windows = Windows(given["window_size"], given["window_stride"], given["view_batch_size"])
        return Call(given, pictures, times, rule, windows)

    def _with_defaults(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        defaults = {name: self.config.get(name) for name in COUNTS}
        defaults["num_inference_steps"] = self.scheduler.config.get("default_num_inference_steps", STEPS)
        defaults["refine"] = self.refiner is not None
        return {name: defaults.get(name) if value is None else value for name, value in arguments.items()}

    @property
    def _most_steps(self) -> int:
        """As many as the schedule has, or those for which the model was distilled."""
        config = self.scheduler.config
        return len(config["timesteps"]) if "timesteps" in config else config["num_train_timesteps"]

    def _check_windows(self, given: Mapping[str, Any]) -> None:
        if given["window_size"] % self.unet.size_multiple:
            raise ValueError(
                f"`window_size` is {given['window_size']}; accepted are multiples of {self.unet.size_multiple}."
            )
        check_at_most("window_stride", given["window_stride"], given["window_size"])

    def _check_refiner(self, refine: bool) -> None:
        missing = [name for name in self._optional_components if getattr(self, name) is None]
        if refine and missing:
            raise ValueError(
                f"`refine` is {refine}, and the pipeline has no {', '.join(f'`{name}`' for name in missing)}; accepted"
                " is False, or give the components to the pipeline."
            )

    def _enlarge(self, call: Call, index: int) -> Any:
        """Picture `index`, as often enlarged as was asked for, in the form asked for."""
        pixels, (height, width) = call.pictures[index]
        pixels = pixels.to(call["canvas_device"])
        for _ in range(call.times):
            sides = call.rule.side(height), call.rule.side(width)
            pixels = self._enlarge_once(pixels, sides, call, call.generator(index))
            height, width = pixels.shape[-2:]
        return pixels_to(pixels, call["output_type"])

    def _enlarge_once(
        self, pixels: torch.Tensor, sides: tuple[Side, Side], call: Call, generator: torch.Generator | None
    ) -> torch.Tensor:
        canvas, kept, target = ([getattr(side, name) for side in sides] for name in ("canvas", "kept", "target"))
        pixels = resize_pixels(pixels, *(side.image for side in sides))
        pixels = pad_to(pixels, *(side.padded for side in sides))
        conditions = {"image": F.interpolate(pixels, canvas, mode="bilinear")}
        latents = self._denoise(call, conditions, generator)
        if call["refine"]:
            latents = self._refine(latents, generator)
        enlarged = latents[..., : kept[0], : kept[1]].clamp(-1.0, 1.0)
        if kept != target:
            enlarged = F.interpolate(enlarged, target, mode="bilinear", align_corners=True)
        return enlarged

    def _denoise(
        self, call: Call, conditions: dict[str, torch.Tensor], generator: torch.Generator | None
    ) -> torch.Tensor:
        image = conditions["image"]
        self.scheduler.set_timesteps(call["num_inference_steps"])  # on the host, see `RunningCall`
        draws = "generator" in inspect.signature(self.scheduler.step).parameters
        step = partial(self.scheduler.step, **({"generator": generator} if draws else {}))
        self._num_timesteps = len(self.scheduler.timesteps)
        callback, names = call["callback_on_step_end"], call["callback_on_step_end_tensor_inputs"]
        running = RunningCall(self.scheduler.timesteps, self._execution_device, watched=callback is not None)
        progress_bar: Any = self.progress_bar
        with self._as_running(running):
            return sampling.denoise(
                self.prepare_latents(image.shape, image.device, generator),
                progress_bar(running.timesteps),
                predict=lambda x, t: self.predict_sample(x, t, conditions, call.windows),
                combine=lambda prediction: prediction,
                step=lambda prediction, t, x: step(prediction, running.on_host(t), x).prev_sample,
                on_step_end=sampling.step_end_callback(self, conditions, callback, names),
            )

    def _refine(self, pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        parts = self.movq, self.refiner, self.refiner_scheduler, self.context
        refiner = Refiner(*parts, self._execution_device, generator, self._decoding)
        return refiner.decode(refiner.redraw(refiner.encode(pixels)))


def _loaded(images: Images, rule: SizeRule) -> list[tuple[torch.Tensor, tuple[int, int]]]:
    """Each picture, resized as the first enlargement wants it, with its own size."""
    loaded = []
    for image in as_list(images):
        height, width = size_of(image)
        if min(height, width) < 1:
            raise ValueError(f"`image` is {width} x {height} pixels; accepted is 1 x 1 or more.")
        fitted = rule.side(height).image, rule.side(width).image
        pixels = pixels_from(made_rgb(image), *fitted, by_unit_range=True, reducing_gap=None)
        loaded += [(one, (height, width)) for one in pixels.split(1)]
    return loaded


def _exponent(scale: int, base: int) -> int:
    """How often to enlarge by `base`, to get to `scale`.

    Raises:
        ValueError: it is no power.
    """
    times, reached = 1, base
    while reached < scale:
        times, reached = times + 1, reached * base
    if reached != scale:
        raise ValueError(f"`scale` is {scale}; accepted is {base}, the scale of this model, and its powers.")
    return times


def _joined(images: list[Any]) -> Any:
    """The pictures of all, in one list, array or tensor; arrays and tensors that differ in size in a list."""
    if isinstance(images[0], list):
        return [picture for pictures in images for picture in pictures]
    if len({image.shape for image in images}) > 1:
        return [image[0] for image in images]
    return torch.cat(images) if isinstance(images[0], torch.Tensor) else np.concatenate(images)
