"""The world that the tiny Kandinsky knows: one or two coloured shapes on a coloured ground, 64 x 64 pixels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


SIZE = 64  # height and width of a picture, in pixels

COLORS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
GROUNDS = {
    "grey": (208, 208, 208),
    "beige": (238, 225, 198),
    "pink": (248, 212, 222),
    "mint": (200, 238, 222),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = {"centre": (32, 32), "left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48)}
PAIRS = (("left", "right"), ("top", "bottom"))
RADII = {"small": (7.5, 9.0), "large": (12.0, 14.0)}
SHAKE = 1.0  # how far a shape may lie from the middle of its place, in pixels


@dataclass(frozen=True)
class Figure:
    """One shape.

    Args:
        shape: of `SHAPES`.
        color: of `COLORS`.
        place: of `PLACES`.
        size: of `RADII`.
        x: its middle from the left, in pixels.
        y: its middle from the top, in pixels.
        radius: half of its width, in pixels.
    """

    shape: str
    color: str
    place: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What is in a picture: figures that do not touch, on a ground of `GROUNDS`."""

    ground: str
    figures: tuple[Figure, ...]


def make_figure(shape: str, color: str, place: str, size: str, rng: random.Random) -> Figure:
    """A figure of this kind, a little shaken and of one of the radii of its size."""
    x, y = (middle + rng.uniform(-SHAKE, SHAKE) for middle in PLACES[place])
    return Figure(shape, color, place, size, x, y, rng.uniform(*RADII[size]))


def random_scene(rng: random.Random, pair_share: float = 0.35) -> Scene:
    """A scene with one figure, or with two that lie opposite and differ in colour or shape."""
    places = rng.choice(PAIRS) if rng.random() < pair_share else (rng.choice(list(PLACES)),)
    kinds = [(shape, color) for shape in SHAPES for color in COLORS]
    chosen = rng.sample(kinds, len(places))
    figures = (
        make_figure(shape, color, place, rng.choice(list(RADII)), rng)
        for (shape, color), place in zip(chosen, places, strict=True)
    )
    return Scene(rng.choice(list(GROUNDS)), tuple(figures))


def draw(scenes: Sequence[Scene], device: torch.device | str = "cpu", at_once: int = 1024) -> torch.Tensor:
    """Pictures `[scenes, 3, 64, 64]`, uint8, with smooth edges.

    Args:
        scenes: what to draw.
        device: where to draw.
        at_once: scenes whose pixels are computed together.
    """
    parts = [_draw(scenes[start : start + at_once], device) for start in range(0, len(scenes), at_once)]
    return torch.cat(parts)


def _draw(scenes: Sequence[Scene], device: torch.device | str) -> torch.Tensor:
    pixels = torch.tensor([GROUNDS[scene.ground] for scene in scenes], dtype=torch.float32, device=device)
    pixels = pixels[:, :, None, None].repeat(1, 1, SIZE, SIZE)
    for shape in SHAPES:
        for number in range(max(len(scene.figures) for scene in scenes)):
            rows = [
                row
                for row, scene in enumerate(scenes)
                if number < len(scene.figures) and scene.figures[number].shape == shape
            ]
            if rows:
                figures = [scenes[row].figures[number] for row in rows]
                index = torch.tensor(rows, device=device)
                pixels[index] = _painted(pixels[index], shape, figures)
    return pixels.round().to(torch.uint8)


def _painted(pixels: torch.Tensor, shape: str, figures: Sequence[Figure]) -> torch.Tensor:
    numbers = torch.tensor([(f.x, f.y, f.radius, *COLORS[f.color]) for f in figures], device=pixels.device)
    x, y, radius = (numbers[:, n, None, None] for n in range(3))
    centres = torch.arange(SIZE, device=pixels.device) + 0.5
    distance = signed_distance(shape, (centres[None, None, :] - x) / radius, (centres[None, :, None] - y) / radius)
    coverage = (0.5 - distance * radius).clamp(0, 1)[:, None]
    return torch.lerp(pixels, numbers[:, 3:, None, None].expand_as(pixels), coverage)


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How far points are from the edge of a shape in the square from -1 to 1; negative inside.

    Exact beside straight edges; round the corners it is the largest distance to any of them, which keeps them sharp.

    Args:
        shape: of `SHAPES`.
        x: to the right.
        y: downwards; broadcasts against `x`.
    """
    match shape:
        case "circle":
            return torch.hypot(x, y) - 1
        case "ring":
            return (torch.hypot(x, y) - 0.75).abs() - 0.25
        case "square":
            return torch.maximum(x.abs(), y.abs()) - 0.9
        case "cross":
            return torch.minimum(_bar(x, y), _bar(y, x))
        case "triangle":  # corners at (0, -0.95), (-1, 0.85) and (1, 0.85)
            slope = (x.abs() * 1.8 - (y + 0.95)) / (1 + 1.8**2) ** 0.5
            return torch.maximum(slope, y - 0.85)
    raise ValueError(f"`shape` is {shape!r}; accepted is one of {', '.join(SHAPES)}.")


def _bar(along: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    return torch.maximum(along.abs() - 1, across.abs() - 0.36)
