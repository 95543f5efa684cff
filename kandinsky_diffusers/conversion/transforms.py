"""Named tensor transforms, each with its inverse.

A transform takes a tuple of tensors and returns a tuple of tensors.  It never looks at values, so the very same object
computes shapes (on meta tensors, while planning), converts (on mapped files) and converts back (``inverse``).
All raise ``ValueError`` when a shape does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol


if TYPE_CHECKING:
    from torch import Tensor


class Transform(Protocol):
    """What a rule may do to its tensors."""

    @property
    def inverse(self) -> Transform:
        """The transform that undoes this one exactly."""
        ...

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the transformed tensors, as views wherever that is possible."""
        ...


@dataclass(frozen=True)
class Squeeze:
    """Remove ``count`` trailing axes of length 1: the weight of a 1x1 convolution becomes that of a linear layer."""

    count: int = 1

    @property
    def inverse(self) -> Unsqueeze:
        return Unsqueeze(self.count)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self._squeeze(tensor) for tensor in tensors)

    def _squeeze(self, tensor: Tensor) -> Tensor:
        if tensor.ndim < self.count or any(length != 1 for length in tensor.shape[tensor.ndim - self.count :]):
            raise ValueError(f"the last {self.count} axes of shape {list(tensor.shape)} are not all of length 1")
        return tensor.reshape(tensor.shape[: tensor.ndim - self.count])


@dataclass(frozen=True)
class Unsqueeze:
    """Append ``count`` trailing axes of length 1."""

    count: int = 1

    @property
    def inverse(self) -> Squeeze:
        return Squeeze(self.count)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.reshape(*tensor.shape, *(1,) * self.count) for tensor in tensors)


@dataclass(frozen=True)
class AddLeadingAxis:
    """A vector ``[n]`` becomes a row ``[1, n]``."""

    @property
    def inverse(self) -> DropLeadingAxis:
        return DropLeadingAxis()

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.unsqueeze(0) for tensor in tensors)


@dataclass(frozen=True)
class DropLeadingAxis:
    """A row ``[1, n]`` becomes a vector ``[n]``."""

    @property
    def inverse(self) -> AddLeadingAxis:
        return AddLeadingAxis()

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for tensor in tensors:
            if tensor.ndim == 0 or tensor.shape[0] != 1:
                raise ValueError(f"the first axis of shape {list(tensor.shape)} is not of length 1")
        return tuple(tensor.squeeze(0) for tensor in tensors)


@dataclass(frozen=True)
class Flatten:
    """A vector, or one with leading axes of length 1, becomes a vector ``[n]``; undone, it stays one."""

    @property
    def inverse(self) -> Flatten:
        return self

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for tensor in tensors:
            if tensor.ndim == 0 or tensor.numel() != tensor.shape[-1]:
                raise ValueError(f"shape {list(tensor.shape)} is not that of a vector")
        return tuple(tensor.reshape(-1) for tensor in tensors)


@dataclass(frozen=True)
class Transpose:
    """Swap two axes."""

    first: int = 0
    second: int = 1

    @property
    def inverse(self) -> Transpose:
        return self

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if any(max(self.first, self.second) >= tensor.ndim for tensor in tensors):
            raise ValueError(f"axes {self.first} and {self.second} cannot be swapped in {_shapes(tensors)}")
        return tuple(tensor.transpose(self.first, self.second) for tensor in tensors)


@dataclass(frozen=True)
class Split:
    """One tensor becomes ``parts`` equal ones along ``axis``."""

    parts: int
    axis: int = 0

    @property
    def inverse(self) -> Concat:
        return Concat(self.parts, self.axis)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tensor = _only(tensors)
        if tensor.ndim <= self.axis or tensor.shape[self.axis] % self.parts:
            raise ValueError(f"axis {self.axis} of shape {list(tensor.shape)} cannot be cut in {self.parts}")
        return tuple(tensor.chunk(self.parts, self.axis))


@dataclass(frozen=True)
class Concat:
    """``parts`` equally shaped tensors become one along ``axis``."""

    parts: int
    axis: int = 0

    @property
    def inverse(self) -> Split:
        return Split(self.parts, self.axis)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        import torch

        _check_alike(tensors, self.parts)
        return (torch.cat(tensors, self.axis),)


@dataclass(frozen=True)
class SplitHeads:
    """Take a fused projection apart whose rows are interleaved per head.

    The rows ``[part 0 of head 0, part 1 of head 0, ..., part 0 of head 1, ...]`` with ``head_dim`` rows each become
    ``parts`` tensors with the rows of all heads.  This is the layout of guided-diffusion's ``QKVAttention``.
    """

    head_dim: int
    parts: int = 3

    @property
    def inverse(self) -> MergeHeads:
        return MergeHeads(self.head_dim, self.parts)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tensor = _only(tensors)
        rows = self.head_dim * self.parts
        if tensor.ndim == 0 or tensor.shape[0] % rows:
            raise ValueError(
                f"shape {list(tensor.shape)} does not hold {self.parts} parts in heads of {self.head_dim} rows"
            )
        heads = tensor.reshape(-1, self.parts, self.head_dim, *tensor.shape[1:])
        return tuple(heads[:, part].reshape(-1, *tensor.shape[1:]) for part in range(self.parts))


@dataclass(frozen=True)
class MergeHeads:
    """Interleave ``parts`` projections per head into one fused tensor; undoes :class:`SplitHeads`."""

    head_dim: int
    parts: int = 3

    @property
    def inverse(self) -> SplitHeads:
        return SplitHeads(self.head_dim, self.parts)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        import torch

        _check_alike(tensors, self.parts)
        shape = tensors[0].shape
        if len(shape) == 0 or shape[0] % self.head_dim:
            raise ValueError(f"shape {list(shape)} does not hold heads of {self.head_dim} rows")
        heads = [tensor.reshape(-1, 1, self.head_dim, *shape[1:]) for tensor in tensors]
        return (torch.cat(heads, 1).reshape(-1, *shape[1:]),)


def _only(tensors: tuple[Tensor, ...]) -> Tensor:
    if len(tensors) != 1:
        raise ValueError(f"one tensor can be taken apart, not {len(tensors)}")
    return tensors[0]


def _check_alike(tensors: tuple[Tensor, ...], parts: int) -> None:
    if len(tensors) != parts or len({tensor.shape for tensor in tensors}) != 1:
        raise ValueError(f"{parts} tensors of one shape can be put together, not {_shapes(tensors)}")


def _shapes(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors)
