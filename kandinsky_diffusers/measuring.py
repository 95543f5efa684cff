"""What a call costs, counted and not timed: bytes of memory, and floating-point operations.

Both counts are the same on every machine, and need no memory of their own where models and inputs are made under
`FakeTensorMode`, which computes shapes and no numbers:

    with FakeTensorMode(), torch.no_grad():
        movq = MoVQ(**config)
        bytes_ = peak_bytes(lambda: movq.decode(torch.randn(1, 4, 256, 256), force_not_quantize=True))
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

from .packed_convolutions import has_packed_convolutions


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes of tensors alive at once, of those that were allocated while `function()` ran.

    Inputs and weights that were there before do not count, views and in-place results count once, and tensors of all
    devices are added up. Not seen is what lives only within one operator: scratch memory of oneDNN, cuDNN and other
    libraries, such as copies in another memory layout; tensors in the layout of oneDNN, as between `to_mkldnn()` and
    `to_dense()`; and what an allocator keeps of freed memory. A process can therefore need more.

    Args:
        function: run once, in the calling thread. A `FakeTensorMode` has to be entered around this call.
    """
    with _StorageCounter() as counter:
        function()
    return counter.peak


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in `function()`.

    A multiplication and an addition are two of them. What works element by element does not count.

    Args:
        function: run once, in the calling thread. A `FakeTensorMode` has to be entered around this call.
    """
    aten = torch.ops.aten
    missing = {  # in torch's own table
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten.mkldnn_linear: _linear_flops,
    }
    if has_packed_convolutions():
        missing[torch.ops.mkldnn._convolution_pointwise] = _convolution_flops
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        function()
    return counter.get_total_flops()


class _StorageCounter(TorchDispatchMode):
    """Adds the storages that operators return, and subtracts each when it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for storage in _storages(results):
            if id(storage) not in given and id(storage) not in self._alive:
                self._count(storage)
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def forget(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._alive[key]
            self._bytes -= size

        self._alive[key] = weakref.ref(storage, forget)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """From the shapes of the operator's tensors."""
    return sdpa_flop_count(query, key, value)


def _linear_flops(rows: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Likewise."""
    return 2 * math.prod(rows) * weight[0]


def _convolution_flops(image: list[int], weight: list[int], *args: Any, out_shape: list[int], **kwargs: Any) -> int:
    """Likewise."""
    return conv_flop_count(image, weight, out_shape)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]  # such a tensor has none
