"""A tiny edge detector in the layout of `ControlNetHED.pth`."""

from __future__ import annotations

import numpy as np
import torch


TINY = [(4, 2), (6, 2), (8, 3), (10, 3), (10, 3)]


def published_shapes(levels: list[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """The layout of `ControlNetHED.pth`, with so many channels and convolutions at each level."""
    shapes: dict[str, tuple[int, ...]] = {"norm": (1, 3, 1, 1)}
    before = 3
    for level, (width, layers) in enumerate(levels, start=1):
        for layer in range(layers):
            shapes[f"block{level}.convs.{layer}.weight"] = (width, before, 3, 3)
            shapes[f"block{level}.convs.{layer}.bias"] = (width,)
            before = width
        shapes[f"block{level}.projection.weight"] = (1, width, 1, 1)
        shapes[f"block{level}.projection.bias"] = (1,)
    return shapes


def random_weights() -> dict[str, torch.Tensor]:
    """Weights with which edges are neither all black nor all white."""
    generator = torch.Generator().manual_seed(0)
    random = {}
    for key, shape in published_shapes(TINY).items():
        fan_in = int(np.prod(shape[1:])) if len(shape) == 4 else 1
        random[key] = torch.randn(shape, generator=generator) * (1.6 / fan_in) ** 0.5
        if key.endswith("projection.weight"):
            random[key] /= 8.0
    random["norm"] = torch.tensor([120.0, 115.0, 100.0]).reshape(1, 3, 1, 1)
    return random
