"""Enlarging pictures: of any size, alone and in batches, in windows, as often as asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DOutput
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky_diffusers.superres.windows import Windows
from tests.superres.conftest import KINDS, narrow_pipeline, picture
from tests.support.far_device import FAR, moved_far, waits_in_the_loop


QUICK: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt"}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ------------------------------------------------------------------------------------------------ sizes
def check_size(kind: str, height: int, width: int) -> None:
    pipe = narrow_pipeline(kind)
    image, scale = pipe(picture(height, width), **QUICK).images, pipe.config.scale
    assert image.shape == (1, 3, scale * height, scale * width)
    assert image.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_odd_size_comes_out_exactly_enlarged(kind: str) -> None:
    for side in range(1, 71, 2):
        check_size(kind, side, 71 - side)


@given(kind=st.sampled_from(KINDS), height=st.integers(1, 70), width=st.integers(1, 70))
@settings(max_examples=15, deadline=None)
def test_every_size_comes_out_exactly_enlarged(kind: str, height: int, width: int) -> None:
    check_size(kind, height, width)


@pytest.mark.parametrize("kind", ["x2", "flash"])
def test_a_border_that_is_continued_and_cut_off_does_not_move_the_picture(kind: str) -> None:
    """A network that returns the small picture, on sizes on which the original crashes."""
    pipe = narrow_pipeline(kind)
    pipe.unet.forward = lambda sample, timestep, image: UNet2DOutput(sample=image)
    small = torch.linspace(-1, 1, 9).expand(1, 3, 6, 9)
    large = pipe(small, **QUICK).images * 2 - 1
    assert (large - F.interpolate(small, scale_factor=2, mode="bilinear")).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ windows
@given(length=st.integers(1, 400), size=st.integers(1, 128), share=st.floats(0.1, 1))
def test_windows_cover_a_side_and_stay_inside(length: int, size: int, share: float) -> None:
    starts = Windows(size, max(int(size * share), 1), 1).starts(length)
    covered = {pixel for start in starts for pixel in range(start, min(start + size, length))}
    assert covered == set(range(length))
    assert starts[-1] == max(length - size, 0)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_windows_are_averaged_where_they_overlap(batch: int) -> None:
    """Each window returns its number; compared with an average that is made pixel by pixel."""
    windows, numbers = Windows(8, 5, batch), iter(range(1000))
    canvas = torch.zeros(1, 3, 19, 12)

    def numbered(crops: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(crop, next(numbers)) for crop in crops.split(1)])

    average = windows.average(numbered, [canvas])
    corners = [(top, left) for top in windows.starts(19) for left in windows.starts(12)]
    for row, column in np.ndindex(19, 12):
        seen = [n for n, (top, left) in enumerate(corners) if top <= row < top + 8 and left <= column < left + 8]
        assert average[0, 0, row, column] == pytest.approx(np.mean(seen))


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_network_sees_does_not_grow_with_the_picture(kind: str) -> None:
    pipe, largest = narrow_pipeline(kind), []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda sample, *rest: largest.append(sample.numel()) or forward(sample, *rest)
    for height, width in ((70, 50), (300, 5)):
        pipe(picture(height, width), **QUICK)
    limit = pipe.config.view_batch_size * 3 * pipe.config.window_size**2
    assert max(largest) <= limit
    assert max(largest) >= limit / 16, "windows are used whole"


def test_all_windows_at_once_give_the_same_as_one_after_the_other() -> None:
    pipe = narrow_pipeline("x4")
    images = [pipe(picture(40, 30), **QUICK, view_batch_size=number).images for number in (1, 3, 100)]
    assert (images[0] - images[1]).abs().max() < 1e-5
    assert (images[0] - images[2]).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ batches
@pytest.mark.parametrize("kind", KINDS)
def test_each_picture_of_a_batch_is_the_one_made_alone(kind: str) -> None:
    pipe, pictures = narrow_pipeline(kind), [picture(20, 33, 1), picture(41, 32, 2), picture(20, 33, 3)]
    together = pipe(pictures, generator=seeded(5, 6, 7), **QUICK).images
    assert [tuple(image.shape[1:]) for image in together] == [
        (pipe.config.scale * one.height, pipe.config.scale * one.width) for one in pictures
    ]
    for image, one, seed in zip(together, pictures, (5, 6, 7), strict=True):
        assert torch.equal(image, pipe(one, generator=seeded(seed), **QUICK).images[0])


def test_pictures_of_one_size_come_as_one_array_or_list() -> None:
    pipe = narrow_pipeline("x2")
    pictures = [picture(8, 12), picture(8, 12, 1)]
    assert pipe(pictures, num_inference_steps=1, output_type="np").images.shape == (2, 16, 24, 3)
    assert pipe(pictures, **QUICK).images.shape == (2, 3, 16, 24)
    (images,) = pipe(pictures, num_inference_steps=1, return_dict=False)
    assert [image.size for image in images] == [(24, 16)] * 2


def test_a_seed_gives_the_same_picture_and_none_another() -> None:
    pipe = narrow_pipeline("x2")
    first, second, other, drawn, again = (
        pipe(picture(8, 8), seed=seed, **QUICK).images for seed in (0, 0, 1, None, None)
    )
    assert torch.equal(first, second)
    assert torch.equal(first, pipe(picture(8, 8), generator=seeded(0)[0], **QUICK).images)
    assert not torch.equal(first, other)
    assert not torch.equal(drawn, again)


# ------------------------------------------------------------------------------------------------ inputs
@pytest.mark.parametrize("kind", ["x2", "x4"])
def test_pictures_come_in_any_form(kind: str) -> None:
    pipe, pil = narrow_pipeline(kind), picture(16, 24)
    array = np.asarray(pil)
    reference = pipe(pil, **QUICK).images
    unit = array / np.float32(255)
    for form in (
        array,
        unit,
        unit * 2 - 1,
        torch.from_numpy(unit).permute(2, 0, 1),
        unit[None],
        [pil],
        pil.convert("RGBA"),
    ):
        assert (pipe(form, **QUICK).images - reference).abs().max() < 1e-4


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_the_pictures_of_a_pipeline_can_be_handed_on(output_type: str) -> None:
    pipe = narrow_pipeline("x2")
    images = pipe([picture(8, 8), picture(8, 8, 1)], num_inference_steps=1, output_type=output_type).images
    assert pipe(images, **QUICK).images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("kind", ["x2", "flash"])
def test_a_power_of_the_scale_is_enlarging_repeatedly(kind: str) -> None:
    pipe, small = narrow_pipeline(kind), picture(45, 37)
    twice = pipe(pipe(small, **QUICK).images, **QUICK).images
    assert twice.shape == (1, 3, 180, 148)
    assert (pipe(small, scale=4, **QUICK).images - twice).abs().max() < 1e-5


def test_a_callback_sees_the_pixels_and_may_change_them() -> None:
    pipe, seen = narrow_pipeline("x4"), []

    def callback(pipeline: Any, index: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        seen.append((index, int(timestep), *(tuple(tensors[name].shape) for name in ("latents", "image"))))
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "image"]
    changes = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    image = pipe(picture(8, 8), num_inference_steps=2, output_type="pt", **changes).images
    assert seen == [(0, 999, (1, 3, 32, 32), (1, 3, 32, 32)), (1, 500, (1, 3, 32, 32), (1, 3, 32, 32))]
    assert (image == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_single(dtype: torch.dtype) -> None:
    pipe = narrow_pipeline("x4")
    before = pipe(picture(20, 20), **QUICK).images
    half = pipe.to(dtype)(picture(20, 20), **QUICK).images
    assert half.dtype == torch.float32, "pixels are kept whole"
    assert (half - before).abs().mean() < 0.01


def test_a_compiled_or_offloaded_network_draws_the_same(tmp_path: Path) -> None:
    pipe, options = narrow_pipeline("x4"), {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    before = pipe(picture(20, 20), **QUICK).images
    pipe.enable_group_offload(onload_device=torch.device("cpu"), **options)
    assert (pipe(picture(20, 20), **QUICK).images - before).abs().max() < 1e-5
    pipe = narrow_pipeline("x4")
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    assert (pipe(picture(20, 20), **QUICK).images - before).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "a.png"}, "`image` is a str"),
        ({"image": []}, "`image` is an empty list"),
        ({"image": PIL.Image.new("RGB", (0, 4))}, "`image` is 0 x 4 pixels"),
        ({"image": np.zeros((4, 4))}, "`image` has the shape"),
        ({"image": torch.full((3, 4, 4), float("nan"))}, "`image` has values"),
        ({"scale": 3}, "`scale` is 3; accepted is 2"),
        ({"scale": 1}, "`scale` is 1"),
        ({"scale": 2.0}, "`scale` is 2.0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"num_inference_steps": 1001}, "`num_inference_steps` is 1001"),
        ({"window_size": 60}, "`window_size` is 60; accepted are multiples of 8"),
        ({"window_stride": 65}, "`window_stride` is 65"),
        ({"view_batch_size": 0}, "`view_batch_size` is 0"),
        ({"output_type": "latent"}, "`output_type` is 'latent'"),
        ({"refine": True}, "`refine` is True, and the pipeline has no `refiner`"),
        ({"generator": seeded(0, 1)}, "`generator` is a list of 2"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "`callback_on_step_end_tensor_inputs` is 'prompt'"),
        ({"prompt": "a cat"}, "prompt"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_runs(arguments: dict[str, Any], message: str) -> None:
    pipe = narrow_pipeline("x2")
    pipe.unet.forward = None
    with pytest.raises((TypeError, ValueError), match=message):
        pipe(**{"image": picture(8, 8), **arguments})


def test_flash_has_four_steps_at_most() -> None:
    with pytest.raises(ValueError, match="`num_inference_steps` is 5; accepted is up to 4"):
        narrow_pipeline("flash")(picture(8, 8), num_inference_steps=5)


def test_the_network_refuses_sizes_that_it_cannot_halve() -> None:
    unet = narrow_pipeline("x4").unet
    with pytest.raises(ValueError, match="`sample` is 12 pixels high and 16 wide; accepted are multiples of 8"):
        unet(torch.zeros(1, 3, 12, 16), 0, torch.zeros(1, 3, 12, 16))


def test_a_pipeline_without_a_refiner_has_no_tiles_to_set() -> None:
    with pytest.raises(ValueError, match="no `movq`"):
        narrow_pipeline("x4").enable_movq_tiling()


@pytest.mark.parametrize("kind", ["x2", "flash"])
def test_the_host_waits_for_nothing_in_the_loop(kind: str) -> None:
    """With canvas and noise on the device; see the test of the same name for 2.2."""
    pipe = narrow_pipeline(kind)
    moved_far(pipe.unet)
    arguments = {"num_inference_steps": 2, "output_type": "pt", "canvas_device": FAR, "seed": None}
    assert waits_in_the_loop(pipe, "predict_sample", image=picture(16, 40), **arguments) == []
