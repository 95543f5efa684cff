"""Captions of scenes in English and Russian, with what they leave out chosen at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .world import Figure, Scene


LANGUAGES = ("en", "ru")


@dataclass(frozen=True)
class Said:
    """How much a caption says. The number of figures, and a colour or a shape of each, is always said.

    Args:
        shape: whether shapes are named.
        color: whether colours are.
        size: whether sizes are.
        place: whether places are.
        ground: whether the ground is.
    """

    shape: bool = True
    color: bool = True
    size: bool = False
    place: bool = False
    ground: bool = False


def random_said(rng: random.Random, figures: int) -> Said:
    """What a caption of a scene with so many figures says; places are named more often where there are several."""
    left_out = rng.random()
    return Said(
        shape=left_out > 0.06,
        color=not 0.06 < left_out < 0.16,
        size=rng.random() < 0.35,
        place=rng.random() < (0.5 if figures == 1 else 0.75),
        ground=rng.random() < 0.4,
    )


def caption(scene: Scene, language: str, said: Said, rng: random.Random) -> str:
    """One of the ways to say it.

    Args:
        scene: what to describe.
        language: `"en"` or `"ru"`.
        said: what of it is said.
        rng: chooses among the ways.
    """
    text = (_english if language == "en" else _russian)(scene, said, rng)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def random_caption(scene: Scene, language: str, rng: random.Random) -> str:
    """A caption that says a random part of the scene in a random way."""
    return caption(scene, language, random_said(rng, len(scene.figures)), rng)


# ----------------------------------------------------------------------------------------------------------- English

ENGLISH_PLACES = {
    "centre": ("in the centre", "in the middle"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
ENGLISH_SIZES = {"small": ("small", "little"), "large": ("large", "big")}
ENGLISH_TEMPLATES = ("{}", "{}", "{}", "a picture of {}", "a drawing of {}", "draw {}")


def _english(scene: Scene, said: Said, rng: random.Random) -> str:
    article = rng.random() < 0.7
    figures = [_english_figure(figure, said, article, rng) for figure in scene.figures]
    text = rng.choice(ENGLISH_TEMPLATES).format(_joined(figures, ("and", "and", "next to"), said, rng))
    if said.ground:
        text += rng.choice((" on a {} background", ", {} background")).format(scene.ground)
    return text


def _english_figure(figure: Figure, said: Said, article: bool, rng: random.Random) -> str:
    words = [rng.choice(ENGLISH_SIZES[figure.size])] if said.size else []
    words += [figure.color] if said.color else []
    words += [figure.shape if said.shape else "shape"]
    if article:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    if said.place:
        words.append(rng.choice(ENGLISH_PLACES[figure.place]))
    return " ".join(words)


# ----------------------------------------------------------------------------------------------------------- Russian

NOMINATIVE, ACCUSATIVE, INSTRUMENTAL = range(3)

# gender, and the forms in the three cases
NOUNS = {
    "circle": ("m", ("круг", "круг", "кругом")),
    "square": ("m", ("квадрат", "квадрат", "квадратом")),
    "triangle": ("m", ("треугольник", "треугольник", "треугольником")),
    "cross": ("m", ("крест", "крест", "крестом")),
    "ring": ("n", ("кольцо", "кольцо", "кольцом")),
    "": ("f", ("фигура", "фигуру", "фигурой")),
}
# stem and declension of an adjective
ADJECTIVES = {
    "red": ("красн", "hard"),
    "orange": ("оранжев", "hard"),
    "yellow": ("жёлт", "hard"),
    "green": ("зелён", "hard"),
    "blue": ("син", "soft"),
    "purple": ("фиолетов", "hard"),
    "black": ("чёрн", "hard"),
    "small": ("маленьк", "velar"),
    "large": ("больш", "stressed"),
}
# endings by declension and gender, in the three cases; what is masculine here is inanimate
ENDINGS = {
    "hard": {"m": ("ый", "ый", "ым"), "n": ("ое", "ое", "ым"), "f": ("ая", "ую", "ой")},
    "soft": {"m": ("ий", "ий", "им"), "n": ("ее", "ее", "им"), "f": ("яя", "юю", "ей")},
    "velar": {"m": ("ий", "ий", "им"), "n": ("ое", "ое", "им"), "f": ("ая", "ую", "ой")},
    "stressed": {"m": ("ой", "ой", "им"), "n": ("ое", "ое", "им"), "f": ("ая", "ую", "ой")},
}
RUSSIAN_PLACES = {
    "centre": ("в центре", "посередине"),
    "left": ("слева",),
    "right": ("справа",),
    "top": ("сверху", "вверху"),
    "bottom": ("снизу", "внизу"),
}
RUSSIAN_GROUNDS = {"grey": "сером", "beige": "бежевом", "pink": "розовом", "mint": "мятном"}
RUSSIAN_TEMPLATES = (
    ("{}", NOMINATIVE),
    ("{}", NOMINATIVE),
    ("{}", NOMINATIVE),
    ("на картинке {}", NOMINATIVE),
    ("нарисуй {}", ACCUSATIVE),
    ("картинка с {}", INSTRUMENTAL),
)


def _russian(scene: Scene, said: Said, rng: random.Random) -> str:
    template, case = rng.choice(RUSSIAN_TEMPLATES)
    figures = [_russian_figure(figure, said, case, rng) for figure in scene.figures]
    text = template.format(_joined(figures, ("и",), said, rng))
    if said.ground:
        text += rng.choice((" на {} фоне", ", на {} фоне")).format(RUSSIAN_GROUNDS[scene.ground])
    return text


def _russian_figure(figure: Figure, said: Said, case: int, rng: random.Random) -> str:
    gender, forms = NOUNS[figure.shape if said.shape else ""]
    words = [adjective(figure.size, gender, case)] if said.size else []
    words += [adjective(figure.color, gender, case)] if said.color else []
    words += [forms[case]]
    if said.place:
        words.append(rng.choice(RUSSIAN_PLACES[figure.place]))
    return " ".join(words)


def adjective(name: str, gender: str, case: int) -> str:
    """The Russian for a colour or a size, declined."""
    stem, declension = ADJECTIVES[name]
    return stem + ENDINGS[declension][gender][case]


def _joined(figures: Sequence[str], joiners: Sequence[str], said: Said, rng: random.Random) -> str:
    if len(figures) == 1:
        return figures[0]
    first, second = figures if said.place and rng.random() < 0.7 else rng.sample(figures, 2)
    return f"{first} {rng.choice(joiners)} {second}"
