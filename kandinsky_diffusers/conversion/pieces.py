"""Going through the numbers of a tensor piece by piece, so that memory does not grow with its size."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


_PIECE = 1 << 22  # numbers


def pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensor as flat pieces, views of it where its layout allows that."""
    return tensor.reshape(-1).split(_PIECE)


def extremes(piece: torch.Tensor) -> torch.Tensor:
    """The least and the greatest number of a piece that is not empty; both are NaN if any is.

    Asking these whether they are finite is twenty times faster than asking all.
    """
    import torch

    return torch.stack(torch.aminmax(piece if piece.itemsize > 1 else piece.float()))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are."""
    if not tensor.is_floating_point():
        return True
    return all(bool(extremes(piece).isfinite().all()) for piece in pieces(tensor) if piece.numel())


def same_bits(first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors of one shape, cast to ``dtype``, are the same bit for bit; so NaN equals itself."""
    import torch

    pairs = zip(pieces(first), pieces(second), strict=True)
    return all(torch.equal(_bits(one.to(dtype)), _bits(other.to(dtype))) for one, other in pairs)


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Of two tensors of one shape: the largest absolute difference, and this relative to the largest absolute value.

    Both are NaN where a number is not finite.
    """
    import torch

    differences, values = [0.0], [0.0]
    for one, other in zip(pieces(first), pieces(second), strict=True):
        if one.numel():
            pair = torch.stack((one.double(), other.double()))
            differences.append((pair[0] - pair[1]).abs().max().item())
            values.append(pair.abs().max().item())
    absolute, largest = (torch.tensor(found, dtype=torch.float64).max().item() for found in (differences, values))
    return absolute, absolute / largest if largest else 0.0


def _bits(piece: torch.Tensor) -> torch.Tensor:
    import torch

    return piece.contiguous().view(torch.uint8)
