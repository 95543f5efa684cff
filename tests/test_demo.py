"""The demo: a release in; three repositories, a page and a sheet of pictures out."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from kandinsky_diffusers import demo
from kandinsky_diffusers.cli import app
from kandinsky_diffusers.conversion import ConversionError
from kandinsky_diffusers.demo import COLOURED_SHAPES, Motifs, Settings, run_demo, sheet
from kandinsky_diffusers.demo.rows import Picture, Row, Shot, rows_of, upper_half
from kandinsky_diffusers.demo.sheet import TILE, make_sheet, write
from tests.support.goldens import GoldenFamily


REPOS = {"kandinsky-2-1-prior", "kandinsky-2-1", "kandinsky-2-1-inpaint"}
PROMPTS = ("a red cat, 4k photo", "кот в шляпе & <b>пёс</b>")
FEW = replace(Motifs.of(PROMPTS), seeds=(3,), strengths=(0.6,), shares=(0.5,))
QUICK = Settings(FEW, size=64, steps=2, prior_steps=1)
SCENE = Image.new("RGB", (64, 64), "#123456")


@pytest.fixture(scope="module")
def demo_release(release_21: Path, goldens_21: GoldenFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    release = shutil.copytree(release_21, tmp_path_factory.mktemp("demo") / "release")
    shutil.copy(goldens_21.path / "hyperparameters.json", release)
    return release


class Bar:
    """What of a progress bar the library uses."""

    def __init__(self, *, total: int, desc: str, **_: object) -> None:
        self.left, self.desc = total, desc

    def update(self, n: int) -> None:
        self.left -= n

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def demo_output(demo_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "demo_output"
    bars: list[Bar] = []

    def progress(**options: Any) -> Bar:
        bars.append(Bar(**options))
        return bars[-1]

    assert run_demo(demo_release, output, QUICK, progress=progress) == output / "index.html"
    assert {bar.left for bar in bars} == {0}
    assert bars[-1].desc == "drawing"
    return output


def images_of(output: Path) -> dict[str, str]:
    """Sources and alternative texts of the images of the page."""
    page = (output / "index.html").read_text(encoding="utf-8")
    return {name: unescape(alt) for name, alt in re.findall(r'<img src="(.+?)" alt="(.*?)"', page)}


def test_demo_leaves_three_repos_a_page_and_a_sheet(demo_output: Path) -> None:
    assert {path.parent.name for path in demo_output.glob("*/model_index.json")} == REPOS
    with Image.open(demo_output / "sheet.png") as picture:
        assert np.array(picture).std() > 10


def test_the_page_shows_every_picture_with_words_and_needs_no_network(demo_output: Path) -> None:
    page = (demo_output / "index.html").read_text(encoding="utf-8")
    images = images_of(demo_output)

    assert {demo_output / name for name in images} == set(demo_output.glob("pictures/*.png"))
    assert f"Drawn from the prompt “{PROMPTS[1]}” with seed 0" in images.values()
    assert all(len(words) > 10 for words in images.values())
    assert "http" not in page
    assert "<b>" not in page


def test_the_page_says_from_which_release_it_was_drawn(demo_release: Path, demo_output: Path) -> None:
    page = (demo_output / "index.html").read_text(encoding="utf-8")

    assert str(demo_release) in page
    assert set(re.findall(r"<li>(.+?): <code>[0-9a-f]{64}</code>", page)) >= {"decoder_fp16.ckpt", "prior_fp16.ckpt"}


def test_demo_can_be_repeated_and_draws_the_same(demo_release: Path, demo_output: Path) -> None:
    first = (demo_output / "sheet.png").read_bytes()
    (demo_output / "pictures" / "old.png").touch()

    run_demo(demo_release, demo_output, QUICK)

    assert (demo_output / "sheet.png").read_bytes() == first
    assert not (demo_output / "pictures" / "old.png").exists()


def test_demo_without_an_inpainting_checkpoint_draws_the_rest(
    demo_release: Path, demo_output: Path, tmp_path: Path
) -> None:
    release = shutil.copytree(demo_release, tmp_path / "release", ignore=shutil.ignore_patterns("inpainting_*"))

    run_demo(release, tmp_path / "out", QUICK)

    assert not (tmp_path / "out" / "kandinsky-2-1-inpaint").exists()
    missing = set(images_of(demo_output).values()) - set(images_of(tmp_path / "out").values())
    assert len(missing) == 4
    assert all("mask" in words or "repainted" in words for words in missing)


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


def test_the_command_draws_prompts_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(demo, "run_demo", lambda *arguments, **more: asked.append(arguments) or Path("index.html"))

    options = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    result = CliRunner().invoke(app, ["demo", "release", "out", *options, "--size", "512"])
    CliRunner().invoke(app, ["demo", "release"])

    assert "from the release release" in result.output
    assert asked[0] == (Path("release"), Path("out"), Settings(Motifs.of(PROMPTS), size=512))
    assert asked[1] == (Path("release"), Path("demo_output"), Settings(COLOURED_SHAPES))


# --------------------------------------------------------------------------------------------------- what is drawn


def test_what_is_shown_is_what_the_pipelines_can_do() -> None:
    shots = [item for row in rows_of(COLOURED_SHAPES, SCENE, True) for item in row.items if isinstance(item, Shot)]
    by_task = {task: [shot.arguments for shot in shots if shot.task == task] for task in {shot.task for shot in shots}}

    prompts = [arguments["prompt"] for arguments in by_task["text"]]
    assert {prompt.isascii() for prompt in prompts} == {True, False}
    assert len({shot.seed for shot in shots if shot.arguments.get("prompt") == prompts[0]}) > 3
    assert len({arguments["strength"] for arguments in by_task["image"]}) == 4
    assert [arguments.get("preserve_unmasked", False) for arguments in by_task["inpainting"]] == [False, True]
    ends = [arguments["images_and_prompts"] for arguments in by_task["mix"] if arguments["weights"] == [1.0, 0.0]]
    assert [type(end) for end, _ in ends] == [str, Image.Image]


def test_one_prompt_is_enough_and_none_is_an_error() -> None:
    assert list(rows_of(Motifs.of(["a cat"]), SCENE, True))

    with pytest.raises(ValueError, match="`prompts` is empty"):
        Motifs.of([])


def test_too_few_steps_for_image_to_image_are_refused_before_anything_is_converted(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", str(tmp_path), str(tmp_path / "out"), "--steps", "10"])

    assert result.exit_code == 1
    assert "`steps` is 10; accepted are 20 and more" in result.output


def test_the_mask_is_in_the_upper_half() -> None:
    mask = np.asarray(upper_half(SCENE))

    assert mask[:32, 8:56].all()
    assert mask.sum() == 32 * 48 * 255


# ------------------------------------------------------------------------------------------------------- the sheet


def test_the_sheet_holds_every_picture_of_rows_that_differ_in_length() -> None:
    pictures = [Picture("a caption that is so long that it needs several lines", "", SCENE)] * 4

    drawn = np.array(make_sheet([Row("one", "", tuple(pictures[:3])), Row("two", "", (pictures[3],))], "of what"))

    assert (drawn == np.array(SCENE)[0, 0]).all(axis=-1).sum() == 4 * TILE**2


@pytest.mark.parametrize("fonts", [sheet.FONTS, ()], ids=["of the system", "without fonts"])
def test_russian_captions_can_be_read(fonts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet, "FONTS", fonts)
    sheet.system_font.cache_clear()

    def written(text: str) -> bytes:
        picture = Image.new("RGB", (200, 40), "white")
        write(ImageDraw.Draw(picture), (5, 5), text, 20, "black")
        return picture.tobytes()

    assert len({written(letters) for letters in ("жмёт", "щука", "круг", "кран")}) == 4, "none is a row of boxes"
    sheet.system_font.cache_clear()
