"""Each example runs as it is, on tiny repositories, and leaves pictures."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_leaves_pictures(path: Path, tiny_repos: Path, tmp_path: Path) -> None:
    runpy.run_path(str(path))["main"](repos=tiny_repos, output=tmp_path / "pictures", size=64, steps=2)
    assert list((tmp_path / "pictures").glob("*.png"))
