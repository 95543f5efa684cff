"""Curves of the logs, as one picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .files import read_jsonl
from .loop import LOG


WIDTH, HEIGHT, GAP = 420, 240, 36
COLORS = ("#1f5fbf", "#c23b22", "#2a8f4a", "#8a4fb0", "#b0801f", "#4a4a4a")
NOT_CURVES = {"step", "seconds"}


def draw_curves(work: Path, names: Sequence[str], path: Path) -> None:
    """Draw what the logs of these stages say, logarithmically, a panel for each stage that has one."""
    logs = {name: lines for name in names if (lines := read_jsonl(work / name / LOG))}
    columns = min(3, max(1, len(logs)))
    rows = max(1, math.ceil(len(logs) / columns))
    sheet = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), "white")
    for number, (name, lines) in enumerate(logs.items()):
        sheet.paste(_panel(name, lines), (number % columns * WIDTH, number // columns * HEIGHT))
    sheet.save(path)


def _panel(title: str, lines: Sequence[Mapping[str, Any]]) -> Image.Image:
    panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(13)
    curves = {name: [(line["step"], line[name]) for line in lines] for name in lines[0] if name not in NOT_CURVES}
    values = [value for curve in curves.values() for _, value in curve if value > 0]
    low, high = math.log10(min(values, default=0.1)), math.log10(max(values, default=1.0))
    last = lines[-1]["step"]
    frame = (GAP, GAP, WIDTH - GAP / 2, HEIGHT - GAP)
    pen.rectangle(frame, outline="#bbbbbb")
    pen.text((GAP, 8), f"{title}: {last} steps, {lines[-1]['seconds']:.0f} s", fill="black", font=font)
    pen.text((GAP, HEIGHT - GAP + 4), f"{10**low:.2g} to {10**high:.2g}", fill="#666666", font=font)
    for number, (name, curve) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        points = list(_points(curve, last, low, high, frame))
        pen.line(points, fill=color, width=2)
        pen.text((frame[2] - 90, GAP + 4 + 15 * number), name, fill=color, font=font)
    return panel


def _points(
    curve: Sequence[tuple[int, float]], last: int, low: float, high: float, frame: tuple[float, float, float, float]
) -> Iterator[tuple[float, float]]:
    left, top, right, bottom = frame
    for step, value in curve:
        if value > 0:
            height = (math.log10(value) - low) / max(high - low, 1e-9)
            yield left + (right - left) * step / last, bottom - (bottom - top) * height
