"""How good a converted release is: what it draws, read by `reading`. `python -m training.evaluation REPOS`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from diffusers import AutoPipelineForText2Image

import kandinsky_diffusers  # noqa: F401 (its pipelines are what is loaded)

from .captions import LANGUAGES, NOMINATIVE, NOUNS, adjective
from .reading import Reading, read
from .world import COLORS, SHAPES, SIZE


STEPS, PRIOR_STEPS, GUIDANCE = 25, 10, 4.0


class Wish(NamedTuple):
    """A prompt, and what its picture has to show."""

    prompt: str
    shape: str
    color: str


def wishes(language: str) -> list[Wish]:
    """Every colour with every shape, in `"en"` or `"ru"`."""
    return [Wish(_prompt(shape, color, language), shape, color) for shape in SHAPES for color in COLORS]


def _prompt(shape: str, color: str, language: str) -> str:
    if language == "en":
        return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"
    gender, forms = NOUNS[shape]
    return f"{adjective(color, gender, NOMINATIVE)} {forms[NOMINATIVE]}"


def readings(pipeline: Any, prompts: Sequence[str], seed: int, at_once: int = 35, **options: Any) -> Iterator[Reading]:
    """What a combined pipeline draws for prompts, read.

    Args:
        pipeline: as `AutoPipelineForText2Image` loads it.
        prompts: one for each picture.
        seed: each picture has a seed of its own, counted from this.
        at_once: pictures drawn together.
        options: of the pipeline, besides those of this module.
    """
    asked = {
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": STEPS,
        "prior_num_inference_steps": PRIOR_STEPS,
        "guidance_scale": GUIDANCE,
        **options,
    }
    for start in range(0, len(prompts), at_once):
        some = list(prompts[start : start + at_once])
        yield from map(read, pipeline(some, generator=seeded(seed + start, len(some)), **asked).images)


def seeded(seed: int, count: int) -> list[torch.Generator]:
    """Generators with this seed and the following ones."""
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]


def accuracy(pipeline: Any, language: str, seed: int = 0, **options: Any) -> dict[str, float]:
    """The [`shares`] of all wishes.

    Args: see [`wishes`] and [`readings`].
    """
    asked = wishes(language)
    return shares(asked, list(readings(pipeline, [wish.prompt for wish in asked], seed, **options)))


def shares(asked: Sequence[Wish], seen: Sequence[Reading]) -> dict[str, float]:
    """Shares of wishes whose picture shows one figure, with the right `color`, the right `shape`, and `both`."""
    pairs = list(zip(asked, seen, strict=True))
    single = [(wish, reading.figures[0]) for wish, reading in pairs if len(reading.figures) == 1]
    return {
        "color": sum(wish.color == figure.color for wish, figure in single) / len(pairs),
        "shape": sum(wish.shape == figure.shape for wish, figure in single) / len(pairs),
        "both": sum((wish.shape, wish.color) == (figure.shape, figure.color) for wish, figure in single) / len(pairs),
    }


def main(
    repos: Annotated[Path, typer.Argument(help="folder with what a conversion of the release has written")],
    seeds: Annotated[int, typer.Option(min=1, help="pictures of each prompt")] = 2,
) -> None:
    """Print the accuracy of text to image in both languages, with guidance and without."""
    pipeline = AutoPipelineForText2Image.from_pretrained(repos / "kandinsky-2-1")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, dict[str, float]] = {
        "guidance 4": {},
        "guidance 1": {"guidance_scale": 1.0},
        "guidance 1, of the prior too": {"guidance_scale": 1.0, "prior_guidance_scale": 1.0},
    }
    for title, options in settings.items():
        for language in LANGUAGES:
            found = [accuracy(pipeline, language, 1000 * seed, **options) for seed in range(seeds)]
            means = {name: sum(each[name] for each in found) / seeds for name in found[0]}
            typer.echo(f"{title}, {language}: " + ", ".join(f"{name} {share:.1%}" for name, share in means.items()))


if __name__ == "__main__":
    typer.run(main)
