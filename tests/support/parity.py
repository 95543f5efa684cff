"""Comparing with a reference: tolerances of the project, and recorded random draws in the place of new ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from kandinsky_diffusers import sampling


# Largest difference over largest reference value, fp32 on the CPU.
MODULE = 2e-5
SAMPLER = 5e-4
PIXEL_VALUES_EQUAL = 0.97


def relative_difference(actual: Any, reference: Any) -> float:
    """Largest absolute difference over the reference's largest absolute value."""
    actual, reference = (torch.as_tensor(np.asarray(value)).double() for value in (actual, reference))
    assert actual.shape == reference.shape, f"shape {list(actual.shape)}, reference {list(reference.shape)}"
    return float((actual - reference).abs().max() / reference.abs().max())


def assert_close(actual: Any, reference: Any, tolerance: float, what: str = "output") -> None:
    """Fail where `actual` is further than `tolerance` (see [`relative_difference`]) from `reference`."""
    difference = relative_difference(actual, reference)
    assert difference <= tolerance, f"{what}: {difference:.2e} from the reference, allowed is {tolerance:.0e}"


def assert_same_picture(actual: Any, reference: Any) -> None:
    """Fail where a uint8 value is more than one level off, or more than 3 % of them are off at all."""
    difference = np.abs(np.asarray(actual).astype(int) - np.asarray(reference).astype(int))
    assert difference.max() <= 1, f"a pixel value is {difference.max()} levels off"
    assert (difference == 0).mean() >= PIXEL_VALUES_EQUAL, (
        f"only {(difference == 0).mean():.1%} of the values are equal"
    )


class Replay:
    """Stands in for `sampling.draw_noise`: gives recorded draws, in their order."""

    def __init__(self, draws: Iterable[torch.Tensor]):
        self.draws = list(draws)

    def __call__(self, shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> torch.Tensor:
        """The next draw."""
        assert self.draws, f"a draw of {list(shape)} that the original did not make"
        draw = self.draws.pop(0)
        assert list(draw.shape) == list(shape), f"a draw of {list(shape)}, the original's next is {list(draw.shape)}"
        return draw.to(device=device, dtype=dtype)

    @classmethod
    def into(cls, monkeypatch: pytest.MonkeyPatch, draws: Iterable[torch.Tensor]) -> Replay:
        """Put a replay of `draws` in the place of `sampling.draw_noise`."""
        replay = cls(draws)
        monkeypatch.setattr(sampling, "draw_noise", replay)
        return replay
