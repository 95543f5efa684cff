"""Guidance in a part of the run (https://arxiv.org/abs/2404.07724): approximate, and at half the cost elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .inputs import check_interval


def guided_steps(count: int, interval: Sequence[float]) -> range:
    """Which of `count` steps, counted from 0, are guided: from `round(count * start)` on, before `round(count * end)`.

    Args:
        count: number of steps of the run.
        interval: start and end, shares of the run.

    Raises:
        TypeError, ValueError: `interval` is no pair of numbers with 0 <= start < end <= 1, or no step lies in it.
    """
    check_interval("guidance_interval", interval)
    start, end = interval
    steps = range(round(count * start), round(count * end))
    if count and not steps:
        raise ValueError(
            f"`guidance_interval` is {interval!r}, in which none of {count} steps lies; accepted is a longer one."
        )
    return steps


class ConditionalHalf:
    """The conditions of the steps that are not guided: no negative ones, and of two halves the last.

    A tensor stays the same object from step to step for as long as the condition does, so that what the network has
    computed of it can be kept.
    """

    def __init__(self) -> None:
        self._halves: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, conditions: Mapping[str, torch.Tensor], images: int) -> dict[str, Any]:
        """The half of `conditions`, named tensors that may be others at each step.

        Args:
            conditions: of one row for each image, or two with the unconditional half first.
            images: their number.
        """
        positive = {name: rows for name, rows in conditions.items() if not name.startswith("negative_")}
        return {name: self._half(name, rows, images) for name, rows in positive.items()}

    def _half(self, name: str, rows: torch.Tensor, images: int) -> torch.Tensor:
        if len(rows) <= images:
            return rows
        if name not in self._halves or self._halves[name][0] is not rows:
            self._halves[name] = rows, rows[-images:]
        return self._halves[name][1]
