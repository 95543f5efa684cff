"""All pictures of the demo on one sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .rows import Picture, Row


TILE = 176  # width and height of a picture on the sheet, in pixels
GAP = 16
TITLE, TEXT, CAPTION = 20, 14, 13  # heights of letters
CAPTION_LETTERS = 24  # in a line
PAPER, INK, GREY = "#ffffff", "#1c1c1c", "#5a5a5a"
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")
LATIN = str.maketrans("абвгдезийклмнопрстуфхцъыьэ", "abvgdeziyklmnoprstufhc'y'e") | str.maketrans(
    {"ё": "yo", "ж": "zh", "ч": "ch", "ш": "sh", "щ": "shch", "ю": "yu", "я": "ya"}
)


def make_sheet(rows: Sequence[Row[Picture]], heading: str) -> Image.Image:
    """Lay out rows of pictures: a title and a sentence above each row, a caption below each picture.

    Args:
        rows: they may differ in length.
        heading: above all of them.
    """
    columns = max((len(row.items) for row in rows), default=1)
    width = GAP + columns * (TILE + GAP)
    strips = [_strip(row, width) for row in rows]
    sheet = Image.new("RGB", (width, 2 * GAP + TITLE + sum(strip.height for strip in strips)), PAPER)
    write(ImageDraw.Draw(sheet), (GAP, GAP), heading, TITLE, INK)
    top = 2 * GAP + TITLE
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _strip(row: Row[Picture], width: int) -> Image.Image:
    captions = [textwrap.wrap(picture.caption, CAPTION_LETTERS) for picture in row.items]
    pictures_top = TITLE + TEXT + GAP
    captions_top = pictures_top + TILE + GAP // 4
    height = captions_top + max(map(len, captions), default=0) * CAPTION * 4 // 3 + GAP
    strip = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(strip)
    write(pen, (GAP, 0), row.title, TITLE, INK)
    write(pen, (GAP, TITLE + GAP // 3), row.text, TEXT, GREY)
    for column, (picture, lines) in enumerate(zip(row.items, captions, strict=True)):
        left = GAP + column * (TILE + GAP)
        strip.paste(ImageOps.contain(picture.image, (TILE, TILE), Image.Resampling.BICUBIC), (left, pictures_top))
        write(pen, (left, captions_top), "\n".join(lines), CAPTION, GREY)
    return strip


def write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, height: int, color: str) -> None:
    """Write, in Latin letters where no font of the system has Cyrillic ones."""
    font = system_font(height)
    if font is None:
        font, text = ImageFont.load_default(height), text.translate(LATIN)
    pen.text(place, text, fill=color, font=font)


@cache
def system_font(height: int) -> ImageFont.FreeTypeFont | None:
    """The first of `FONTS` that there is; Pillow's own font has no Cyrillic letters."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, height)
        except OSError:
            continue
    return None
