"""The figures of the gauge as a picture: a panel for each kind of scheduler, lines for our classes and for stock's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import OURS, STOCK
from .report import COLOURS


WIDTH, HEIGHT = 250, 210  # of a panel
LEFT, TOP, RIGHT, BOTTOM = 40, 30, 12, 34  # margins of a panel
LEGEND = 26
STOCK_IN_OURS = "stock's scheduler in our pipeline"
LINES = {  # colour, dashes
    OURS: (COLOURS[OURS], "none"),
    STOCK: (COLOURS[STOCK], "6 4"),
    STOCK_IN_OURS: ("#1c8a5a", "2 4"),
}

Row = dict[str, Any]


def write_chart(rows: Sequence[Row], path: Path) -> None:
    """Write an SVG: over the number of steps the share of pictures that are right."""
    kinds = list(dict.fromkeys(row["scheduler"] for row in rows))
    counts = sorted({row["steps"] for row in rows})
    panels = []
    for number, kind in enumerate(kinds):
        of_kind = [row for row in rows if row["scheduler"] == kind]
        panels.append(f'<g transform="translate({number * WIDTH} {LEGEND})">{_panel(kind, of_kind, counts)}</g>')
    width, height = len(kinds) * WIDTH, HEIGHT + LEGEND
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' font-family="sans-serif" font-size="12" fill="#333"><title>Share of pictures that show the colour and the'
        f' shape of the prompt, by number of steps</title><rect width="{width}" height="{height}" fill="#fff"/>'
        f"{_legend()}{''.join(panels)}</svg>\n",
        encoding="utf-8",
    )


def _panel(kind: str, rows: Sequence[Row], counts: Sequence[int]) -> str:
    """Numbers of steps stand at equal distances, whatever they are."""
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    bottom = HEIGHT - BOTTOM
    places = {steps: LEFT + inner_width * (n + 0.5) / len(counts) for n, steps in enumerate(counts)}
    parts = [f'<text x="{LEFT}" y="{TOP - 10}" font-weight="bold">{kind}</text>']
    for share in (0, 0.5, 0.9, 1):
        y = bottom - inner_height * share
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="10">{share:.0%}</text>')
    for steps, x in places.items():
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle" font-size="10">{steps}</text>')
    parts.append(f'<text x="{LEFT + inner_width / 2}" y="{bottom + 29}" text-anchor="middle">steps</text>')
    for side, (color, dashes) in LINES.items():
        found = [row for row in rows if row["classes"] == side and "shares" in row]
        points = [(places[row["steps"]], bottom - inner_height * row["shares"]["both"]) for row in found]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        style = f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{line}" {style}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    return "".join(parts)


def _legend() -> str:
    entries = []
    for number, (side, (color, dashes)) in enumerate(LINES.items()):
        x = LEFT + 90 * number
        entries.append(
            f'<line x1="{x}" x2="{x + 30}" y1="18" y2="18" stroke="{color}" stroke-width="2"'
            f' stroke-dasharray="{dashes}"/><text x="{x + 36}" y="22">{side}</text>'
        )
    return "".join(entries)
