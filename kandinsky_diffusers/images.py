"""Sizes, pixels and masks.

Pictures are `[batch, 3, height, width]` in [-1, 1] inside the pipelines, masks `[batch, 1, height, width]` with 1
where the picture is repainted, as users give them, unless a name says `keep_mask` (1 keeps), as the networks want it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor


Image = PIL.Image.Image | np.ndarray | torch.Tensor
Images = Image | Sequence[Image]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# what Pillow's readers raise for files that are no pictures, or no whole ones
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)
_processor = VaeImageProcessor()


def latent_size(height: int, width: int, scale_factor: int) -> tuple[int, int]:
    """Latent height and width for a picture, rounded up to what the UNet can halve as often as the MoVQ does.

    Args:
        height: of the picture in pixels.
        width: of the picture in pixels.
        scale_factor: pixels per latent (8 for the published models, whose pictures thus grow to multiples of 64).
    """
    return tuple(-(-size // scale_factor**2) * scale_factor for size in (height, width))  # pyright: ignore


def pixels_from(
    images: Images,
    height: int,
    width: int,
    name: str = "image",
    by_unit_range: bool = False,
    reducing_gap: float | None = 1.0,
) -> torch.Tensor:
    """Pictures as one float32 tensor `[batch, 3, height, width]` in [-1, 1].

    PIL pictures are resized with Pillow's bicubic filter and made RGB, as the originals do (`prepare_image` in
    kandinsky2/utils.py). Arrays are `[height, width, 3]`, tensors `[3, height, width]`, or batches
    of these; uint8 and floats above 1 count as 0..255, floats with negative values as [-1, 1], other floats as [0, 1].
    Arrays and tensors of another size are resized bicubically with antialiasing.

    Args:
        images: one or several.
        height: in pixels.
        width: in pixels.
        name: of the argument, for errors.
        by_unit_range: whether 0..255 is brought to [0, 1] first, as `VaeImageProcessor` does; last bits depend on it.
        reducing_gap: of Pillow's `resize`: 1 in the originals of 2.x, None in those of 3.x.

    Raises:
        TypeError: an item is none of these.
        ValueError: an array or tensor has another shape or other values, or the sequence is empty.
    """
    items = as_list(images, name)
    return torch.cat([_pixels_of(image, height, width, name, by_unit_range, reducing_gap) for image in items])


@contextmanager
def _decoding(image: PIL.Image.Image, name: str) -> Iterator[None]:
    """Pillow reads a file when its pixels are needed, and tells only then what is wrong with it."""
    limit, pixels = PIL.Image.MAX_IMAGE_PIXELS, image.width * image.height
    if getattr(image, "tile", None) and limit is not None and pixels > limit:  # not read yet; Pillow only warns
        raise ValueError(f"`{name}` is a file of {pixels} pixels; accepted is `PIL.Image.MAX_IMAGE_PIXELS`, {limit}.")
    try:
        yield
    except UNREADABLE as error:
        raise ValueError(f"`{name}` is a picture that cannot be read: {error}; accepted is a whole one.") from error


def _from_bytes(values: torch.Tensor, by_unit_range: bool) -> torch.Tensor:
    return values / 255.0 * 2.0 - 1.0 if by_unit_range else values / 127.5 - 1.0


def _pixels_of(
    image: Image, height: int, width: int, name: str, by_unit_range: bool, reducing_gap: float | None
) -> torch.Tensor:
    if isinstance(image, PIL.Image.Image):
        bicubic = PIL.Image.Resampling.BICUBIC
        with _decoding(image, name):
            resized = image.resize((width, height), bicubic, reducing_gap=reducing_gap).convert("RGB")
        values = torch.from_numpy(np.array(resized, dtype=np.float32)[None]).permute(0, 3, 1, 2)
        return _from_bytes(values, by_unit_range)
    pixels = _as_batch(image, channels=3, name=name)
    lowest, highest = float(pixels.min()), float(pixels.max())
    if not (lowest >= -1.0 and highest <= 255.0) or (lowest < 0.0 and highest > 1.0):
        raise ValueError(f"`{name}` has values from {lowest} to {highest}; accepted is [-1, 1], [0, 1] or 0..255.")
    if highest > 1.0 or not _is_floating(image):
        pixels = _from_bytes(pixels, by_unit_range)
    elif lowest >= 0.0:
        pixels = pixels * 2.0 - 1.0
    return resize_pixels(pixels, height, width)


def resize_pixels(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixels `[batch, 3, h, w]` in [-1, 1] resized bicubically with antialiasing; of the right size, themselves."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(-1.0, 1.0)


def masks_from(masks: Images, size: tuple[int, int] | None = None, name: str = "mask_image") -> list[torch.Tensor]:
    """Masks as float32 tensors `[batch, 1, h, w]`, 1 where at least 0.5 (white) was given.

    PIL masks are made grey and resized to `size` (height, width), if it is given, with Pillow's Lanczos filter, as
    stock does. Arrays and tensors keep their sizes; they are `[h, w]`, `[1, h, w]`, `[batch, h, w]` or
    `[batch, 1, h, w]`, arrays also with the channel last; boolean and uint8 ones are scaled.

    Raises:
        TypeError: an item is no picture, array or tensor.
        ValueError: shapes or values (outside [0, 1], or 0..255) are others.
    """
    return [(_share_of(mask, size, name) >= 0.5).float() for mask in as_list(masks, name)]


def shares_from(masks: Images, name: str = "mask_image") -> list[torch.Tensor]:
    """The same with all that is grey, in [0, 1]; PIL masks keep their sizes, too.

    Raises:
        TypeError, ValueError: see [`masks_from`].
    """
    return [_share_of(mask, None, name) for mask in as_list(masks, name)]


def _share_of(mask: Image, size: tuple[int, int] | None, name: str) -> torch.Tensor:
    if isinstance(mask, PIL.Image.Image):
        height, width = size or (mask.height, mask.width)
        with _decoding(mask, name):
            mask = np.array(mask.resize((width, height), PIL.Image.Resampling.LANCZOS).convert("L"))
    values = _as_batch(mask, channels=1, name=name)
    lowest, highest = float(values.min()), float(values.max())
    if not (lowest >= 0.0 and highest <= 255.0):  # written so that it catches NaN
        raise ValueError(f"`{name}` has values from {lowest} to {highest}; accepted is [0, 1] or 0..255.")
    return values / 255.0 if highest > 1.0 else values


def resize_mask(masks: Sequence[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Masks resized with the nearest pixel, as the originals do, to one tensor `[batch, 1, height, width]`."""
    return torch.cat([F.interpolate(mask, (height, width), mode="nearest") for mask in masks])


def made_rgb(images: Any, name: str = "image") -> Any:
    """PIL pictures, one or several, as RGB; everything else as it is.

    Raises:
        ValueError: one is of a file that cannot be read.
    """
    if isinstance(images, (list, tuple)):
        return [made_rgb(image, name) for image in images]
    if not isinstance(images, PIL.Image.Image):
        return images
    with _decoding(images, name):
        return images.convert("RGB")


def as_list(images: Images, name: str = "image") -> list[Image]:
    """Pictures, arrays and tensors as a list of them; batches stay together.

    Raises:
        TypeError: an item is none of these.
        ValueError: the sequence is empty.
    """
    items: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
    if not items:
        raise ValueError(f"`{name}` is an empty list; at least one picture is needed.")
    for item in items:
        if not isinstance(item, (PIL.Image.Image, np.ndarray, torch.Tensor)):
            raise TypeError(f"`{name}` is a {type(item).__name__}; accepted are PIL pictures, arrays and tensors.")
    return items


def size_of(images: Any, name: str = "image") -> tuple[int, int]:
    """Height and width of a picture, or of the first of several.

    Raises:
        TypeError, ValueError: see [`pixels_from`].
    """
    image = as_list(images, name)[0]
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    height, width = _as_batch(image, channels=3, name=name).shape[-2:]
    return height, width


def grow_repainted(keep_mask: torch.Tensor) -> torch.Tensor:
    """Every 0 (repaint) also clears six neighbours: up, left, up-left, down, right, down-right.

    (`prepare_mask` in kandinsky2/utils.py, which diffusers kept; the other two diagonals stay.)

    Args:
        keep_mask: `[batch, 1, height, width]`, 1 keeps.
    """
    repainted = 1.0 - keep_mask
    grown = repainted.clone()
    height, width = keep_mask.shape[-2:]
    for down, right in ((-1, 0), (0, -1), (-1, -1), (1, 0), (0, 1), (1, 1)):
        shifted = F.pad(repainted, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
        top, left = max(-down, 0), max(-right, 0)
        grown = torch.maximum(grown, shifted[..., top : top + height, left : left + width])
    return 1.0 - grown


def hints_from(hints: Images, height: int, width: int, name: str = "hint", channels: int = 3) -> torch.Tensor:
    """Depth maps, or other control images, as float32 `[batch, channels, height, width]` in [0, 1].

    Accepted is what [`pixels_from`] accepts, of as many channels, and maps of one channel: grey PIL pictures,
    `[h, w]`, `[h, w, 1]` or `[1, h, w]`. Floats are taken as they are, and must lie in [0, 1]; bytes count to 255,
    larger integers to 65535.

    Raises:
        TypeError, ValueError: see [`pixels_from`].
    """
    values = [_hint_values(hint, name, channels) for hint in as_list(hints, name)]
    return torch.cat([_resized_hint(hint, height, width) for hint in values])


def hint_size(hints: Images, name: str = "hint", channels: int = 3) -> tuple[int, int]:
    """Height and width of what [`hints_from`] takes, of the first of several.

    Raises:
        TypeError, ValueError: see [`pixels_from`].
    """
    height, width = _hint_values(as_list(hints, name)[0], name, channels).shape[-2:]
    return height, width


def _resized_hint(values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if values.shape[-2:] != (height, width):
        values = F.interpolate(values, (height, width), mode="bilinear", antialias=True)
    return values


def _hint_values(hint: Image, name: str, channels: int) -> torch.Tensor:
    if isinstance(hint, PIL.Image.Image):
        mode = hint.mode if hint.mode.startswith(("I", "F")) else "L" if channels == 1 else "RGB"
        with _decoding(hint, name):
            hint = np.array(hint if mode == hint.mode else hint.convert(mode))
    last_is_one = isinstance(hint, np.ndarray) and hint.shape[-1:] == (1,)
    single = hint.ndim < 3 or last_is_one or hint.shape[-3] == 1
    values = _as_batch(hint, channels=1 if single else channels, name=name).expand(-1, channels, -1, -1)
    if not _is_floating(hint):
        kind = str(hint.dtype).removeprefix("torch.")
        values = values / {"bool": 1.0, "uint8": 255.0}.get(kind, 65535.0)
    lowest, highest = float(values.min()), float(values.max())
    if not (lowest >= 0.0 and highest <= 1.0):
        raise ValueError(f"`{name}` has values from {lowest} to {highest}; accepted is [0, 1], or integers.")
    return values


def scales_from(scales: float | Image | Sequence[float | Image], height: int, width: int, name: str) -> torch.Tensor:
    """How strongly something acts, as float32 `[rows, 1, height, width]`; `[rows, 1, 1, 1]` for numbers alone.

    Args:
        scales: one or several numbers or maps: grey pictures, `[h, w]`, `[1, h, w]` or batches of these. Floats are
            taken as they are, bytes count to 1. Maps of another size are resized with the nearest pixel.
        height: in pixels.
        width: in pixels.
        name: of the argument, for errors.

    Raises:
        TypeError: an item is none of these.
        ValueError: a shape is another, a value is not finite, or the sequence is empty.
    """
    items: list[Any] = list(scales) if isinstance(scales, (list, tuple)) else [scales]
    if any(isinstance(item, int) and abs(item) > 2**64 for item in items):
        raise ValueError(f"`{name}` has a number that is no scale; accepted are those of a float.")
    rows = [_scale_of(item, name) for item in items]
    if any(row.shape[-2:] != (1, 1) for row in rows):
        rows = [F.interpolate(row, (height, width), mode="nearest-exact") for row in rows]
    if not rows or not all(bool(row.isfinite().all()) for row in rows):
        raise ValueError(
            f"`{name}` is empty, or has a value that is not finite; accepted are numbers and maps of them."
        )
    return torch.cat(rows)


def _scale_of(scale: Any, name: str) -> torch.Tensor:
    if isinstance(scale, (int, float)):
        return torch.full((1, 1, 1, 1), float(scale))
    if isinstance(scale, PIL.Image.Image):
        with _decoding(scale, name):
            scale = np.array(scale.convert("L"))
    if not isinstance(scale, (np.ndarray, torch.Tensor)):
        kind = type(scale).__name__
        raise TypeError(f"`{name}` is or has a {kind}; accepted are numbers, PIL pictures, arrays and tensors.")
    values = _as_batch(scale, channels=1, name=name)
    return values / 255.0 if str(scale.dtype).endswith("uint8") else values


def pad_to(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Continue the last row and column down and to the right, to `height` and `width`."""
    bottom, right = height - pixels.shape[-2], width - pixels.shape[-1]
    return F.pad(pixels, (0, right, 0, bottom), mode="replicate") if bottom or right else pixels


def center_crop(pixels: torch.Tensor, size: Mapping[str, int]) -> torch.Tensor:
    """The middle of `pixels` `[batch, channels, h, w]`; an odd margin is halved to even, as OpenAI's CLIP does.

    Args:
        pixels: at least as large as `size`.
        size: `{"height": ..., "width": ...}`.
    """
    top, left = (
        round((have - size[name]) / 2) for have, name in zip(pixels.shape[-2:], ("height", "width"), strict=True)
    )
    return pixels[..., top : top + size["height"], left : left + size["width"]]


def pixels_to(pixels: torch.Tensor, output_type: str) -> Any:
    """Pixels in [-1, 1] as a list of PIL pictures, or an array or tensor in [0, 1]; values outside are clamped."""
    return _processor.postprocess(pixels.float() if output_type != "pt" else pixels, output_type)


def _is_floating(image: np.ndarray | torch.Tensor) -> bool:
    return image.dtype.is_floating_point if isinstance(image, torch.Tensor) else image.dtype.kind == "f"


def _as_batch(image: np.ndarray | torch.Tensor, channels: int, name: str) -> torch.Tensor:
    shape = tuple(image.shape)
    if isinstance(image, torch.Tensor):
        batch = image
        is_plain = image.layout == torch.strided and image.device.type != "meta" and not image.is_quantized
    else:
        is_plain = image.dtype.kind in "biuf" and image.dtype.isnative
        batch = torch.from_numpy(np.array(image)) if is_plain else torch.empty(0)
    if not is_plain or batch.is_complex():
        raise ValueError(
            f"`{name}` holds {image.dtype} values; accepted are plain arrays and tensors of real numbers."
        )
    if isinstance(image, np.ndarray) and batch.ndim >= 3 and batch.shape[-1] == channels:
        batch = (batch[None] if batch.ndim == 3 else batch).movedim(-1, -3)
    if channels == 1 and batch.ndim == 2:
        batch = batch[None]
    if batch.ndim == 3:
        batch = batch[None] if batch.shape[0] == channels else batch[:, None]
    if batch.ndim != 4 or batch.shape[1] != channels or not batch.numel():
        raise ValueError(f"`{name}` has the shape {list(shape)}; accepted is [{channels}, h, w] or a batch of it.")
    return batch.float()
