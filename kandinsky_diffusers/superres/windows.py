"""Windows over a picture that is larger than what the network is to see at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Windows:
    """How a picture is covered.

    Args:
        size: side of a window in pixels.
        stride: from one window to the next, at most `size`.
        batch: how many windows the network gets at once.
    """

    size: int
    stride: int
    batch: int

    def starts(self, length: int) -> list[int]:
        """Where windows begin along a side of so many pixels; the last one is shifted back to end with the side."""
        count = -(-max(length - self.size, 0) // self.stride) + 1
        return [max(min(number * self.stride, length - self.size), 0) for number in range(count)]

    def average(self, function: Callable[..., torch.Tensor], canvases: Sequence[torch.Tensor]) -> torch.Tensor:
        """`function` of each window, averaged with equal weights where windows overlap.

        (Formula (5) of MultiDiffusion, https://arxiv.org/abs/2302.08113. The original averages what the solver's step
        makes of each window; the step is linear, so that it may follow the average.)

        Args:
            function: `(windows of each canvas) -> prediction`, all `[batch, channels, size, size]`, or smaller where
                a side of the picture is.
            canvases: `[1, channels, height, width]` each.

        Returns:
            `[1, channels, height, width]`, on the device of the first canvas.
        """
        tops, lefts = (self.starts(length) for length in canvases[0].shape[-2:])
        total = torch.zeros_like(canvases[0])
        windows = list(itertools.product(tops, lefts))
        for first in range(0, len(windows), self.batch):
            corners = windows[first : first + self.batch]
            crops = (torch.cat([self._crop(canvas, *corner) for corner in corners]) for canvas in canvases)
            predictions = function(*crops).to(total)
            for corner, prediction in zip(corners, predictions.split(1), strict=True):
                self._crop(total, *corner).add_(prediction)
        height, width = total.shape[-2:]
        rows, columns = self._counts(tops, total.new_zeros(height)), self._counts(lefts, total.new_zeros(width))
        return total.div_(rows[:, None]).div_(columns)

    def _crop(self, canvas: torch.Tensor, top: int, left: int) -> torch.Tensor:
        return canvas[..., top : top + self.size, left : left + self.size]

    def _counts(self, starts: Sequence[int], counts: torch.Tensor) -> torch.Tensor:
        for start in starts:
            counts[start : start + self.size] += 1  # where it is: what is copied there makes the host wait
        return counts
