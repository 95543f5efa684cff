"""The page of the demo: HTML that opens from the disk, with its pictures beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment

from .rows import Picture, Row


PAGE, PICTURES = "index.html", "pictures"
TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    rows: Sequence[Row[Picture]], folder: Path, *, release: str, sources: Mapping[str, str], manner: str, sheet: str
) -> Path:
    """Write the page `index.html` and the folder `pictures`, whose earlier content goes.

    Args:
        rows: what it shows.
        folder: where to write.
        release: from which was drawn.
        sources: the SHA-256 of each of its files.
        manner: how was drawn, in words.
        sheet: name of the file with all pictures.
    """
    shutil.rmtree(folder / PICTURES, ignore_errors=True)
    (folder / PICTURES).mkdir()
    shown = []
    for number, row in enumerate(rows, start=1):
        names = [f"{PICTURES}/{number}-{place}.png" for place, _ in enumerate(row.items, start=1)]
        for name, picture in zip(names, row.items, strict=True):
            picture.image.save(folder / name)
        shown.append((row, list(zip(names, row.items, strict=True))))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    html = template.render(rows=shown, release=release, sources=sources, manner=manner, sheet=sheet)
    page = folder / PAGE
    page.write_text(html, encoding="utf-8")
    return page
