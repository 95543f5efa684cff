"""The rows of the demo as data: which pictures are drawn, from what, and the words that go with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from PIL import Image, ImageDraw

from .motifs import Motifs


class Picture(NamedTuple):
    """A picture, the words to print below it, and what it is for those who cannot see it."""

    caption: str
    description: str
    image: Image.Image


class Shot(NamedTuple):
    """A picture that is still to be drawn.

    Args:
        caption: as of a [`Picture`].
        description: likewise.
        task: how it is drawn; `mix` is the method of that name, on the pipeline that draws from text.
        arguments: of the pipeline.
        seed: of the noise.
    """

    caption: str
    description: str
    task: Literal["text", "mix", "image", "inpainting"]
    arguments: dict[str, Any]
    seed: int = 0


Item = TypeVar("Item", Picture, Picture | Shot)


@dataclass(frozen=True)
class Row(Generic[Item]):
    """Pictures that belong together, below a title and a sentence."""

    title: str
    text: str
    items: tuple[Item, ...]


def from_text(prompt: str, caption: str = "", seed: int = 0) -> Shot:
    """A picture of a prompt, which is the caption if there is no other."""
    description = f"Drawn from the prompt “{prompt}” with seed {seed}"
    return Shot(caption or f"“{prompt}”", description, "text", {"prompt": prompt}, seed)


def rows_of(motifs: Motifs, start: Image.Image, inpainting: bool) -> Iterator[Row[Picture | Shot]]:
    """All rows, those of one pipeline next to each other.

    Args:
        motifs: the prompts.
        start: the picture of `motifs.start`.
        inpainting: whether inpainting can be shown.
    """
    yield Row("Prompts", "In any language that the release knows.", tuple(map(from_text, motifs.prompts)))
    first = motifs.prompts[0]
    seeds = (from_text(first, f"seed {seed}", seed) for seed in motifs.seeds)
    yield Row("Seeds", f"“{first}”, from other noise each time.", tuple(seeds))
    yield from _mixtures(motifs, start)
    yield _image_to_image(motifs, start)
    if inpainting:
        yield _inpainting(motifs, start)


def _image_to_image(motifs: Motifs, start: Image.Image) -> Row[Picture | Shot]:
    def redrawn(strength: float) -> Shot:
        description = f"The input redrawn as “{motifs.change}” with strength {strength}"
        arguments = {
            "prompt": motifs.change,
            "image": start,
            "strength": strength,
            "guidance_scale": motifs.image_guidance,
        }
        return Shot(f"strength {strength}", description, "image", arguments)

    text = f"From a picture to “{motifs.change}”: the strength says how much of it may go."
    return Row("Image to image", text, (_given(motifs, start), *map(redrawn, motifs.strengths)))


def _inpainting(motifs: Motifs, start: Image.Image) -> Row[Picture | Shot]:
    mask = upper_half(start)
    shown = Image.composite(Image.new("RGB", start.size, "white"), start, mask)
    arguments = {"prompt": motifs.addition, "image": start, "mask_image": mask}
    description = f"The upper half repainted as “{motifs.addition}”"
    return Row(
        "Inpainting",
        f"“{motifs.addition}”: what is white in the mask is painted anew.",
        (
            _given(motifs, start),
            Picture("mask", "The mask: a white box in the upper half, black elsewhere", mask.convert("RGB")),
            Picture("input and mask", "The input with the box of the mask in white", shown),
            Shot("result", f"{description}, as the original does it", "inpainting", arguments),
            Shot(
                "preserve_unmasked=True",
                f"{description}, with all pixels outside the mask as they were",
                "inpainting",
                {**arguments, "preserve_unmasked": True},
            ),
        ),
    )


def _mixtures(motifs: Motifs, start: Image.Image) -> Iterator[Row[Picture | Shot]]:
    ends = {f"“{motifs.start}”": motifs.start, "the picture": start}
    titles = ("Between two prompts", "Between a picture and a prompt")
    for title, (name, end) in zip(titles, ends.items(), strict=True):
        shots = [_mixture(name, end, motifs.change, share) for share in motifs.shares]
        given = (_given(motifs, start),) if end is start else ()
        text = f"From {name} to “{motifs.change}”, always from the same noise."
        yield Row(title, text, (*given, *shots))


def _mixture(name: str, end: str | Image.Image, prompt: str, share: float) -> Shot:
    first, second = round(100 * (1 - share)), round(100 * share)
    description = f"A mixture of {first} % {name} and {second} % “{prompt}”"
    arguments = {"images_and_prompts": [end, prompt], "weights": [1 - share, share]}
    return Shot(f"{first} : {second}", description, "mix", arguments)


def _given(motifs: Motifs, start: Image.Image) -> Picture:
    return Picture("input", f"The input, drawn from the prompt “{motifs.start}”", start)


def upper_half(picture: Image.Image) -> Image.Image:
    """A mask, white in the upper half but for a margin at both sides."""
    mask = Image.new("L", picture.size, 0)
    width, height = picture.size
    ImageDraw.Draw(mask).rectangle([width // 8, 0, width - width // 8 - 1, height // 2 - 1], fill=255)
    return mask
