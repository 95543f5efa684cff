"""The rows of all runs in one JSON file, where a later run adds to what is there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .cases import Case, Subject


Row = dict[str, Any]

KEY = ("subject", "size", "batch", "dtype", "device", "candidate")
NOT_MEASURED = "not measured"
FIGURES = ("measured", "counted")  # statuses of rows with something in them


def row_key(row: Row) -> tuple[Any, ...]:
    """What a row is about; there is one for each."""
    return tuple(row[name] for name in KEY)


def rows_of(case: Case, candidates: Iterable[str], **more: Any) -> list[Row]:
    """Rows of a case, still without figures."""
    about = {name: getattr(case, name) for name in KEY if name != "candidate"}
    return [{**about, "candidate": candidate, **more} for candidate in candidates]


class Store:
    """Rows in a file, which is complete after each `add`.

    Args:
        path: of the JSON file; its rows are read if it is there.
    """

    def __init__(self, path: Path):
        self._path = path
        known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        self._rows: dict[tuple[Any, ...], Row] = {row_key(row): row for row in known}

    @property
    def rows(self) -> list[Row]:
        """All of them, in the order in which they came."""
        return list(self._rows.values())

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, or put them in the place of older ones; figures only give way to other figures."""
        for row in rows:
            old = self._rows.get(row_key(row))
            if row["status"] in FIGURES or old is None or old["status"] not in FIGURES:
                self._rows[row_key(row)] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)

    def add_missing(self, subjects: Iterable[Subject]) -> None:
        """Rows for all that the subjects have on both devices and nobody has measured, with the command that does."""
        missing = []
        for subject in subjects:
            for device in subject.sizes:
                for case in subject.cases(device, {}):
                    missing += rows_of(case, subject.usual(device), status=NOT_MEASURED, command=case.command)
        self.add(row for row in missing if row_key(row) not in self._rows)
