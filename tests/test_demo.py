"""The demo: a release in, three repositories and a labelled grid of pictures out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kandinsky_diffusers import demo
from kandinsky_diffusers.conversion import ConversionError
from kandinsky_diffusers.demo import Picture, make_grid, make_input, run_demo
from tests.support.goldens import GoldenFamily


REPOS = {"kandinsky-2-1-prior", "kandinsky-2-1", "kandinsky-2-1-inpaint"}


@pytest.fixture(scope="module", autouse=True)
def small_and_in_few_steps() -> Iterator[None]:
    """So that it is over soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SIZE", 64)
        patch.setattr(demo, "STEPS", 4)
        patch.setattr(demo, "PRIOR_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def demo_release(release_21: Path, goldens_21: GoldenFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    release = shutil.copytree(release_21, tmp_path_factory.mktemp("demo") / "release")
    shutil.copy(goldens_21.path / "hyperparameters.json", release)
    return release


@pytest.fixture(scope="module")
def demo_output(demo_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "demo_output"
    assert run_demo(demo_release, output) == output / "grid.png"
    return output


def test_demo_leaves_three_repos_and_a_picture_of_the_grid(demo_output: Path) -> None:
    assert {path.parent.name for path in demo_output.glob("*/model_index.json")} == REPOS
    with Image.open(demo_output / "grid.png") as grid:
        assert np.array(grid).std() > 10


def test_demo_can_be_repeated_and_draws_the_same(demo_release: Path, demo_output: Path) -> None:
    first = (demo_output / "grid.png").read_bytes()

    run_demo(demo_release, demo_output)

    assert (demo_output / "grid.png").read_bytes() == first


def test_demo_without_an_inpainting_checkpoint_draws_the_rest(
    demo_release: Path, demo_output: Path, tmp_path: Path
) -> None:
    release = shutil.copytree(demo_release, tmp_path / "release", ignore=shutil.ignore_patterns("inpainting_*"))

    grid = run_demo(release, tmp_path / "out")

    assert not (tmp_path / "out" / "kandinsky-2-1-inpaint").exists()
    with Image.open(grid) as two_rows, Image.open(demo_output / "grid.png") as three_rows:
        assert two_rows.width == three_rows.width
        assert two_rows.height < three_rows.height


def test_demo_leaves_a_folder_of_somebody_else_alone(demo_release: Path, tmp_path: Path) -> None:
    (tmp_path / "kandinsky-2-1").mkdir()
    (tmp_path / "kandinsky-2-1" / "model_index.json").write_text("{}")

    with pytest.raises(ConversionError, match="no demo made it"):
        run_demo(demo_release, tmp_path)

    assert [path.name for path in tmp_path.rglob("*")] == ["kandinsky-2-1", "model_index.json"]


def test_demo_of_a_missing_release_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="not a folder"):
        run_demo(tmp_path / "no-release", tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_demo_of_a_broken_release_makes_nothing(demo_release: Path, tmp_path: Path) -> None:
    release = shutil.copytree(demo_release, tmp_path / "release")
    (release / "decoder_fp16.ckpt").write_bytes(b"cut short")

    with pytest.raises(ConversionError, match="decoder_fp16"):
        run_demo(release, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_grid_holds_every_picture_of_rows_that_differ_in_length() -> None:
    scene = make_input()
    sky = np.array(scene)[0, 0]

    grid = np.array(make_grid({"one": [Picture("a", scene)] * 3, "two": [Picture("b", scene)]}, tile=scene.width))

    assert (grid == sky).all(axis=-1).sum() == 4 * (np.array(scene) == sky).all(axis=-1).sum()
