"""What users ask of a model that can draw: does the picture show what was asked for?

The tiny Kandinsky in `training/release` was trained on coloured shapes. What it draws is read by `training.reading`,
by colours, connected areas and outlines. Prompts and seeds are chosen by rule: every colour with every shape, in their
order, and seeds that count from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

from kandinsky_diffusers.demo import convert_release
from tests.fixtures import Built
from training.evaluation import Wish, accuracy, readings, seeded, wishes
from training.reading import Reading, read
from training.world import SIZE, Scene, draw, make_figure


ROOT = Path(__file__).resolve().parents[1]
RELEASE = ROOT / "training" / "release"
STEPS = 6
SEEDS = (0, 35)  # of the first of all prompts; each following prompt has the next seed
WISHES = wishes("en")
PROMPTS = {(wish.shape, wish.color): wish.prompt for wish in WISHES}
SOME = WISHES[::3]  # of every colour, and of every shape
Pictures = list[PIL.Image.Image]


def quick(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def repos(built: Built) -> Path:
    """The converted repositories of the release. Read only."""
    return built("coloured-shapes", lambda folder: convert_release(RELEASE, folder))


@pytest.fixture(scope="module")
def artist(repos: Path) -> Any:
    return quick(AutoPipelineForText2Image.from_pretrained(repos / "kandinsky-2-1"))


@pytest.fixture(scope="module")
def seen(artist: Any) -> list[Reading]:
    """What is drawn for `SOME`, in float32 and in the default way."""
    drawn = look(artist, SOME)
    assert share_that_shows(SOME, drawn) >= 0.9
    return drawn


def look(artist: Any, asked: Sequence[Wish], **options: Any) -> list[Reading]:
    """What is seen in a picture for each of the prompts."""
    return list(readings(artist, [wish.prompt for wish in asked], 0, **{"num_inference_steps": STEPS, **options}))


def share_that_shows(asked: Sequence[Wish], seen: Sequence[Reading], place: str | None = None) -> float:
    shown = [reading.shows(wish.shape, wish.color, place) for wish, reading in zip(asked, seen, strict=True)]
    return sum(shown) / len(shown)


def share_alike(one: Sequence[Reading], other: Sequence[Reading]) -> float:
    """Of how many pictures the same is read, but for the numbers of pixels."""

    def without_areas(reading: Reading) -> Reading:
        return replace(reading, figures=tuple(replace(figure, area=0) for figure in reading.figures))

    return sum(without_areas(a) == without_areas(b) for a, b in zip(one, other, strict=True)) / len(one)


# ----------------------------------------------------------------------------------------------------- text to image


@pytest.mark.parametrize("language", ["en", "ru"])
def test_colour_and_shape_are_those_of_the_prompt(artist: Any, language: str) -> None:
    found = [accuracy(artist, language, seed, num_inference_steps=STEPS)["both"] for seed in SEEDS]

    assert np.mean(found) >= 0.9


def test_guidance_makes_more_pictures_right(artist: Any) -> None:
    """Single shapes are right without it, too; of two some are missing, or have each other's colour."""
    pairs = [(wish, WISHES[(8 * number + 3) % len(WISHES)]) for number, wish in enumerate(WISHES)]
    prompts = [f"{first.prompt} and {second.prompt}" for first, second in pairs]

    def share_of_right(guidance_scale: float) -> float:
        options = {"guidance_scale": guidance_scale, "prior_guidance_scale": 1.0, "num_inference_steps": 8}
        seen = readings(artist, prompts, 0, **options)
        return np.mean([kinds(reading) == kinds(pair) for reading, pair in zip(seen, pairs, strict=True)]).item()

    assert share_of_right(4.0) > share_of_right(1.0) + 0.05


def kinds(shapes: Reading | Sequence[Wish]) -> list[tuple[str, str]]:
    each = shapes.figures if isinstance(shapes, Reading) else shapes
    return sorted((figure.shape, figure.color) for figure in each)


def test_a_negative_prompt_drives_its_colour_out(artist: Any) -> None:
    asked = [wish._replace(prompt=f"a {wish.shape}") for wish in SOME]  # of any colour
    colors = [reading.figures[0].color for reading in look(artist, asked)]
    negatives = [PROMPTS[wish.shape, color] for wish, color in zip(asked, colors, strict=True)]

    seen = look(artist, asked, negative_prompt=negatives)

    assert np.mean([reading.shows(color=color) for reading, color in zip(seen, colors, strict=True)]) <= 0.25


# ---------------------------------------------------------------------------------------- image to image, inpainting


OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
ENGLISH = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}


def pictures_of(scenes: Sequence[Scene]) -> Pictures:
    return [PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in draw(scenes)]


@pytest.fixture(scope="module")
def inputs() -> list[Scene]:
    """As many as there are of `SOME`, with one large shape each, in places that have an opposite."""
    rng = Random(0)
    kinds = zip(WISHES[::-3], cycle(OPPOSITE))
    return [Scene("grey", (make_figure(kind.shape, kind.color, place, "large", rng),)) for kind, place in kinds]


@pytest.fixture(scope="module")
def moved(inputs: list[Scene]) -> list[Wish]:
    """`SOME`, and opposite to where the shape of the input is."""
    return [
        wish._replace(prompt=f"{wish.prompt} {ENGLISH[OPPOSITE[scene.figures[0].place]]}")
        for wish, scene in zip(SOME, inputs, strict=True)
    ]


@pytest.fixture(scope="module")
def redraw(repos: Path, inputs: list[Scene], moved: list[Wish]) -> Callable[[float], list[Reading]]:
    """What becomes of the inputs with a strength."""
    artist = quick(AutoPipelineForImage2Image.from_pretrained(repos / "kandinsky-2-1"))
    options = {"image": pictures_of(inputs), "num_inference_steps": 20, "guidance_scale": 1.0}
    return lambda strength: look(artist, moved, strength=strength, **options)


def test_at_low_strength_the_layout_stays_whatever_the_prompt_says(
    redraw: Callable[[float], list[Reading]], inputs: list[Scene]
) -> None:
    stayed = [
        reading.ground == scene.ground and [figure.place for figure in reading.figures] == [scene.figures[0].place]
        for reading, scene in zip(redraw(0.1), inputs, strict=True)
    ]

    assert np.mean(stayed) >= 0.9


def test_at_high_strength_the_prompt_decides_on_shape_colour_and_place(
    redraw: Callable[[float], list[Reading]], inputs: list[Scene], moved: list[Wish]
) -> None:
    follows = [
        reading.shows(wish.shape, wish.color, OPPOSITE[scene.figures[0].place])
        for reading, wish, scene in zip(redraw(0.6), moved, inputs, strict=True)
    ]

    assert np.mean(follows) >= 0.9


def half(place: str) -> PIL.Image.Image:
    """A mask, white in the half of this place."""
    white = np.zeros((SIZE, SIZE), np.uint8)
    rows, columns = {
        "left": (slice(None), slice(SIZE // 2)),
        "right": (slice(None), slice(SIZE // 2, None)),
        "top": (slice(SIZE // 2), slice(None)),
        "bottom": (slice(SIZE // 2, None), slice(None)),
    }[place]
    white[rows, columns] = 255
    return PIL.Image.fromarray(white)


def test_inpainting_puts_in_what_the_prompt_says_and_leaves_the_rest_alone(
    repos: Path, inputs: list[Scene], moved: list[Wish]
) -> None:
    artist = quick(AutoPipelineForInpainting.from_pretrained(repos / "kandinsky-2-1-inpaint"))
    there = [scene.figures[0] for scene in inputs]
    masks = [half(OPPOSITE[figure.place]) for figure in there]
    prompts = [f"{wish.prompt} on a grey background" for wish in moved]
    before = pictures_of(inputs)

    after = artist(
        prompts,
        image=before,
        mask_image=masks,
        preserve_unmasked=True,
        height=SIZE,
        width=SIZE,
        num_inference_steps=20,
        prior_num_inference_steps=10,
        generator=seeded(0, len(prompts)),
    ).images

    for old, mask, new in zip(before, masks, after, strict=True):
        kept = np.asarray(mask) == 0
        assert np.array_equal(np.asarray(old)[kept], np.asarray(new)[kept])
    painted = [
        read(picture).shows(wish.shape, wish.color, OPPOSITE[figure.place])
        for picture, wish, figure in zip(after, moved, there, strict=True)
    ]
    assert np.mean(painted) >= 0.8


# ---------------------------------------------------------------------------------------------------------- mixtures


def test_the_ends_of_a_mixture_are_what_is_mixed(artist: Any, inputs: list[Scene]) -> None:
    pairs = list(zip(SOME[:2], SOME[2:4], strict=True))
    scene = inputs[0]
    figure = scene.figures[0]

    def ends(first: str | PIL.Image.Image, second: str) -> list[Reading]:
        mixed = artist.mix(
            [first, second],
            [[1.0, 0.0], [0.0, 1.0]],
            prior_num_inference_steps=10,
            num_inference_steps=STEPS,
            height=SIZE,
            width=SIZE,
            generator=torch.Generator().manual_seed(0),
        )
        return [read(picture) for picture in mixed.images]

    for first, second in pairs:
        assert share_that_shows([first, second], ends(first.prompt, second.prompt)) == 1
    of_picture, of_prompt = ends(pictures_of([scene])[0], SOME[0].prompt)
    assert of_picture.shows(figure.shape, figure.color)
    assert of_prompt.shows(SOME[0].shape, SOME[0].color)


# ------------------------------------------------------------------------------------- ways to compute the same thing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_draws_the_same(repos: Path, seen: list[Reading], dtype: torch.dtype) -> None:
    artist = quick(AutoPipelineForText2Image.from_pretrained(repos / "kandinsky-2-1", dtype=dtype))

    assert share_alike(seen, look(artist, SOME)) >= 0.9


def test_with_and_without_the_cache_of_the_prior_the_same_is_drawn(repos: Path, seen: list[Reading]) -> None:
    artist = quick(AutoPipelineForText2Image.from_pretrained(repos / "kandinsky-2-1")).exact_reference()

    assert share_alike(seen, look(artist, SOME)) == 1


def test_an_optimized_pipeline_draws_the_same(repos: Path, seen: list[Reading]) -> None:
    artist = quick(AutoPipelineForText2Image.from_pretrained(repos / "kandinsky-2-1")).optimize()

    assert share_alike(seen, look(artist, SOME)) == 1
