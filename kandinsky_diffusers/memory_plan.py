"""The plan by which a pipeline fits into a given memory, its explanation, and how it is carried out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

from .eight_bits import in_eight_bits
from .footprint import named_tensors
from .memory_estimates import OVERHEAD, RESERVE, Rung, Setting, autoencoder_of, casting, gigabytes, models_of


_GROUP_HOOKS = ("layer_execution_tracker", "lazy_prefetch_group_offloading", "group_offloading")


@dataclass(frozen=True)
class MemoryPlan:
    """How a pipeline fits into a budget; [`apply`] makes it so.

    Args:
        budget: bytes.
        device: where models run.
        size: height and width of the pictures in pixels.
        batch_size: pictures at once.
        sizes: of each model, bytes of its weights as they are.
        chosen: the fastest setting that fits.
        rejected: the faster ones, which do not.
    """

    budget: int
    device: torch.device
    size: tuple[int, int]
    batch_size: int
    sizes: Mapping[str, int]
    chosen: Rung
    rejected: tuple[Rung, ...] = field(default=(), repr=False)

    @property
    def setting(self) -> Setting:
        """What was chosen."""
        return self.chosen.setting

    @property
    def peak(self) -> int:
        """Estimated bytes of memory at the worst moment of a call."""
        return self.chosen.peak

    def explain(self) -> str:
        """What was chosen, and why, in several lines."""
        sizes = (f"  {name}: {gigabytes(size)}" for name, size in self.sizes.items())
        stages = (
            f"  {stage}: {gigabytes(stage.peak)} (weights on the device {gigabytes(stage.weights)}, while it runs"
            f" {gigabytes(stage.running or 0)})"
            for stage in self.chosen.stages
        )
        # where weights alone are too much, it is the same in pieces
        rejected = (f"  {rung}" for rung in self.rejected if rung.is_measured or not rung.setting.slicing)
        pictures = "one picture" if self.batch_size == 1 else f"{self.batch_size} pictures at once"
        lines = [
            f"{pictures} of {self.size[0]} x {self.size[1]} pixels in {gigabytes(self.budget)} on {self.device}",
            f"chosen, as the fastest that fits: {self.setting}",
            f"estimated peak: {gigabytes(self.peak)}, for {self.chosen.largest}",
            "weights as they are:",
            *sizes,
            f"estimated for each stage, with {gigabytes(RESERVE)} for what is no tensor, and {OVERHEAD} times what"
            " tensors need while a model runs:",
            *stages,
            "faster, but too large:" if self.rejected else "nothing is faster",
            *rejected,
        ]
        return "\n".join(lines)

    __str__ = explain

    def apply(self, pipe: Any) -> None:
        """Bring a pipeline into this state; offloading that it had before is taken off.

        Raises:
            ValueError: it has other models than those the plan is for, or a model's weights are offloaded to disk, or
                the device is not there. Nothing has been changed then.
            RuntimeError: something failed on the way; the message says what has been done.
        """
        if models_of(pipe).keys() != self.sizes.keys():
            raise ValueError(f"`pipe` has {', '.join(models_of(pipe))}; accepted is one with {', '.join(self.sizes)}.")
        check_available(self.device)
        _check_in_memory(models_of(pipe))
        steps = {
            "offloading was taken off": _take_off_hooks,
            "weights were cast": _cast,
            "text encoders were brought into 8 bits": _quantise,
            "slicing and tiling were set": _set_pieces,
            "models were placed": _place,
        }
        done: list[str] = []
        for what, step in steps.items():
            try:
                step(pipe, self)
            except (RuntimeError, ValueError, TypeError, OSError) as error:
                state = ", ".join(done) or "nothing was changed"
                raise RuntimeError(f"The plan could not be applied, after: {state}. {error}") from error
            done.append(what)


# ----------------------------------------------------------------------------------------------- applying
def _take_off_hooks(pipe: Any, plan: MemoryPlan) -> None:
    pipe.reset_device_map()
    pipe.remove_all_hooks()
    pipe._streamed = ()
    for model in models_of(pipe).values():
        for registry in _hook_registries(model):
            for name in _GROUP_HOOKS:
                registry.remove_hook(name, recurse=False)


def _check_in_memory(models: Mapping[str, Any]) -> None:
    for name, model in models.items():
        for registry in _hook_registries(model):
            hook: Any = registry.get_hook("group_offloading")
            if hook is not None and hook.group.offload_to_disk_path is not None:
                raise ValueError(f"the weights of `{name}` are offloaded to disk; load the pipeline anew to fit it.")


def _hook_registries(model: nn.Module) -> Iterator[HookRegistry]:
    return (vars(part)["_diffusers_hook"] for part in model.modules() if "_diffusers_hook" in vars(part))


def _cast(pipe: Any, plan: MemoryPlan) -> None:
    for component, model in models_of(pipe).items():
        dtype_of = casting(pipe, component, model, plan.setting.half)
        for name, tensor in named_tensors(model):
            tensor.data = tensor.data.to(dtype_of(name, tensor))


def _quantise(pipe: Any, plan: MemoryPlan) -> None:
    for name in plan.setting.eight_bits:
        in_eight_bits(models_of(pipe)[name])


def _set_pieces(pipe: Any, plan: MemoryPlan) -> None:
    autoencoder, tile = autoencoder_of(pipe), plan.setting.tile
    if autoencoder is None:
        return
    (autoencoder.enable_slicing if plan.setting.slicing else autoencoder.disable_slicing)()
    if tile is None:
        autoencoder.disable_tiling()
    else:
        autoencoder.enable_tiling(*([] if isinstance(autoencoder, AutoencoderKL) else [tile]))


def _place(pipe: Any, plan: MemoryPlan) -> None:
    setting, models = plan.setting, models_of(pipe)
    if not setting.offload:
        pipe.to(plan.device)
        return
    for name in setting.streamed:
        apply_group_offloading(models[name], plan.device, offload_type="leaf_level")
    pipe._streamed = setting.streamed
    if len(setting.streamed) < len(models):
        pipe.enable_model_cpu_offload(device=plan.device)


def check_available(device: torch.device) -> None:
    """Raises ValueError where torch finds no such device."""
    backend: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and not (backend is not None and backend.is_available()):
        raise ValueError(
            f"`device` is {device}, which torch does not find here; `plan_fit` plans for it all the same."
        )
