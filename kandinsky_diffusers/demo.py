"""The main job from end to end: an original release becomes Hub repositories, and these draw a labelled grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers.utils import logging as transformers_logging

from .conversion import ConversionError, convert
from .conversion.repository import Progress


PROMPTS = ("red cat, 4k photo", "a watercolour of a lighthouse at dawn", "ein Fuchs im Wald")
SIZE = 256
STEPS = 10
PRIOR_STEPS = 5
MARKER = "demo.txt"
GRID = "grid.png"


class Picture(NamedTuple):
    """A picture and the words to print below it."""

    caption: str
    image: Image.Image


def run_demo(release: str | Path, output: str | Path = "demo_output", *, progress: Progress | None = None) -> Path:
    """Convert a Kandinsky 2.1 release, and draw with the result: text to image, image to image, inpainting.

    Args:
        release: folder with the files named as originally published. If there, its folder `clip` is used as CLIP
            ViT-L/14, and `hyperparameters.json` as the original's configuration (needed for models of unusual size).
        output: where the repositories and the grid of pictures go. An earlier demo's folder is brought up to date.
        progress: makes progress bars for the conversion; called with tqdm's arguments.

    Returns:
        The path of the grid, a PNG.

    Raises:
        ConversionError: `release` cannot be converted, or `output` is there and no demo made it.
    """
    release, output = Path(release), Path(output)
    if not release.is_dir():
        raise ConversionError(f"release: {str(release)!r} is not a folder with a Kandinsky 2.1 release")
    _check_free(output)
    repos = _convert(release, output, progress)
    (output / MARKER).write_text("Made by `kandinsky-diffusers demo`, which may replace what is here.\n")
    grid = output / GRID
    make_grid({title: draw(repos[name]) for title, name, draw in DRAWINGS if name in repos}).save(grid)
    return grid


def _check_free(output: Path) -> None:
    """A folder that no demo made may hold repositories that somebody wants to keep."""
    if (output / MARKER).is_file() or not output.exists():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise ConversionError(f"output: {str(output)!r} is there already, and no demo made it; name another folder")


def _convert(release: Path, output: Path, progress: Progress | None) -> dict[str, Path]:
    options: dict[str, Any] = {"clip": release / "clip", "original_config": release / "hyperparameters.json"}
    present = {name: path for name, path in options.items() if path.exists()}
    report = convert(release, output, version="2.1", overwrite=True, progress=progress, **present)
    return {repo.name: repo for repo in report.repos}


# ----------------------------------------------------------------------------------------------------------- drawing


def draw_from_text(repo: Path) -> list[Picture]:
    """One picture per prompt."""
    draw = _artist(AutoPipelineForText2Image, repo, height=SIZE, width=SIZE)
    return [Picture(f"“{prompt}”", draw(prompt)) for prompt in PROMPTS]


def draw_from_image(repo: Path) -> list[Picture]:
    """An input, and what becomes of it at two strengths."""
    source = make_input()
    draw = _artist(AutoPipelineForImage2Image, repo, image=source, height=SIZE, width=SIZE)
    drawn = [Picture(f"strength {strength}", draw(PROMPTS[0], strength=strength)) for strength in (0.3, 0.8)]
    return [Picture("input", source), *drawn]


def draw_inside_mask(repo: Path) -> list[Picture]:
    """An input with its mask, and two ways to fill the hole."""
    source, mask = make_input(), make_mask()
    draw = _artist(AutoPipelineForInpainting, repo, image=source, mask_image=mask, height=SIZE, width=SIZE)
    return [
        Picture("input, repaint the white", Image.composite(Image.new("RGB", source.size, "white"), source, mask)),
        Picture("as the original", draw(PROMPTS[0])),
        Picture("preserve_unmasked=True", draw(PROMPTS[0], preserve_unmasked=True)),
    ]


DRAWINGS: tuple[tuple[str, str, Callable[[Path], list[Picture]]], ...] = (
    ("Text to image", "kandinsky-2-1", draw_from_text),
    ("Image to image", "kandinsky-2-1", draw_from_image),
    ("Inpainting", "kandinsky-2-1-inpaint", draw_inside_mask),
)


def _artist(auto_pipeline: Any, repo: Path, **arguments: Any) -> Callable[..., Image.Image]:
    with _without_loading_bars():
        pipeline = auto_pipeline.from_pretrained(repo).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(leave=False, disable=None)  # None: only a terminal sees the bars

    def draw(prompt: str, **more: Any) -> Image.Image:
        return pipeline(
            prompt,
            num_inference_steps=STEPS,
            prior_num_inference_steps=PRIOR_STEPS,
            generator=torch.Generator("cpu").manual_seed(0),
            **arguments,
            **more,
        ).images[0]

    return draw


@contextmanager
def _without_loading_bars() -> Iterator[None]:
    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def make_input() -> Image.Image:
    """A simple scene to start from: a sun above a hill."""
    scene = Image.new("RGB", (SIZE, SIZE), "#9fc9ee")
    pen = ImageDraw.Draw(scene)
    pen.ellipse([SIZE * 0.55, SIZE * 0.1, SIZE * 0.85, SIZE * 0.4], fill="#ffd34e")
    pen.ellipse([-SIZE * 0.3, SIZE * 0.6, SIZE * 1.1, SIZE * 1.8], fill="#4d8f4a")
    return scene


def make_mask() -> Image.Image:
    """White where `make_input` is to be repainted: the lower middle."""
    mask = Image.new("L", (SIZE, SIZE), 0)
    ImageDraw.Draw(mask).rectangle([SIZE // 4, SIZE // 2, 3 * SIZE // 4, SIZE - 1], fill=255)
    return mask


# --------------------------------------------------------------------------------------------------------- the grid


def make_grid(rows: dict[str, list[Picture]], *, tile: int = SIZE, text: int = 16) -> Image.Image:
    """Lay out rows of pictures on white: a title above each row, a caption below each picture.

    Args:
        rows: title -> pictures.
        tile: width and height of a picture in the grid, in pixels.
        text: height of the captions, in pixels.
    """
    gap = text
    columns = max((len(pictures) for pictures in rows.values()), default=0)
    row_height = 2 * text + tile + 3 * text
    grid = Image.new("RGB", (gap + columns * (tile + gap), gap + len(rows) * row_height), "white")
    pen = ImageDraw.Draw(grid)
    title_font, caption_font = ImageFont.load_default(text * 1.3), ImageFont.load_default(text * 0.85)
    for row, (title, pictures) in enumerate(rows.items()):
        top = gap + row * row_height
        pen.text((gap, top), title, fill="black", font=title_font)
        for column, picture in enumerate(pictures):
            left = gap + column * (tile + gap)
            grid.paste(ImageOps.contain(picture.image, (tile, tile)), (left, top + 2 * text))
            pen.text((left, top + 2 * text + tile + text // 4), picture.caption, fill="#444444", font=caption_font)
    return grid
