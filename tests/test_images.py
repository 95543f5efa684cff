"""Pictures and masks of every kind and size become the tensors that the models take."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kandinsky_diffusers import images


sides = st.integers(1, 40)
pictures = arrays(np.uint8, st.tuples(sides, sides, st.just(3)))
masks = arrays(np.bool_, st.tuples(sides, st.integers(2, 40)))


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))


# One uint8 picture [h, w, 3] with black and white in it, in every form that a user may have it in.
PICTURE_FORMS = {
    "PIL": PIL.Image.fromarray,
    "array": lambda a: a,
    "array of float32 in [0, 1]": lambda a: (a / 255).astype(np.float32),
    "array of float64 in 0..255": lambda a: a.astype(np.float64),
    "array in [-1, 1]": lambda a: a / 127.5 - 1,
    "array with batch": lambda a: a[None],
    "array that cannot be written to": lambda a: np.asarray(PIL.Image.fromarray(a)),
    "tensor": channels_first,
    "tensor of int64": lambda a: channels_first(a).long(),
    "tensor in [0, 1]": lambda a: channels_first(a) / 255,
    "tensor in [-1, 1]": lambda a: channels_first(a) / 127.5 - 1,
    "tensor with batch": lambda a: channels_first(a)[None],
    "list": lambda a: [a],
    "tuple": lambda a: (PIL.Image.fromarray(a),),
}


# ------------------------------------------------------------------------------------------------------------ pictures
@pytest.mark.parametrize("form", PICTURE_FORMS.values(), ids=PICTURE_FORMS.keys())
def test_a_picture_is_the_same_in_every_form(form: Any) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    array[0, 0], array[1, 1] = 0, 255  # so that the range of the floats is plain
    pixels = images.pixels_from(form(array), 5, 7)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, channels_first(array)[None] / 127.5 - 1, rtol=0, atol=1e-6)


def test_whole_numbers_count_to_255_in_the_darkest_picture() -> None:
    for dark in (np.ones((4, 4, 3), dtype=np.uint8), torch.ones(3, 4, 4, dtype=torch.int64)):
        assert images.pixels_from(dark, 4, 4).max() < -0.99


@given(array=pictures, height=sides, width=sides, form=st.sampled_from(list(PICTURE_FORMS)))
def test_every_picture_gets_the_size_asked_for_and_stays_in_range(
    array: np.ndarray, height: int, width: int, form: str
) -> None:
    pixels = images.pixels_from(PICTURE_FORMS[form](array), height, width)
    assert pixels.shape == (1, 3, height, width)
    assert pixels.abs().max() <= 1.0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pil_pictures_of_every_mode(mode: str) -> None:
    picture = PIL.Image.new("RGB", (6, 4), "white").convert(mode)
    assert (images.pixels_from(picture, 4, 6) == 1.0).all()


@given(st.lists(pictures, min_size=1, max_size=4))
def test_pictures_of_many_sizes_and_forms_make_one_batch_in_their_order(batch: list[np.ndarray]) -> None:
    forms = [PIL.Image.fromarray, channels_first, lambda array: array]
    given_as = [forms[index % 3](array) for index, array in enumerate(batch)]
    together = images.pixels_from(given_as, 8, 6)
    assert together.shape == (len(batch), 3, 8, 6)
    for index, picture in enumerate(given_as):
        assert torch.equal(together[index : index + 1], images.pixels_from(picture, 8, 6))


def test_pil_pictures_are_resized_as_the_original_does() -> None:
    array = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    resized = PIL.Image.fromarray(array).resize((32, 16), resample=PIL.Image.Resampling.BICUBIC, reducing_gap=1)
    expected = torch.from_numpy(np.array(resized).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    assert torch.equal(images.pixels_from(PIL.Image.fromarray(array), 16, 32), expected)


def test_height_and_width_are_not_swapped_by_any_form() -> None:
    array = np.zeros((40, 20, 3), dtype=np.uint8)
    array[:20] = 255  # the upper half is white
    for form in PICTURE_FORMS.values():
        pixels = images.pixels_from(form(array), 20, 10)[0]
        assert pixels[:, 2, 5].min() > 0.9
        assert pixels[:, 17, 5].max() < -0.9


def test_what_is_given_is_not_changed() -> None:
    array = np.random.default_rng(0).random((8, 8, 3))
    tensor = channels_first(array)
    before = array.copy()
    images.pixels_from([array, tensor], 8, 8)
    assert np.array_equal(array, before)
    assert torch.equal(tensor, channels_first(before))


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (None, TypeError),
        ("cat.png", TypeError),
        ([PIL.Image.new("RGB", (4, 4)), "cat.png"], TypeError),
        ([], ValueError),
        (np.zeros((4, 4)), ValueError),
        (np.zeros((4, 4, 4)), ValueError),
        (np.zeros((0, 4, 3)), ValueError),
        (np.zeros((1, 1, 4, 4, 3)), ValueError),
        (torch.zeros(4, 4, 3), ValueError),
        (torch.zeros(1, 4, 8, 8), ValueError),
        (torch.full((3, 4, 4), 256.0), ValueError),
        (torch.full((3, 4, 4), -2.0), ValueError),
        (torch.tensor([-1.0, 2.0, 0.0]).view(3, 1, 1), ValueError),
        (torch.full((3, 4, 4), float("nan")), ValueError),
        (torch.tensor([float("nan"), 0.0, 1.0]).view(3, 1, 1), ValueError),
        (torch.full((3, 4, 4), float("inf")), ValueError),
    ],
)
@pytest.mark.parametrize("name", ["image", "control_image"])
def test_wrong_pictures_are_named(image: Any, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"`{name}`"):
        images.pixels_from(image, 4, 4, name)


# --------------------------------------------------------------------------------------------------------------- masks
MASK_FORMS = {
    "PIL L": lambda m: PIL.Image.fromarray(m.astype(np.uint8) * 255),
    "PIL 1": lambda m: PIL.Image.fromarray(m.astype(np.uint8) * 255).convert("1"),
    "PIL RGB": lambda m: PIL.Image.fromarray(m.astype(np.uint8) * 255).convert("RGB"),
    "bool [h, w]": lambda m: m,
    "uint8 [h, w] of 0 and 1": lambda m: m.astype(np.uint8),
    "uint8 [h, w] of 0 and 255": lambda m: m.astype(np.uint8) * 255,
    "float [h, w]": lambda m: m.astype(np.float64),
    "float [1, h, w]": lambda m: m[None].astype(np.float32),
    "float [1, h, w, 1]": lambda m: m[None, :, :, None].astype(np.float32),
    "bool tensor [h, w]": torch.from_numpy,
    "tensor [h, w]": lambda m: torch.from_numpy(m).float(),
    "tensor [1, h, w]": lambda m: torch.from_numpy(m)[None].half(),
    "tensor [1, 1, h, w]": lambda m: torch.from_numpy(m)[None, None].double(),
    "list": lambda m: [m],
}


@given(mask=masks, form=st.sampled_from(list(MASK_FORMS)))
def test_a_mask_is_the_same_in_every_form(mask: np.ndarray, form: str) -> None:
    (converted,) = images.masks_from(MASK_FORMS[form](mask))
    assert converted.dtype == torch.float32
    assert torch.equal(converted, torch.from_numpy(mask)[None, None].float())


def test_a_mask_of_one_column() -> None:
    mask = np.array([[True], [False], [True]])
    for form in ("PIL L", "bool [h, w]", "tensor [h, w]", "tensor [1, 1, h, w]"):
        (converted,) = images.masks_from(MASK_FORMS[form](mask))
        assert converted.tolist() == [[[[1.0], [0.0], [1.0]]]], form


def test_a_mask_with_the_channel_last() -> None:
    mask = np.random.default_rng(0).random((5, 7, 1)) < 0.5
    (converted,) = images.masks_from(mask)
    assert torch.equal(converted[0, 0], torch.from_numpy(mask[..., 0]).float())


def test_a_batch_of_masks() -> None:
    batch = torch.rand(3, 5, 7) < 0.5
    for given_as in (batch, batch.numpy(), batch[:, None], batch.numpy()[..., None]):
        (converted,) = images.masks_from(given_as)
        assert torch.equal(converted, batch[:, None].float())


def test_half_white_and_whiter_is_repainted() -> None:
    (levels,) = images.masks_from(torch.tensor([[0.0, 0.49, 0.5, 1.0]]))
    assert levels.flatten().tolist() == [0, 0, 1, 1]
    (greys,) = images.masks_from(PIL.Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8)))
    assert greys.flatten().tolist() == [0, 0, 1, 1]


@given(sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=4), height=sides, width=sides)
def test_masks_of_many_sizes_are_resized_to_one(sizes: list[tuple[int, int]], height: int, width: int) -> None:
    given_as = images.masks_from([np.full(size, index % 2) for index, size in enumerate(sizes)])
    resized = images.resize_mask(given_as, height, width)
    assert resized.shape == (len(sizes), 1, height, width)
    for index, mask in enumerate(resized):
        assert (mask == index % 2).all()


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (None, TypeError),
        ("mask.png", TypeError),
        ([], ValueError),
        (np.zeros((0, 4)), ValueError),
        (np.zeros((2, 4, 4, 3)), ValueError),
        (torch.zeros(1, 3, 4, 4), ValueError),
        (torch.zeros(4), ValueError),
        (torch.full((4, 4), -0.5), ValueError),
        (torch.full((4, 4), 256.0), ValueError),
        (torch.full((4, 4), float("nan")), ValueError),
        (torch.tensor([[0.0, float("nan"), 1.0]]), ValueError),
    ],
)
def test_wrong_masks_are_named(mask: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`mask_image`"):
        images.masks_from(mask)


def grown_by_loops(keep: np.ndarray) -> np.ndarray:
    """`prepare_mask` of the original, as a rule: a repainted pixel clears six of its eight neighbours."""
    grown = keep.copy()
    height, width = keep.shape
    for row, column in zip(*np.nonzero(keep == 0), strict=True):
        for down, right in ((-1, 0), (0, -1), (-1, -1), (1, 0), (0, 1), (1, 1)):
            if 0 <= row + down < height and 0 <= column + right < width:
                grown[row + down, column + right] = 0
    return grown


@given(arrays(np.bool_, st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))))
def test_the_repainted_region_grows_as_in_the_original(keep: np.ndarray) -> None:
    before = torch.from_numpy(keep)[:, None].float()
    grown = images.grow_repainted(before)
    expected = np.stack([grown_by_loops(mask) for mask in keep])
    assert torch.equal(grown[:, 0], torch.from_numpy(expected).float())
    assert torch.equal(before[:, 0], torch.from_numpy(keep).float())


# --------------------------------------------------------------------------------------------------------------- sizes
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), exponent=st.integers(1, 4))
def test_latents_cover_the_picture_with_the_fewest_whole_blocks(height: int, width: int, exponent: int) -> None:
    factor = 2**exponent
    for size, latents in zip((height, width), images.latent_size(height, width, factor), strict=True):
        assert latents % factor == 0
        assert latents * factor >= size > (latents - factor) * factor


def test_latents_of_the_published_models() -> None:
    assert images.latent_size(768, 512, 8) == (96, 64)
    assert images.latent_size(769, 500, 8) == (104, 64)


@given(height=st.integers(1, 20), width=st.integers(1, 20), bottom=st.integers(0, 30), right=st.integers(0, 30))
def test_padding_continues_the_border_down_and_to_the_right(height: int, width: int, bottom: int, right: int) -> None:
    pixels = torch.randn(2, 3, height, width)
    padded = images.pad_to(pixels, height + bottom, width + right)
    assert padded.shape == (2, 3, height + bottom, width + right)
    rows = torch.arange(height + bottom).clamp(max=height - 1)
    columns = torch.arange(width + right).clamp(max=width - 1)
    assert torch.equal(padded, pixels[..., rows, :][..., columns])


# -------------------------------------------------------------------------------------------------------------- output
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_come_out_in_the_form_asked_for(dtype: torch.dtype) -> None:
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.5, 3.0, 1.0]).view(1, 3, 1, 2).to(dtype)
    expected = torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0, 1.0]).view(3, 1, 2)
    assert torch.equal(images.pixels_to(pixels, "pt")[0], expected.to(dtype))
    assert np.array_equal(images.pixels_to(pixels, "np")[0], expected.permute(1, 2, 0))
    (picture,) = images.pixels_to(pixels, "pil")
    assert (picture.size, picture.mode) == ((2, 1), "RGB")
    assert np.array_equal(np.asarray(picture), (expected.permute(1, 2, 0) * 255).round())


@given(pictures)
def test_a_picture_goes_in_and_comes_out_the_same(array: np.ndarray) -> None:
    height, width, _ = array.shape
    (picture,) = images.pixels_to(images.pixels_from(PIL.Image.fromarray(array), height, width), "pil")
    assert np.array_equal(np.asarray(picture), array)


# ----------------------------------------------------------------------------------------------- pictures from others
READERS = {
    "pixels": lambda given: images.pixels_from(given, 8, 8, name="given"),
    "RGB": lambda given: images.made_rgb(given, name="given"),
    "masks": lambda given: images.masks_from(given, name="given"),
    "hints": lambda given: images.hints_from(given, 8, 8, name="given"),
    "scales": lambda given: images.scales_from(given, 8, 8, name="given"),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_truncated_file_is_an_error_of_the_argument(read: Any) -> None:
    """Pillow opens it, and finds what is missing when it is asked for the pixels."""
    file = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 50).save(file, "PNG")
    whole = file.getvalue()
    with pytest.raises(ValueError, match="`given` is a picture that cannot be read"):
        read(PIL.Image.open(io.BytesIO(whole[: len(whole) // 2])))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_file_with_more_pixels_than_pillow_is_told_to_read_is_not_read(
    read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    PIL.Image.new("L", (40, 40)).save(file, "PNG")
    picture = PIL.Image.open(file)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1599)
    with pytest.raises(ValueError, match="`given` is a file of 1600 pixels"):
        read(picture)
    read(PIL.Image.new("L", (40, 40)))  # what is in memory already


ODD = {
    "no axis": np.zeros(()),
    "objects": np.zeros((4, 4), dtype=object),
    "texts": np.zeros((4, 4), dtype="U3"),
    "dates": np.zeros((4, 4), dtype="M8[s]"),
    "complex numbers": np.zeros((4, 4), dtype=np.complex64),
    "swapped bytes": np.zeros((4, 4), dtype=">f4" if sys.byteorder == "little" else "<f4"),
    "no device": torch.zeros(4, 4, device="meta"),
    "sparse": torch.zeros(4, 4).to_sparse(),
    "a complex tensor": torch.zeros(4, 4, dtype=torch.complex64),
}


@pytest.mark.parametrize("read", [read for name, read in READERS.items() if name != "RGB"])
@pytest.mark.parametrize("given", ODD.values(), ids=ODD)
def test_arrays_without_real_numbers_are_refused_by_name(read: Any, given: Any) -> None:
    with pytest.raises(ValueError, match="`given` h"):
        read(given)
