"""The world of the tiny Kandinsky: what is drawn can be read again, and captions say what is there."""

from __future__ import annotations

import itertools
import random

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.captions import ACCUSATIVE, INSTRUMENTAL, NOMINATIVE, NOUNS, Said, adjective, caption, random_caption
from training.reading import Reading, read
from training.world import COLORS, GROUNDS, PLACES, RADII, SHAPES, Scene, draw, make_figure, random_scene


SEEDS = st.integers(0, 2**32)


def scene_of(shape: str, color: str, place: str = "left", size: str = "large", ground: str = "grey") -> Scene:
    return Scene(ground, (make_figure(shape, color, place, size, random.Random(0)),))


def contents(scene: Scene) -> tuple[str, set[tuple[str, ...]]]:
    return scene.ground, {(f.shape, f.color, f.place, f.size) for f in scene.figures}


def seen(reading: Reading) -> tuple[str, set[tuple[str, ...]]]:
    return reading.ground, {(f.shape, f.color, f.place, f.size) for f in reading.figures}


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_what_is_drawn_can_be_read(seed: int) -> None:
    scene = random_scene(random.Random(seed))

    assert seen(read(draw([scene])[0])) == contents(scene)


def test_every_kind_of_figure_can_be_read() -> None:
    kinds = itertools.product(SHAPES, COLORS, ["centre"], RADII, GROUNDS)
    scenes = [scene_of(*kind) for kind in kinds]

    assert [seen(read(picture)) for picture in draw(scenes)] == [contents(scene) for scene in scenes]


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_reading_stands_noise_and_blur(seed: int) -> None:
    scene = random_scene(random.Random(seed))
    small = PIL.Image.fromarray(draw([scene])[0].permute(1, 2, 0).numpy()).resize((48, 48), PIL.Image.Resampling.BOX)
    blurred = np.asarray(small.resize((64, 64), PIL.Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = blurred + np.random.default_rng(seed).normal(0, 8, blurred.shape)

    assert seen(read(noisy.clip(0, 255).astype(np.uint8))) == contents(scene)


def test_an_empty_picture_shows_nothing() -> None:
    reading = read(PIL.Image.new("RGB", (64, 64), GROUNDS["mint"]))

    assert reading == Reading("mint", ())
    assert not reading.shows("circle")


def test_a_reading_shows_what_one_figure_has_all_of() -> None:
    figures = (scene_of("circle", "red", "left").figures, scene_of("square", "blue", "right").figures)
    reading = read(draw([Scene("grey", figures[0] + figures[1])])[0])

    assert reading.shows("circle", "red", "left")
    assert reading.shows(color="blue")
    assert not reading.shows("circle", "blue")


def test_a_batch_is_drawn_like_its_scenes_alone() -> None:
    scenes = [random_scene(random.Random(seed)) for seed in range(20)]

    assert torch.equal(draw(scenes, at_once=7), torch.cat([draw([scene]) for scene in scenes]))


# ---------------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("name", "gender", "case", "text"),
    [
        ("red", "m", NOMINATIVE, "красный"),
        ("blue", "m", NOMINATIVE, "синий"),
        ("blue", "n", NOMINATIVE, "синее"),
        ("blue", "f", ACCUSATIVE, "синюю"),
        ("black", "n", INSTRUMENTAL, "чёрным"),
        ("large", "m", NOMINATIVE, "большой"),
        ("large", "m", INSTRUMENTAL, "большим"),
        ("small", "n", ACCUSATIVE, "маленькое"),
        ("small", "f", INSTRUMENTAL, "маленькой"),
    ],
)
def test_russian_adjectives_agree(name: str, gender: str, case: int, text: str) -> None:
    assert adjective(name, gender, case) == text


def test_a_caption_says_what_it_is_told_to() -> None:
    scene = scene_of("ring", "orange", "top", "small", "pink")
    everything = Said(size=True, place=True, ground=True)

    for seed in range(50):
        words = caption(scene, "en", everything, random.Random(seed)).lower()
        assert all(word in words for word in ("orange ring at the top", "pink background"))
        words = caption(scene, "ru", everything, random.Random(seed)).lower()
        assert "маленьк" in words
        assert "на розовом фоне" in words
        assert any(f"{word} {form}" in words for word in ("оранжевое", "оранжевым") for form in NOUNS["ring"][1])


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_captions_name_every_figure_and_nothing_that_is_not_there(seed: int) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng)
    words = random_caption(scene, "en", rng).lower().strip(".").replace(",", "").split()

    named = [word for word in words if word in (*SHAPES, "shape")]
    assert len(named) == len(scene.figures)
    assert {word for word in words if word in COLORS} <= {figure.color for figure in scene.figures}
    assert {word for word in words if word in SHAPES} <= {figure.shape for figure in scene.figures}
    assert {word for word in words if word in PLACES} - {"centre"} <= {figure.place for figure in scene.figures}


def test_english_articles_fit_the_word() -> None:
    texts = {caption(scene_of("circle", "orange"), "en", Said(), random.Random(seed)).lower() for seed in range(60)}

    assert "an orange circle" in texts
    assert not any("a orange" in text for text in texts)
