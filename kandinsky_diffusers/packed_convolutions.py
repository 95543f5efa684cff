"""Convolutions that keep their weight in the layout in which oneDNN computes on the CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .components import parts_of


SAMPLED = 64  # numbers of a weight that are compared to see whether it has changed
OPERATORS = ("_reorder_convolution_weight", "_convolution_pointwise")  # of oneDNN, which torch.compile uses as well


class PackedConv2d(torch.nn.Conv2d):
    """[`torch.nn.Conv2d`] that copies its weight into oneDNN's own layout once, and not at each call.

    It computes what oneDNN does in channels-last, and leaves its output so. The copy is made when it is first needed,
    and anew for pictures of another size, or when the weight has changed. Calls that need gradients, autocast or
    tracing, and those with other inputs than float32 or bfloat16 on the CPU, run as ever.

    A change is seen by address, by autograd's count of changes in place, and by a sample of the numbers: what is
    written through `weight.data`, as by averaging or merging LoRAs, is not counted. Single numbers can so escape.
    """

    _packed: _PackedWeight | None = None

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not _can_be_packed(input, weight):
            return super()._conv_forward(input, weight, bias)
        packed, settings = self._packed, (self.padding, self.stride, self.dilation, self.groups)
        if packed is None or not packed.is_still(weight, input):
            packed = self._packed = _PackedWeight(weight, input, settings)
        return torch.ops.mkldnn._convolution_pointwise(input, packed.tensor, bias, *settings, "none", [], "")

    def _get_name(self) -> str:
        return torch.nn.Conv2d.__name__

    def __getstate__(self) -> dict[str, Any]:
        """Without the copy of the weight, which makes its own."""
        return {name: value for name, value in vars(self).items() if name != "_packed"}


class _PackedWeight:
    """A copy of a weight in the layout that oneDNN chooses for a size of pictures."""

    def __init__(self, weight: torch.Tensor, input: torch.Tensor, settings: tuple[Any, ...]) -> None:
        weight = weight.detach()
        self._look, self._sample = _look(weight, input), _sample(weight)
        self.tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, input.shape)

    def is_still(self, weight: torch.Tensor, input: torch.Tensor) -> bool:
        """Whether it is a copy of `weight` as that is now, for pictures of the size of `input`."""
        return self._look == _look(weight, input) and torch.equal(self._sample, _sample(weight))


def pack(model: torch.nn.Module) -> None:
    """Let the convolutions of `model` that are on the CPU keep packed weights, until [`unpack`]."""
    for layer in packable(model):
        layer.__class__ = PackedConv2d  # the module stays the one it was, in whatever it is referred to or wrapped


def unpack(model: torch.nn.Module) -> None:
    """Take back what [`pack`] has done."""
    for _, _, layer in parts_of(model, PackedConv2d):
        vars(layer).pop("_packed", None)
        layer.__class__ = torch.nn.Conv2d


def packable(model: torch.nn.Module) -> list[Any]:
    """The convolutions of `model` whose weights can be packed."""
    return [layer for _, _, layer in parts_of(model, torch.nn.Conv2d) if _is_packable(layer)]


def _is_packable(layer: torch.nn.Conv2d) -> bool:
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and layer.groups == 1
    return plain and layer.weight.device.type == "cpu"


def has_packed_convolutions() -> bool:
    """Whether this PyTorch has oneDNN, and its operators that [`PackedConv2d`] uses."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)


@functools.cache
def _dtypes() -> tuple[torch.dtype, ...]:
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


def _can_be_packed(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this call may use a packed weight; `type` tells of tensors that compute nothing, or otherwise."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    if torch.is_autocast_enabled("cpu") or type(input) is not torch.Tensor or input.ndim != 4:
        return False
    on_cpu = input.device.type == weight.device.type == "cpu"
    return on_cpu and input.dtype == weight.dtype and input.dtype in _dtypes()


def _look(weight: torch.Tensor, input: torch.Tensor) -> tuple[Any, ...]:
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, input.shape[-2:]


def _sample(weight: torch.Tensor) -> torch.Tensor:
    return weight.take(torch.arange(0, weight.numel(), max(weight.numel() // SAMPLED, 1)))
