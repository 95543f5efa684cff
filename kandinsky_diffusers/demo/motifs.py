"""What is in the pictures of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Motifs:
    """Prompts, and what is varied.

    Args:
        prompts: for a picture each, the first one also for several seeds.
        start: of the picture from which image to image and inpainting begin.
        change: what image to image makes of it, and where the mixtures lead.
        addition: what inpainting makes of it; the upper half is repainted.
        seeds: of the pictures of the first prompt.
        strengths: of image to image, from 0 to 1.
        image_guidance: guidance scale of image to image.
        shares: of `change` in the mixtures, from 0 to 1.
    """

    prompts: tuple[str, ...]
    start: str
    change: str
    addition: str
    seeds: Sequence[int] = range(6)
    strengths: Sequence[float] = (0.2, 0.4, 0.6, 0.8)
    image_guidance: float = 4.0
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)

    @classmethod
    def of(cls, prompts: Sequence[str]) -> Self:
        """Motifs for any prompts: the first one is the start, the second the change, and the last the addition.

        Raises:
            ValueError: there is no prompt.
        """
        if not prompts:
            raise ValueError("`prompts` is empty; accepted is at least one.")
        return cls(tuple(prompts), start=prompts[0], change=prompts[min(1, len(prompts) - 1)], addition=prompts[-1])


# what the release in training/ has learned to draw
COLOURED_SHAPES = Motifs(
    prompts=(
        "a red circle",
        "a green triangle on a pink background",
        "a blue square and an orange ring",
        "жёлтый крест",
        "маленький чёрный квадрат снизу",
        "фиолетовое кольцо и красный треугольник",
    ),
    start="a large blue square at the bottom on a grey background",
    change="a yellow ring",
    addition="a large blue square at the bottom and a red triangle at the top on a grey background",
    strengths=(0.05, 0.1, 0.2, 0.6),  # in latents of 8 x 8 little noise hides much
    image_guidance=1.0,
)
