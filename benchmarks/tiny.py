"""The tiny Kandinsky 2.1 of `training/`, which draws coloured shapes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kandinsky_diffusers.demo import convert_release


RELEASE = Path(__file__).resolve().parents[1] / "training" / "release"


@contextmanager
def tiny_repos(release: Path = RELEASE) -> Iterator[Path]:
    """A folder with its converted repositories, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        repos = Path(folder)
        convert_release(release, repos)
        yield repos
