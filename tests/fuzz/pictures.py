"""Pictures, arrays and model cards of unknown origin."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL.Image
import torch

from kandinsky_diffusers import images
from kandinsky_diffusers.cards import render_card, versions
from kandinsky_diffusers.connected import find_prior

from . import mutations as hostile
from .sandbox import Target, written


Act = Callable[[], Any]

MOST_PIXELS = 2**24  # so that what may be read takes less time and memory than a case has


def targets() -> list[Target]:
    """What reads them."""
    return [
        Target("prior of a card", _card, (ValueError,)),
        Target("rendered card", _rendered, ()),
        Target("picture", _picture, (TypeError, ValueError)),
        Target("array", _array, (TypeError, ValueError)),
    ]


# --------------------------------------------------------------------------------------------------------------- cards
def _card(random: Random, case: Path) -> Act:
    return partial(find_prior, written(case / "in" / "decoder" / "README.md", hostile.front_matter(random)).parent)


def _rendered(random: Random, case: Path) -> Act:
    """The card of a conversion whose files and tensors have odd names."""
    texts = (
        *hostile.PATHS,
        "---\nprior: evil/prior\n---",
        "{{ 7 * 7 }}",
        "{% include '/etc/passwd' %}",
        "<script>",
        "`x`",
        "\ud800",
    )
    text = partial(random.choice, texts)
    record = {"file": text(), "folder": text(), "bytes": 3, "sha256": text()}
    model = {"class": text(), "sources": [text()], "tensors": 1, "parameters": 1, "dropped": {text(): text()}}
    facts = {
        "converter": "kandinsky_diffusers",
        "versions": {name: text() for name in versions()},
        "version": "2.1",
        "repository": "kandinsky-2-1",
        "options": {"dtype": "auto", "variant": random.choice((None, "fp16")), "layout": "split"},
        "sources": {text(): record},
        "components": {text(): model},
        "verification": random.choice((None, {"bit_identical_tensors": {text(): 3}, "loaded_and_run": text()})),
    }

    def act() -> None:
        card = str(render_card("kandinsky-2-1", facts))
        front_matter = card.split("\n---\n")[0]
        if "evil" in front_matter or "root:" in card or "\n49" in front_matter:
            raise AssertionError("the names of a file have become front matter, or a template")

    return act


# ------------------------------------------------------------------------------------------------------------ pictures
def _checks(random: Random, given: Any) -> Act:
    height, width = random.choice(((8, 8), (16, 8), (1, 1)))
    return random.choice(
        (
            lambda: images.pixels_from(given, height, width),
            lambda: images.masks_from(given),
            lambda: images.masks_from(given, (height, width)),
            lambda: images.shares_from(given),
            lambda: images.hints_from(given, height, width),
            lambda: images.hints_from(given, height, width, channels=1),
            lambda: images.hint_size(given),
            lambda: images.scales_from(given, height, width, "scale"),
            lambda: images.size_of(given),
        )
    )


def _picture(random: Random, case: Path) -> Act:
    """A picture from a file that is damaged, or of a rare kind."""
    PIL.Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    modes = (
        "RGB",
        "L",
        "1",
        "P",
        "RGBA",
        "LA",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
        "I;16",
        "PA",
        "RGBa",
        "La",
        "RGBX",
    )
    mode = random.choice(modes)
    size = random.choice(((8, 8), (5, 9), (1, 1), (1, 500), (0, 0), (0, 5), (300, 200)))
    picture = PIL.Image.new(mode, size)
    file = io.BytesIO()
    if random.random() < 0.6:
        format = random.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000"))
        try:
            picture.convert("RGB").save(
                file, format, **({"exif": b"Exif\0\0" + bytes(40)} if format == "JPEG" else {})
            )
            content = hostile.damaged(random, file.getvalue())
            picture = PIL.Image.open(written(case / "in" / "a", content))
        except Exception:  # noqa: BLE001 (what Pillow does not open or write does not get to the library)
            picture = PIL.Image.new(mode, size)
    given = random.choice((picture, [picture], [picture, PIL.Image.new("RGB", (4, 4))]))
    return _checks(random, given)


def _array(random: Random, case: Path) -> Act:
    shape = tuple(random.choice((0, 1, 2, 3, 4, 8)) for _ in range(random.choice((0, 1, 2, 3, 3, 4, 4, 5))))
    dtypes = (
        "f4",
        "f8",
        "f2",
        "u1",
        "i8",
        "u2",
        "u4",
        "u8",
        "?",
        "c8",
        "O",
        "U3",
        ">f4",
        ">i4",
        "M8[s]",
        "S2",
        "i4,f4",
        "g",
    )
    array = np.zeros(shape, np.dtype(random.choice(dtypes)))
    if array.dtype.kind == "f" and array.size:
        array.flat[0] = random.choice((0.5, 1.0, 2.0, 256.0, -1.0, -2.0, np.nan, np.inf, -np.inf, 1e38))
    given: Any = array
    if random.random() < 0.4:
        kinds = (
            torch.float32,
            torch.bfloat16,
            torch.uint8,
            torch.bool,
            torch.complex64,
            torch.float8_e4m3fn,
            torch.uint16,
        )
        given = torch.zeros(shape, dtype=random.choice(kinds), device=random.choice(("cpu", "cpu", "meta")))
        if random.random() < 0.15 and given.dtype == torch.float32 and given.device.type == "cpu":
            given = random.choice((given.to_sparse(), torch.quantize_per_tensor(given, 0.1, 0, torch.quint8)))
    others = (None, "a", 3, [], (), [None], {}, [[array]], b"x", [array, "a"], object(), float("nan"), 10**400, True)
    given = random.choice(
        (
            given,
            given,
            given,
            given,
            [given],
            [given, given],
            array[::-1] if array.ndim else array,
            random.choice(others),
        )
    )
    return _checks(random, given)
