"""The parts of `pipe.optimize(...)`: what each does to a model, where it can, and how it is taken back."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, PriorTransformer, VQModel
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention
from diffusers.utils import logging
from diffusers.utils.torch_utils import empty_device_cache, unwrap_module
from torch.utils._triton import has_triton

from .attention import (
    MASKING_BACKENDS,
    DispatchedAttnAddedKVProcessor,
    DispatchedAttnProcessor,
    attention_layers,
    choose_backend,
    text_processor,
)
from .compilation import compile_blocks, has_blocks, is_compiled, is_compiled_whole, uncompile_blocks
from .components import is_quantised
from .cuda_graphs import CudaRecorder, Recorder, foreign_hooks, graph, ungraph
from .fused_projections import FUSED_LAYERS
from .inputs import check_choice
from .packed_convolutions import has_packed_convolutions, pack, packable, unpack
from .step_cache import skipped_layers


logger = logging.get_logger(__name__)

Undo = Callable[[], None]

_APPLIED = "_kandinsky_optimizations"  # attribute of a model: what takes each part back that is on, by its name
_OWN_GRAPHS = ("reduce-overhead", "max-autotune")  # modes in which torch.compile records CUDA graphs itself


@dataclass(frozen=True)
class Part:
    """One thing that [`Optimization`] switches on.

    Args:
        name: of the argument of `optimize`.
        applies: whether there is anything to do for a model.
        why_not: why it cannot be done, given model and settings; None where it can.
        enable: does it, and returns what takes it back.
        stays: whether it can stay on while weights are moved or replaced, or hooks put on the model.
    """

    name: str
    applies: Callable[[Any], bool]
    why_not: Callable[[Any, Mapping[str, Any]], str | None]
    enable: Callable[[Any, Mapping[str, Any]], Undo]
    stays: bool = False


class Optimization:
    """The parts that were chosen for a pipeline, and which of them its models can have.

    Args:
        settings: of each part by its name; False or None leaves it out.
        recorder: of CUDA graphs.

    Raises:
        TypeError, ValueError: a setting is not as [`KandinskyPipelineMixin.optimize`] describes it.
    """

    def __init__(self, settings: Mapping[str, Any], recorder: Recorder | None = None) -> None:
        _check(settings)
        self.chosen = dict(settings)
        self._settings = {**settings, "recorder": recorder or CudaRecorder()}
        self._told: set[tuple[str, str]] = set()

    def apply(self, models: Mapping[str, Any]) -> None:
        """Switch on whatever is chosen, possible and not on yet; a message says what is not possible, once.

        Args:
            models: of a pipeline, by the names of its components.
        """
        left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, component in models.items():
            model = unwrap_module(component)
            for part in PARTS:
                applied = vars(model).get(_APPLIED, {})
                if not self.chosen[part.name] or part.name in applied or not part.applies(model):
                    continue
                reason = part.why_not(component, self._settings)
                if reason is None:
                    undo = part.enable(model, self._settings)
                    vars(model).setdefault(_APPLIED, {})[part.name] = undo
                else:
                    left_out[part.name, reason].append(f"`{name}`")
        for (part_name, reason), names in left_out.items():
            if (part_name, reason) not in self._told:
                logger.warning(f"`{part_name}` is left out for {', '.join(names)}: {reason}.")
        self._told |= set(left_out)


def take_back(models: Iterable[Any], keep_what_stays: bool = False) -> None:
    """Make models what they were before [`Optimization.apply`].

    Args:
        models: components of a pipeline.
        keep_what_stays: leave what can stay on, see [`Part`].
    """
    for model in map(unwrap_module, models):
        applied = vars(model).get(_APPLIED, {})
        for part in reversed(PARTS):
            if part.name in applied and not (keep_what_stays and part.stays):
                applied.pop(part.name)()
        if not applied:
            vars(model).pop(_APPLIED, None)


def optimizable(components: Mapping[str, Any]) -> dict[str, Any]:
    """Of the components of a pipeline the models that [`Optimization`] is for."""
    return {name: model for name, model in components.items() if isinstance(unwrap_module(model), ModelMixin)}


# ------------------------------------------------------------------------------------------------ the parts


def _enable_attention_backend(model: Any, settings: Mapping[str, Any]) -> Undo:
    processors = [layer.processor for layer in attention_layers(model)]
    chosen = [processor for processor in processors if hasattr(processor, "_attention_backend")]
    before = [(processor, processor._attention_backend) for processor in chosen]
    choose_backend(model, settings["attention_backend"])
    return partial(_set_backends, before)


def _set_backends(backends: list[tuple[Any, Any]]) -> None:
    for processor, backend in backends:
        processor._attention_backend = backend


def _why_no_attention_backend(model: Any, settings: Mapping[str, Any]) -> str | None:
    takes_masks = isinstance(model, PriorTransformer) or hasattr(model, "add_time_condition")
    if takes_masks and AttentionBackendName(settings["attention_backend"]) not in MASKING_BACKENDS:
        return f"{settings['attention_backend']!r} cannot take the masks that this attention has"
    return None


def _enable_channels_last(model: Any, settings: Mapping[str, Any]) -> Undo:
    before = [(weight, weight.stride()) for weight in _convolution_weights(model)]
    model.to(memory_format=torch.channels_last)
    return partial(_set_strides, before)


def _set_strides(strides: list[tuple[torch.nn.Parameter, tuple[int, ...]]]) -> None:
    for weight, stride in strides:
        if weight.stride() != stride:
            weight.data = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device).copy_(
                weight.data
            )


def _enable_fusing(model: Any, settings: Mapping[str, Any]) -> Undo:
    """Fuse by way of the host, so that the device never holds weights twice, nor fragments of what it held before."""
    device, layers = model.device, _fusable_layers(model)
    for layer in layers:
        layer.to("cpu")
    empty_device_cache(device.type)
    for layer in layers:
        with torch.random.fork_rng([]):  # it draws weights, and then copies others
            layer.fuse_projections()
        _share(layer.to(device))
    return partial(_unfuse, layers)


def _share(layer: Attention) -> None:
    """The single projections become views of the fused one, which is no submodule: the state dict stays stock's."""
    name = _fused_name(layer)
    fused: Any = layer._modules.pop(name)
    vars(layer)[name] = fused
    singles: list[Any] = [getattr(layer, single) for single in FUSED_LAYERS[name]]
    sizes = [single.out_features for single in singles]
    for parameter in ("weight", "bias") if fused.bias is not None else ("weight",):
        parts = getattr(fused, parameter).data.split(sizes)
        for single, part in zip(singles, parts, strict=True):
            getattr(single, parameter).data = part


def _unfuse(layers: Iterable[Attention]) -> None:
    for layer in layers:
        layer.fused_projections = False
        del vars(layer)[_fused_name(layer)]
        for single in FUSED_LAYERS[_fused_name(layer)]:
            for parameter in getattr(layer, single).parameters():
                parameter.data = parameter.data.clone()


def _fused_name(layer: Attention) -> str:
    return "to_kv" if layer.is_cross_attention else "to_qkv"


def _why_not_fused(model: Any, settings: Mapping[str, Any]) -> str | None:
    if getattr(unwrap_module(model), "peft_config", None):
        return "LoRA is loaded, which acts on single projections"
    if is_quantised(model):
        return "weights are quantized"
    return _why_not_moved(model)


def _enable_compile(model: Any, settings: Mapping[str, Any]) -> Undo:
    options = settings["compile"] if isinstance(settings["compile"], Mapping) else {}
    blocks = compile_blocks(model, _called(model), options)
    return partial(uncompile_blocks, blocks, _called(model))


def _why_not_compiled(model: Any, settings: Mapping[str, Any]) -> str | None:
    if _is_compiled(model):
        return "compiled already"
    if _layers_are_offloaded(model):
        return "layers are offloaded"
    if any(type(layer).__name__ in model._repeated_blocks for layer in skipped_layers(model).values()):
        return "the step cache skips some of the blocks"
    if isinstance(settings["compile"], Mapping):
        return None
    if model.device.type == "cpu":
        return "on the CPU only a dict of options, such as `compile={'backend': 'inductor'}`, compiles"
    return None if has_triton() else "torch.compile needs triton, which is not installed"


def _enable_packing(model: Any, settings: Mapping[str, Any]) -> Undo:
    pack(model)
    return partial(unpack, model)


def _why_not_packed(model: Any, settings: Mapping[str, Any]) -> str | None:
    if not has_packed_convolutions():
        return "this PyTorch has no oneDNN, or not its operators for packed weights"
    if _is_compiled(model):
        return "compiled"
    if _layers_are_offloaded(model):
        return "layers are offloaded"
    return "weights are quantized" if is_quantised(model) else None


def _enable_graph(model: Any, settings: Mapping[str, Any]) -> Undo:
    for called in _called(model):
        graph(called, settings["recorder"])
    return partial(_each, ungraph, _called(model))


def _each(function: Callable[[Any], None], items: Iterable[Any]) -> None:
    for item in items:
        function(item)


def _why_no_graph(model: Any, settings: Mapping[str, Any]) -> str | None:
    options = settings["compile"]
    needed = settings["recorder"].device_type
    if model.device.type != needed:
        return f"CUDA graphs need weights on a CUDA device, and these are on {model.device.type!r}"
    if isinstance(options, Mapping) and options.get("mode") in _OWN_GRAPHS:
        return f"`compile` has the mode {options['mode']!r}, which records CUDA graphs itself"
    if is_compiled_whole(model):
        return "compiled as a whole"
    if is_quantised(model):
        return "weights are quantized"
    if skipped_layers(model):
        return "the step cache decides at each step what is computed"
    return _why_not_moved(model)


PARTS = (
    Part(
        "attention_backend",
        applies=lambda model: bool(attention_layers(model)),
        why_not=_why_no_attention_backend,
        enable=_enable_attention_backend,
        stays=True,
    ),
    Part(
        "channels_last",
        applies=lambda model: bool(_convolution_weights(model)),
        why_not=lambda model, settings: "layers are offloaded" if _layers_are_offloaded(model) else None,
        enable=_enable_channels_last,
        stays=True,
    ),
    Part(
        "fuse_projections",
        applies=lambda model: bool(_fusable_layers(model)),
        why_not=_why_not_fused,
        enable=_enable_fusing,
    ),
    Part("compile", applies=has_blocks, why_not=_why_not_compiled, enable=_enable_compile),
    Part(
        "packed_weights",
        applies=lambda model: bool(packable(model)),
        why_not=_why_not_packed,
        enable=_enable_packing,
    ),
    Part("cuda_graph", applies=has_blocks, why_not=_why_no_graph, enable=_enable_graph),
)


# ------------------------------------------------------------------------------------------------ models


def _called(model: Any) -> list[torch.nn.Module]:
    """The modules of a model whose forward a pipeline comes to call."""
    return [model.encoder, model.decoder] if isinstance(model, (VQModel, AutoencoderKL)) else [model]


def _fusable_layers(model: torch.nn.Module) -> list[Attention]:
    return [layer for layer in attention_layers(model) if _is_fusable(layer)]


def _is_fusable(layer: Attention) -> bool:
    known = (DispatchedAttnProcessor, DispatchedAttnAddedKVProcessor)
    single = (layer.to_q, layer.to_k, layer.to_v)
    return isinstance(text_processor(layer), known) and all(type(part) is torch.nn.Linear for part in single)


def _convolution_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [weight for weight in model.parameters() if weight.ndim == 4]


def _is_compiled(model: Any) -> bool:
    return is_compiled_whole(model) or any(map(is_compiled, model.modules()))


def _why_not_moved(model: torch.nn.Module) -> str | None:
    """Why weights cannot be expected to stay where they are."""
    if _layers_are_offloaded(model) or hasattr(unwrap_module(model), "_hf_hook"):
        return "weights are offloaded, and not always in the same place"
    if foreign_hooks(unwrap_module(model)):
        return "there are hooks of others"
    return None


def _layers_are_offloaded(model: torch.nn.Module) -> bool:
    return any(
        getattr(getattr(layer, "_hf_hook", None), "offload", False) or "group_offloading" in foreign_hooks(layer)
        for layer in model.modules()
    )


def _check(settings: Mapping[str, Any]) -> None:
    for name in ("channels_last", "fuse_projections", "packed_weights", "cuda_graph"):
        if not isinstance(settings[name], bool):
            raise TypeError(f"`{name}` is {settings[name]!r}; accepted is True or False.")
    options = settings["compile"]
    if not isinstance(options, (bool, Mapping)):
        raise TypeError(f"`compile` is {options!r}; accepted is True, False or a dict of options of torch.compile.")
    for option in options if isinstance(options, Mapping) else ():
        check_choice("compile", option, list(inspect.signature(torch.compile).parameters)[1:])
    if (backend := settings["attention_backend"]) is not None:
        check_choice("attention_backend", backend, [name.value for name in AttentionBackendName])
