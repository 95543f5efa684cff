"""The ways to run a pipeline, from the fastest to the slowest, and what memory each takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from .components import is_quantised
from .eight_bits import DtypeOf, bytes_saved, is_in_eight_bits, largest_expanded
from .footprint import running_bytes, streamed_bytes, weight_bytes


TILES = (1024, 512)  # sides in pixels
HALF = torch.float16
OVERHEAD = 1.5  # times what tensors need: on an H100 the allocator reserved so much for MoVQ, from 768 pixels on
RESERVE = 600_000_000  # bytes that no tensor takes: the CUDA context and its kernels, or the interpreter with torch

_AUTOENCODERS = ("movq", "vae")
_AT_EACH_STEP = ("unet", "prior", "prior_prior", "controlnet", "refiner")


@dataclass(frozen=True)
class Setting:
    """One way to run a pipeline.

    Args:
        half: models in float32 become float16, but for those that need float32.
        slicing: whether the autoencoder works on one picture at a time.
        tile: side in pixels of the tiles in which it works; None for whole pictures.
        offload: whether a model is on the device only while it is used (model offload).
        streamed: models of which only one layer at a time is on the device (group offload at leaf level).
        eight_bits: models whose linear layers are kept in 8 bits.
    """

    half: bool = False
    slicing: bool = False
    tile: int | None = None
    offload: bool = False
    streamed: tuple[str, ...] = ()
    eight_bits: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            "half precision" * self.half,
            "model offload" if self.offload else "all models on the device",
            f"layer by layer: {', '.join(self.streamed)}" * bool(self.streamed),
            f"in 8 bits: {', '.join(self.eight_bits)}" * bool(self.eight_bits),
            f"tiles of {self.tile} pixels" if self.tile else "one picture at a time" * self.slicing,
        ]
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Stage:
    """A model at work.

    Args:
        component: its name in the pipeline.
        encodes: of an autoencoder, whether it encodes; else it decodes.
        weights: bytes of weights on the device, those of other models included.
        running: bytes besides, while it runs; None where the weights alone are too much, and nothing was measured.
    """

    component: str
    encodes: bool
    weights: int
    running: int | None

    @property
    def peak(self) -> int:
        """Estimated bytes of memory, with [`OVERHEAD`] and [`RESERVE`]."""
        return self.weights + int((self.running or 0) * OVERHEAD) + RESERVE

    def __str__(self) -> str:
        return f"{self.component} (encoding)" if self.encodes else self.component


@dataclass(frozen=True)
class Rung:
    """A setting, and what it takes."""

    setting: Setting
    stages: tuple[Stage, ...]

    @property
    def largest(self) -> Stage:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def peak(self) -> int:
        """Estimated bytes of memory at the worst moment of a call."""
        return self.largest.peak

    @property
    def is_measured(self) -> bool:
        """Whether models were measured; else the weights alone are too much."""
        return all(stage.running is not None for stage in self.stages)

    def __str__(self) -> str:
        if self.is_measured:
            return f"{self.setting}: {gigabytes(self.peak)}, for {self.largest}"
        return f"{self.setting}: more than {gigabytes(self.peak)}, for weights alone"


def settings(
    pipe: Any,
    size: tuple[int, int],
    batch_size: int,
    device: torch.device,
    allow_half: bool = True,
    allow_quantization: bool = True,
) -> Iterator[Setting]:
    """All settings for a pipeline, from the fastest to the slowest.

    Sequential offload is none of them: it needs as much as all models layer by layer, and takes longer. On the CPU,
    where weights are in the same memory at all times, there is no offload and no half precision.
    """
    models = models_of(pipe)
    sizes = sizes_of(models)
    texts = tuple(name for name in models if "text_encoder" in name and not is_quantised(models[name]))
    texts = tuple(name for name in texts if allow_quantization and not is_in_eight_bits(models[name]))
    pieces = list(_pieces(pipe, size, batch_size))
    castable = any(
        weight_bytes(model, casting(pipe, name, model, True)) < sizes[name] for name, model in models.items()
    )
    half = allow_half and castable and device.type != "cpu"
    placements = [Setting()]
    if half:
        placements.append(Setting(half=True))
    if device.type != "cpu":
        placements.append(Setting(half, offload=True))
    if texts:
        placements.append(Setting(half, offload=device.type != "cpu", eight_bits=texts))
    if device.type != "cpu":
        streamable = [name for name in models if not is_quantised(models[name])]
        streamable.sort(key=lambda name: _cost_of_streaming(name, sizes[name]))
        sets = (tuple(streamable[: count + 1]) for count in range(len(streamable)))
        placements += [Setting(half, offload=True, streamed=streamed) for streamed in sets]
    for each in placements:
        for slicing, tile in pieces:
            yield Setting(each.half, slicing, tile, each.offload, each.streamed, each.eight_bits)


def _cost_of_streaming(name: str, size: int) -> tuple[int, int]:
    """In this order models go layer by layer: the largest of those that run once, then those that run at each step.

    The autoencoder is the last; its weights are few.
    """
    if name in _AUTOENCODERS:
        return 2, size
    return (1, size) if name in _AT_EACH_STEP else (0, -size)


class Estimates:
    """What the stages of a call need under a setting; what has been measured once is remembered.

    Args:
        pipe: the pipeline, which is not touched.
        size: height and width of the pictures in pixels.
        batch_size: pictures at once.
    """

    def __init__(self, pipe: Any, size: tuple[int, int], batch_size: int):
        self._pipe, self._models, self._autoencoder = pipe, models_of(pipe), autoencoder_of(pipe)
        self._loads = {name: pipe._load_of(name, size, batch_size) for name in self._models}
        self._uses = uses_of(pipe)
        self._known: dict[tuple[Any, ...], int] = {}

    def stages(self, setting: Setting, limit: float = math.inf) -> tuple[Stage, ...]:
        """The models in the order in which a call uses them; where weights exceed `limit` no model is measured."""
        stages: dict[tuple[str, bool], Stage] = {}
        for uses in self._uses:
            for name, encodes, whole in self._on_device(uses, setting):
                weights = sum(self._weights(other, setting) for other in whole)
                if name in setting.streamed:
                    weights += self._once(streamed_bytes, name, setting.half)
                known = stages.get((name, encodes))
                if known is None or known.weights < weights:
                    stages[name, encodes] = Stage(name, encodes, weights, None)
        if max(stage.peak for stage in stages.values()) > limit:
            return tuple(stages.values())
        measured = (self._running(stage.component, stage.encodes, setting) for stage in stages.values())
        return tuple(replace(stage, running=running) for stage, running in zip(stages.values(), measured, strict=True))

    def _on_device(self, uses: list[tuple[str, bool]], setting: Setting) -> Iterator[tuple[str, bool, Set[str]]]:
        """The uses, with the models that are whole on the device then.

        Under model offload each model of the chain sends away the one before it in the chain, which is not always the
        one used before it.
        """
        chain = [name for name in self._pipe.model_cpu_offload_seq.split("->") if name in self._models]
        chain = [name for name in chain if name not in setting.streamed]
        before = {later: earlier for earlier, later in pairwise(chain)}
        loaded: Set[str] = set() if setting.offload else self._models.keys()
        for name, encodes in uses:
            if setting.offload and name not in setting.streamed:
                loaded = loaded - {before.get(name, "")} | {name}
            yield name, encodes, loaded

    def _once(self, measure: Callable[..., int], name: str, half: bool, *arguments: Any) -> int:
        key = (measure, name, half, *arguments)
        if key not in self._known:
            dtype_of = casting(self._pipe, name, self._models[name], half)
            self._known[key] = measure(self._models[name], dtype_of, *arguments)
        return self._known[key]

    def _weights(self, name: str, setting: Setting) -> int:
        whole = self._once(weight_bytes, name, setting.half)
        return whole - (self._once(bytes_saved, name, setting.half) if name in setting.eight_bits else 0)

    def _running(self, name: str, encodes: bool, setting: Setting) -> int:
        load = self._loads[name]
        if self._models[name] is self._autoencoder and setting.slicing:
            one = self._once(running_bytes, name, setting.half, load.piece(setting.tile), encodes)
            # pieces are joined to the whole: both are there for a moment
            return one + 2 * load.pictures * 3 * load.pixels[0] * load.pixels[1] * torch.float32.itemsize
        running = self._once(running_bytes, name, setting.half, load, encodes)
        return running + (self._once(largest_expanded, name, setting.half) if name in setting.eight_bits else 0)


# ----------------------------------------------------------------------------------------------- what is in a pipeline
def models_of(pipe: Any) -> dict[str, Any]:
    """The models of a pipeline by their names; of a compiled one, the model."""
    components = pipe.components.items()
    return {name: unwrap_module(m) for name, m in components if isinstance(m, nn.Module)}


def sizes_of(models: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the weights of models as they are."""
    return {name: weight_bytes(model, lambda _, tensor: tensor.dtype) for name, model in models.items()}


def casting(pipe: Any, component: str, model: Any, half: bool) -> DtypeOf:
    """The dtypes of the weights of a component, when models are in half precision or as they are.

    It is as `from_pretrained(dtype=torch.float16)` has it: a family's MoVQ may need float32, and so may parts of a
    text encoder.
    """
    stays = not half or component in pipe._float32_components or is_quantised(model)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())

    def dtype_of(name: str, tensor: torch.Tensor) -> torch.dtype:
        return tensor.dtype if stays or tensor.dtype != torch.float32 or kept & {*name.split(".")} else HALF

    return dtype_of


def autoencoder_of(pipe: Any) -> Any:
    """The model between pixels and latents, None where there is none."""
    models = models_of(pipe)
    return next((models[name] for name in _AUTOENCODERS if name in models), None)


def _pieces(pipe: Any, size: tuple[int, int], batch_size: int) -> Iterator[tuple[bool, int | None]]:
    """Slicing and tile of the autoencoder, from whole pictures to small tiles."""
    yield False, None
    autoencoder = autoencoder_of(pipe)
    if autoencoder is None:
        return
    if batch_size > 1:
        yield True, None
    tiles = (autoencoder.tile_sample_min_size,) if isinstance(autoencoder, AutoencoderKL) else TILES
    yield from ((True, tile) for tile in tiles if tile < max(size))


def uses_of(pipe: Any) -> list[list[tuple[str, bool]]]:
    """For each way that a call may go, the models in the order of use, and whether an autoencoder encodes.

    Models of which the pipeline's class does not say when they are used come first.
    """
    models, autoencoder = models_of(pipe), autoencoder_of(pipe)
    takes_image = "image" in inspect.signature(type(pipe).__call__).parameters
    ways = []
    orders = [way.split("->") for way in pipe._orders_of_use or (pipe.model_cpu_offload_seq,)]
    others = [name for name in models if not any(name in order for order in orders)]
    for order in orders:
        order = others + [name for name in order if name in models]
        uses = [(name, models[name] is autoencoder and name in order[at + 1 :]) for at, name in enumerate(order)]
        ways.append([(name, encodes) for name, encodes in uses if takes_image or not encodes])
    return ways


def gigabytes(count: int) -> str:
    """Bytes for people, in units of 10^9."""
    return f"{count / 1e9:.2f} GB"
