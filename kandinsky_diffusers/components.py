"""Better classes for stock components: they share the component's weights, and are saved under the stock name."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import DDPMScheduler, PriorTransformer, UnCLIPScheduler, VQModel
from diffusers import UNet2DConditionModel as StockUNet2DConditionModel
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3UNet as StockKandinsky3UNet
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import unwrap_module


T = TypeVar("T")

FIXED_BY = ("_hf_hook", "_diffusers_hook", "_compiled_call_impl", "forward")


class SavedAsStock:
    """Mixed in before a stock class that [`adopt`] replaces: folders name the stock class, and load without us."""

    def to_json_string(self) -> str:
        """The configuration as JSON, with the stock class as `_class_name`."""
        config = json.loads(super().to_json_string())
        identity = stock_identity(self)
        if identity is not None:
            config["_class_name"] = identity[1]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def replaces(cls, component: Any) -> bool:
        """Whether this class does everything that `component`, of the stock class, is configured to do."""
        return True

    @property
    def runs_in_stock(self) -> bool:
        """Whether the stock class can load what this object saves."""
        return True

    def _on_shared_state(self) -> None:
        """Called by [`view_as`] in place of `__init__`."""


def adopt(component: Any) -> Any:
    """`component` as the better class there is for exactly its class, or `component` itself.

    Models share their state with the stock object (see [`view_as`]); schedulers are built anew from its configuration.

    Raises:
        ValueError: see [`view_as`].
    """
    better = _better_classes().get(type(component))
    if better is None or not better.replaces(component):
        return component
    if isinstance(component, SchedulerMixin):
        return better.from_config(component.config)
    return view_as(component, better)


def stock_identity(component: Any) -> tuple[str, str] | None:
    """Library and class that `model_index.json` has to name for `component`; None where diffusers chooses rightly.

    It is for the classes that [`adopt`] puts in, and for transformers' `CLIPImageProcessorPil`, a name that older
    releases do not know, and that loads as `CLIPImageProcessor`. A user's subclass keeps its own name.
    """
    cls = type(unwrap_module(component))
    if cls.__name__ == "CLIPImageProcessorPil" and cls.__module__.startswith("transformers."):
        return "transformers", "CLIPImageProcessor"
    for stock, better in _better_classes().items():
        if cls is better:
            return ("diffusers", stock.__name__) if component.runs_in_stock else None
    return None


def view_as(component: Any, cls: type[T]) -> T:
    """An object of class `cls` that shares all state with `component`, whose class `cls` extends.

    Weights, buffers, configuration, adapters and device are the same ones, seen through both objects.

    Raises:
        ValueError: `component` has been offloaded, hooked or compiled, which fixed its old `forward`.
        TypeError: `cls` does not extend its class.
    """
    if type(component) is cls:
        return component
    if not issubclass(cls, type(component)):
        raise TypeError(f"`cls` is {cls.__name__}; accepted are classes that extend {type(component).__name__}.")
    if name := what_fixes_forward(component, cls):
        raise ValueError(
            f"`{type(component).__name__}` was offloaded, hooked or compiled (`{name}`) before a Kandinsky "
            "pipeline took it; its old `forward` would go on running. Hand it over first, and then call "
            "`enable_model_cpu_offload()`, `enable_group_offload()` or `compile()`."
        )
    hook = _detach_placement(component)
    remove_leftovers(component, cls)
    view: Any = cls.__new__(cls)
    object.__setattr__(view, "__dict__", vars(component))
    if issubclass(cls, SavedAsStock):
        view._on_shared_state()
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(view, hook)
    return view


def what_fixes_forward(component: Any, cls: type) -> str | None:
    """The attribute by which offloading, a hook or a compiler has fixed the `forward` of a model, if anything has.

    What hooks leave behind when they are removed does not count, nor does the hook of `device_map=...`, which moves
    along.
    """
    state = vars(component)
    fixed = [name for name in FIXED_BY if state.get(name) is not None]
    if "_diffusers_hook" in fixed and not state["_diffusers_hook"].hooks:
        fixed.remove("_diffusers_hook")
    if _placement(component) is not None:
        fixed.remove("_hf_hook")
        forward = state.get("_old_forward")
    else:
        forward = state.get("forward")
    if "forward" in fixed and getattr(forward, "__func__", None) in (type(component).forward, cls.forward):
        fixed.remove("forward")
    return fixed[0] if fixed else None


def parts_of(model: torch.nn.Module, cls: type[torch.nn.Module]) -> list[tuple[torch.nn.Module, str, Any]]:
    """All parts of `model` that are of exactly the class `cls`: in which module, under which name, and the part."""
    places = [(parent, name, part) for parent in model.modules() for name, part in parent.named_children()]
    return [(parent, name, part) for parent, name, part in places if type(part) is cls]


def is_quantised(model: Any) -> bool:
    """Whether a library, such as bitsandbytes, has quantised the weights when the model was loaded."""
    told_by = ("quantization_method", "hf_quantizer", "is_quantized")
    return any(getattr(model, name, None) for name in told_by)


@contextmanager
def hidden(pipe: Any, names: Sequence[str]) -> Iterator[None]:
    """A pipeline without these components; they are not taken off: its configuration stays."""
    kept = {name: getattr(pipe, name) for name in names}
    vars(pipe).update(dict.fromkeys(kept))
    try:
        yield
    finally:
        vars(pipe).update(kept)


@functools.cache
def _better_classes() -> dict[type, type[SavedAsStock]]:
    # imported here, because they are built on this module
    from .k3.unet import Kandinsky3UNet
    from .movq import MoVQ
    from .prior import CachedPriorTransformer
    from .schedulers import Kandinsky3DDPMScheduler, KandinskyUnCLIPScheduler
    from .unet import UNet2DConditionModel

    return {
        StockKandinsky3UNet: Kandinsky3UNet,
        VQModel: MoVQ,
        PriorTransformer: CachedPriorTransformer,
        StockUNet2DConditionModel: UNet2DConditionModel,
        UnCLIPScheduler: KandinskyUnCLIPScheduler,
        DDPMScheduler: Kandinsky3DDPMScheduler,
    }


def _placement(component: Any) -> Any:
    """The hook of `device_map=...`, which a pipeline's components have before the pipeline sees them."""
    if not isinstance(component, torch.nn.Module) or not hasattr(component, "_hf_hook"):
        return None
    from accelerate.hooks import AlignDevicesHook

    hook = component._hf_hook
    return hook if isinstance(hook, AlignDevicesHook) and not hook.offload else None


def _detach_placement(component: Any) -> Any:
    hook = _placement(component)
    if hook is not None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(component)
    return hook


def remove_leftovers(component: Any, cls: type) -> None:
    """Drop what removed hooks leave behind, on `component` or on an earlier view of it that shares its state.

    It is an empty registry, and the class's own `forward` as an attribute. `cls` extends the class of `component`.
    """
    state = vars(component)
    if "_diffusers_hook" in state and not state["_diffusers_hook"].hooks:
        del state["_diffusers_hook"]
    if "forward" in state and getattr(state["forward"], "__func__", None) in (type(component).forward, cls.forward):
        del state["forward"]
