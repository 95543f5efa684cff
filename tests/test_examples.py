"""Each example runs as it is, on tiny repositories, and leaves pictures."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.support.tiny_repos import write_tiny_repos


EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_repos(tmp_path_factory.mktemp("repos"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_leaves_pictures(path: Path, repos: Path, tmp_path: Path) -> None:
    runpy.run_path(str(path))["main"](repos=repos, output=tmp_path / "pictures", size=64, steps=2)
    assert list((tmp_path / "pictures").glob("*.png"))
