"""Pictures as prompts: what a call gives to IP-Adapters, checked, and how it is mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import PIL.Image
import torch

from ..images import made_rgb, pixels_from, pixels_to, size_of


Leaves = Callable[[Any], list[torch.Tensor]]
WEIGHTS = "ip_adapter_weights"


@dataclass(frozen=True)
class Mixture:
    """Pictures or embeddings for one adapter, and how embeddings for the drawn pictures are mixed of theirs.

    Args:
        items: pixel values `[items, 3, height, width]`, or embeddings `[items, width]`.
        weights: `[1 or prompts or pictures drawn, items]`.
    """

    items: torch.Tensor
    weights: torch.Tensor

    @property
    def has_pictures(self) -> bool:
        """Whether the items are pictures, which are to be embedded yet."""
        return self.items.ndim == 4

    def mix(self, embeds: torch.Tensor) -> torch.Tensor:
        """`[rows, width]`, the weighted sums of the items' embeddings `[items, width]`, as the original makes them.

        (kandinsky3_diffusers/pipelines/kandinsky3/kandinsky3_pipeline_ip_adapter.py; weights may sum up to anything.)
        """
        return self.weights.to(embeds) @ embeds


def mixtures(given: Any, weights: Any, name: str, leaves: Sequence[Leaves]) -> list[Mixture]:
    """What is given for all adapters, one [`Mixture`] for each.

    For a single adapter it is given as it is, for several in a list. For each it is

    * one item, for all pictures that are drawn;
    * several in a list, one for each prompt or picture;
    * several in a list, and as many weights: their mixture, for all pictures;
    * several lists: a mixture for each prompt or picture, with the weights for all or a list of them for each, and
      without weights of equal parts.

    Args:
        given: by the user.
        weights: by the user, or None.
        name: of the argument, for errors.
        leaves: for each adapter, what makes a list of items of a picture, an array or a tensor.

    Raises:
        TypeError, ValueError: it is not as described.
    """
    if len(leaves) == 1:
        return [_mixture(given, weights, name, leaves[0])]
    items = _for_each(given, len(leaves), name)
    own_weights = [None] * len(leaves) if weights is None else _for_each(weights, len(leaves), WEIGHTS)
    return [_mixture(*of_one[:2], name, of_one[2]) for of_one in zip(items, own_weights, leaves, strict=True)]


def _for_each(values: Any, adapters: int, name: str) -> list[Any]:
    if not isinstance(values, (list, tuple)) or len(values) != adapters:
        what = f"a list of {len(values)}" if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
        raise ValueError(f"`{name}` is {what}; accepted is a list with one item for each of {adapters} IP-Adapters.")
    return list(values)


def _mixture(given: Any, weights: Any, name: str, leaves: Leaves) -> Mixture:
    nested = isinstance(given, (list, tuple)) and any(isinstance(part, (list, tuple)) for part in given)
    rows = [_flat(row, name, leaves) for row in given] if nested else [_flat(given, name, leaves)]
    if weights is None and not nested:
        return Mixture(torch.stack(rows[0]), torch.eye(len(rows[0])))
    own = _weights_for(weights, [len(row) for row in rows], nested)
    items = torch.stack([item for row in rows for item in row])
    return Mixture(items, torch.block_diag(*(torch.tensor([row]) for row in own)))


def _flat(given: Any, name: str, leaves: Leaves) -> list[torch.Tensor]:
    parts = given if isinstance(given, (list, tuple)) else [given]
    items = [item for part in parts for item in leaves(part)]
    if not items:
        raise ValueError(f"`{name}` has an empty list; at least one item is needed.")
    return items


def _weights_for(weights: Any, counts: list[int], nested: bool) -> list[list[float]]:
    """A list of weights for each of the rows, which have so many items."""
    if weights is None:
        return [[1.0 / count] * count for count in counts]
    values = weights.tolist() if hasattr(weights, "tolist") else weights
    if not isinstance(values, (list, tuple)) or not values:
        raise TypeError(f"`{WEIGHTS}` is {weights!r}; accepted is a list of numbers, one for each picture.")
    several = nested and all(isinstance(row, (list, tuple)) for row in values)
    rows = list(values) if several else [values] * len(counts)
    if [len(row) for row in rows] != counts:
        raise ValueError(
            f"`{WEIGHTS}` has {' + '.join(str(len(row)) for row in rows)} numbers; accepted is one for each of"
            f" {' + '.join(map(str, counts))} pictures."
        )
    if not all(isinstance(w, Real) and math.isfinite(w) for row in rows for w in row):
        raise TypeError(f"`{WEIGHTS}` is {weights!r}; accepted are finite numbers.")
    return [[float(w) for w in row] for row in rows]


def pil_pictures(picture: Any, name: str) -> list[PIL.Image.Image]:
    """A picture, or a batch of them as array or tensor, as PIL pictures; values as [`images.pixels_from`] has them.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(picture, PIL.Image.Image):
        return [made_rgb(picture, name)]
    return pixels_to(pixels_from(picture, *size_of(picture, name), name), "pil")
