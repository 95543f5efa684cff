"""Rows as tables: on the terminal, and in an HTML page that needs nothing else."""

from __future__ import annotations

import html
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .cases import COMPILED, OPTIMIZED, OURS, STOCK, Subject
from .store import FIGURES, Row


COLUMNS = (
    "case",
    "candidate",
    "median",
    "fastest to slowest",
    "times faster",
    "peak memory",
    "difference",
    "operations",
)
COLOURS = {STOCK: "#9a9a9a", COMPILED: "#5b5b5b", OURS: "#2f7ed8", OPTIMIZED: "#0b3d91"}
BAR = 220  # pixels of the longest bar
PAGE = """<!doctype html>
<meta charset="utf-8">
<title>kandinsky_diffusers: benchmarks</title>
<style>
body {{ font: 14px/1.4 sans-serif; margin: 2em auto; max-width: 1200px; color: #222 }}
table {{ border-collapse: collapse; margin: .5em 0 2em }}
td, th {{ padding: .2em .7em; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }}
p, li {{ color: #555 }}
</style>
<h1>kandinsky_diffusers: benchmarks</h1>
<p>Medians, all candidates of a case in one process, taking turns. Models of the published sizes with random weights,
shared by ours and stock. Peak memory is above the weights.</p>
{sections}
"""


def print_lines(rows: Iterable[Row], console: Console) -> None:
    """Print a line for each row, while more are being measured."""
    for row in rows:
        figures = row.get("error") or (_cells(row)[2:] if row["status"] in FIGURES else "")
        text = figures if isinstance(figures, str) else "; ".join(filter(None, figures))
        console.print(f"{row['subject']}, {_case(row)}, {row['candidate']}: {row['status']} {text}", markup=False)


def print_tables(rows: Iterable[Row], subjects: Mapping[str, Subject], console: Console) -> None:
    """Print a table for each subject with figures."""
    rows = list(rows)
    for title, notes, lines in _sections(rows, subjects):
        table = Table(*COLUMNS, title=title, title_justify="left")
        for line in lines:
            table.add_row(*_cells(line))
        console.print(table)
        for note in notes:
            console.print(f"  {note}", highlight=False)
    for status, count in Counter(row["status"] for row in rows).items():
        console.print(f"{count} rows {status}")


def write_html(rows: Iterable[Row], subjects: Mapping[str, Subject], path: Path) -> None:
    """Write the page."""
    rows = list(rows)
    sections = [_section(title, notes, lines) for title, notes, lines in _sections(rows, subjects)]
    failed = [f"{_case(row)}, {row['candidate']}: {row['error']}" for row in rows if row["status"] == "failed"]
    missing = dict.fromkeys(f"{row['command']}" for row in rows if row["status"] not in (*FIGURES, "failed"))
    sections += [_list("Failed", failed), _list("Not measured; these commands do", missing)]
    path.write_text(PAGE.format(sections="\n".join(sections)), encoding="utf-8")


def _sections(rows: list[Row], subjects: Mapping[str, Subject]) -> Iterable[tuple[str, list[str], list[Row]]]:
    """Of each subject that has figures its title, notes and rows."""
    for name, subject in subjects.items():
        lines = [row for row in rows if row["subject"] == name and row["status"] in FIGURES]
        if lines:
            lines.sort(key=lambda row: [row[part] for part in ("device", "dtype", "size", "batch")])
            notes = [note for row in lines for note in (row.get("note"), _reduced(row), _hardware(row))]
            yield subject.title, [note for note in dict.fromkeys(notes) if note], lines


def _reduced(row: Row) -> str:
    return f"On the CPU reduced: {row['reduced']}." if "reduced" in row else ""


def _hardware(row: Row) -> str:
    machine = row.get("machine", {})
    where = machine.get("gpu") or f"{machine.get('processor')}, {machine.get('threads')} threads"
    versions = ", ".join(f"{name} {machine.get(name)}" for name in ("torch", "diffusers", "kandinsky_diffusers"))
    tiny = "TINY MODELS, figures mean nothing. " if row.get("tiny") else ""
    return f"{tiny}{row['device']}: {where}; {versions}; {row.get('date')}."


# ------------------------------------------------------------------------------------------------ cells
def _cells(row: Row) -> list[str]:
    seconds = row.get("seconds")
    times = [f"{times:.2f} x {other}" for other, times in row.get("times_faster", {}).items()]
    return [
        _case(row),
        row["candidate"],
        "" if seconds is None else _seconds(seconds["median"]),
        "" if seconds is None else f"{_seconds(seconds['min'])} to {_seconds(seconds['max'])}, {seconds['runs']} runs",
        ", ".join(times),
        _memory(row.get("peak_bytes", {})),
        _difference(row),
        _operations(row),
    ]


def _case(row: Row) -> str:
    size = f"{row['size']}, " if row["size"] else ""
    return f"{size}batch {row['batch']}, {row['dtype']}, {row['device']}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _memory(peaks: Mapping[str, int]) -> str:
    return ", ".join(f"{peak / 1e9:.2f} GB {how}" for how, peak in peaks.items())


def _difference(row: Row) -> str:
    if "ratio" in row:
        return f"{row['ratio']:.3f} x stock's distance from float32"
    return row.get("warning") or (f"{row['difference']:.1e}" if "difference" in row else "")


def _operations(row: Row) -> str:
    if "flops" not in row:
        return ""
    fraction = f", {row['peak_fraction']:.0%} of the peak" if "peak_fraction" in row else ""
    return f"{row['flops'] / 1e12:.2f} TFLOP{fraction}"


# ------------------------------------------------------------------------------------------------ HTML
def _section(title: str, notes: list[str], lines: list[Row]) -> str:
    head = "".join(f"<th>{name}</th>" for name in (*COLUMNS, ""))
    body = []
    for _, group in itertools.groupby(lines, key=_case):
        together = list(group)
        longest = max((row["seconds"]["median"] for row in together if "seconds" in row), default=0.0)
        for row in together:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row))
            body.append(f"<tr>{cells}<td>{_bar(row, longest)}</td></tr>")
    notes = [f"<p>{html.escape(note)}</p>" for note in notes]
    return f"<h2>{html.escape(title)}</h2>{''.join(notes)}<table><tr>{head}</tr>{''.join(body)}</table>"


def _bar(row: Row, longest: float) -> str:
    """The median as a bar, and fastest to slowest as a line on it."""
    if "seconds" not in row or not longest:
        return ""
    start, end, width = (BAR * min(row["seconds"][name] / longest, 1.2) for name in ("min", "max", "median"))
    colour = COLOURS.get(row["candidate"], COLOURS[OURS])
    return (
        f'<svg width="{BAR * 1.2:.0f}" height="14"><rect width="{width:.1f}" height="14" fill="{colour}"/>'
        f'<line x1="{start:.1f}" x2="{end:.1f}" y1="7" y2="7" stroke="#d22"/></svg>'
    )


def _list(title: str, items: Iterable[str]) -> str:
    lines = "".join(f"<li><code>{html.escape(item)}</code></li>" for item in items)
    return f"<details><summary>{title}</summary><ul>{lines}</ul></details>" if lines else ""
