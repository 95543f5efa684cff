"""What is in a picture of this world, by simple image analysis: nearest colours, connected areas, outlines."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch

from .world import COLORS, GROUNDS, PLACES, SHAPES, SIZE, signed_distance


LEAST_AREA = 40  # pixels; the smallest figure has three times as many, blurred edges have less
NAMES = (*COLORS, *GROUNDS)
PALETTE = np.array([*COLORS.values(), *GROUNDS.values()], dtype=np.float32)
WIDTH_OF_LARGE = 20  # pixels; small ones are at most 18 wide, large ones, the square among them, at least 21.6
FROM_CENTRE = PLACES["right"][0] - SIZE / 2


@dataclass(frozen=True)
class Seen:
    """A shape as seen: names as in `world`, and its area in pixels."""

    shape: str
    color: str
    place: str
    size: str
    area: int


@dataclass(frozen=True)
class Reading:
    """What is seen in a picture: its ground, and the shapes on it, the largest first."""

    ground: str
    figures: tuple[Seen, ...]

    def shows(self, shape: str | None = None, color: str | None = None, place: str | None = None) -> bool:
        """Whether some shape is as said; None fits any."""
        return any(
            shape in (None, seen.shape) and color in (None, seen.color) and place in (None, seen.place)
            for seen in self.figures
        )


def read(picture: PIL.Image.Image | np.ndarray | torch.Tensor) -> Reading:
    """Read a picture.

    Args:
        picture: of 64 x 64 pixels; an array `[64, 64, 3]` or a tensor `[3, 64, 64]` counts to 255.
    """
    pixels = picture.permute(1, 2, 0).cpu().numpy() if isinstance(picture, torch.Tensor) else np.asarray(picture)
    nearest = np.square(pixels[:, :, None].astype(np.float32) - PALETTE).sum(axis=-1).argmin(axis=-1)
    foreground = nearest < len(COLORS)
    ground = Counter(nearest[~foreground].tolist()).most_common(1)
    areas = [area for area in connected(foreground) if area.sum() >= LEAST_AREA]
    figures = sorted((_seen(area, nearest) for area in areas), key=lambda seen: -seen.area)
    return Reading(NAMES[ground[0][0]] if ground else "", tuple(figures))


def connected(mask: np.ndarray) -> list[np.ndarray]:
    """The areas of a mask whose pixels touch at their sides, as masks."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        around = np.pad(labels, 1)
        spread = np.maximum.reduce([labels, around[2:, 1:-1], around[:-2, 1:-1], around[1:-1, 2:], around[1:-1, :-2]])
        spread = np.where(mask, spread, 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _seen(area: np.ndarray, nearest: np.ndarray) -> Seen:
    color = NAMES[Counter(nearest[area].tolist()).most_common(1)[0][0]]
    rows, columns = np.flatnonzero(area.any(axis=1)), np.flatnonzero(area.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    size = "large" if max(bottom - top, right - left) > WIDTH_OF_LARGE else "small"
    place = _place((left + right) / 2 - SIZE / 2, (top + bottom) / 2 - SIZE / 2)
    return Seen(_shape(area[top:bottom, left:right]), color, place, size, int(area.sum()))


def _place(right: float, down: float) -> str:
    if max(abs(right), abs(down)) < FROM_CENTRE / 2:
        return "centre"
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "bottom" if down > 0 else "top"


def _shape(area: np.ndarray) -> str:
    """The shape whose outline, stretched to the same box, has most in common with the area."""
    return max(SHAPES, key=lambda shape: _overlap(area, _outline(shape, *area.shape)))


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def _outline(shape: str, height: int, width: int) -> np.ndarray:
    box = {"square": (-0.9, 0.9, -0.9, 0.9), "triangle": (-0.95, 0.85, -1.0, 1.0)}.get(shape, (-1.0, 1.0, -1.0, 1.0))
    top, bottom, left, right = box
    y = top + (bottom - top) * (torch.arange(height) + 0.5) / height
    x = left + (right - left) * (torch.arange(width) + 0.5) / width
    return (signed_distance(shape, x[None, :], y[:, None]) < 0).numpy()
