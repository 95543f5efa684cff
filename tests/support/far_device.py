"""A device that is only said to be one: what would make the host wait for it is recorded.

Tensors on it have their numbers on the CPU, and report the device `meta`. So code that asks for the device takes the
ways that it takes with an accelerator, which a test can then follow on any machine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


FAR = torch.device("meta")
READING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "is_nonzero")


class FarTensor(torch.Tensor):
    """A tensor on that device; `own` has its numbers."""

    own: torch.Tensor

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> FarTensor:
        far = torch.Tensor._make_wrapper_subclass(
            cls, own.size(), strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype, device=FAR
        )
        far.own = own
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, [])


class FarDevice(TorchDispatchMode):
    """While it is entered, factories make tensors on the device, and `waits` grows with each time the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.waits)


def run(func: Any, args: Any, kwargs: dict[str, Any], waits: list[str]) -> Any:
    """The operation on the CPU; its results are where they would be."""
    inputs = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    far_inputs = [item for item in inputs if isinstance(item, FarTensor)]
    name, wanted = func.overloadpacket.__name__, kwargs.get("device")
    goes_far = bool(far_inputs) if wanted is None else torch.device(wanted) == FAR
    moves = wanted is not None and bool(inputs) and goes_far != bool(far_inputs)
    masks = name in ("index", "index_put_") and any(item.dtype is torch.bool for item in far_inputs)
    if (moves and not kwargs.get("non_blocking")) or masks or (far_inputs and name in READING):
        waits.append(name)
    assert not far_inputs or moves or all(isinstance(item, FarTensor) or item.ndim == 0 for item in inputs), (
        f"{name} of tensors on two devices"
    )
    near = {id(item.own): item for item in far_inputs}
    kwargs = kwargs if wanted is None else {**kwargs, "device": "cpu"}
    result = func(*tree_map(_own, args), **tree_map(_own, kwargs))
    if not goes_far:
        return result
    return tree_map(
        lambda item: near.get(id(item), FarTensor(item)) if isinstance(item, torch.Tensor) else item, result
    )


def _own(item: Any) -> Any:
    return item.own if isinstance(item, FarTensor) else item


def moved_far(model: torch.nn.Module) -> None:
    """Put parameters and buffers of `model` on the device, in place."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(FarTensor(parameter.data), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, FarTensor(buffer))


def waits_in_the_loop(pipe: Any, predict: str = "predict_noise", **arguments: Any) -> list[str]:
    """What makes the host wait from the first prediction of a call of `pipe` to its last step.

    Its models have to be on the device. A step-end callback counts, and waits for nothing itself.
    """
    marks: list[int] = []
    original = getattr(pipe, predict)

    def mark(*_: Any) -> dict[str, Any]:
        marks.append(len(far.waits))
        return {}

    def predicting(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not marks:
            mark()
        return original(*args, **kwargs)

    setattr(pipe, predict, predicting)
    try:
        with FarDevice() as far:
            pipe(**arguments, callback_on_step_end=mark)
    finally:
        setattr(pipe, predict, original)
    assert len(marks) > 2, "a prediction and several steps"
    return far.waits[marks[0] : marks[-1]]
