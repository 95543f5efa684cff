"""Regional prompting: another prompt counts where its mask is white, whatever the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import kandinsky_diffusers
from kandinsky_diffusers import Kandinsky3Pipeline, Region
from kandinsky_diffusers.k3.denoiser import cross_attentions
from tests.k3.conftest import QUICK, TASKS, Refused, float64, seeded
from tests.support.parity import assert_close, relative_difference


Draw = Callable[..., np.ndarray]
FULL, NONE = torch.ones(64, 64), torch.zeros(64, 64)
LEFT = torch.cat([torch.ones(64, 32), torch.zeros(64, 32)], dim=1)


@pytest.fixture
def draw(make: Any, inputs: Any) -> Draw:
    pipe = float64(make(Kandinsky3Pipeline, "3.1"))
    return lambda **changed: pipe(**inputs("", **changed), generator=seeded(0)).images


def test_a_region_of_nothing_changes_nothing(draw: Draw) -> None:
    assert_close(draw(regions=[("a lazy dog", NONE)]), draw(), 1e-9)


def test_a_region_with_the_prompt_of_the_call_changes_nothing(draw: Draw) -> None:
    assert_close(draw(regions=[("a red fox", LEFT)]), draw(), 1e-9)


def test_the_mask_of_the_first_region_counts(draw: Draw) -> None:
    """In the original it has no effect."""
    full, left = draw(regions=[("a lazy dog", FULL)]), draw(regions=[("a lazy dog", LEFT)])
    assert relative_difference(left, full) > 1e-3
    assert relative_difference(left, draw()) > 1e-3


def test_of_two_regions_in_one_place_the_later_one_counts(draw: Draw) -> None:
    both = draw(regions=[("a sad cat", LEFT), ("a lazy dog", FULL)])
    assert_close(both, draw(regions=[("a lazy dog", FULL)]), 1e-9)


def test_the_base_ratio_mixes_the_prompt_of_the_call_in(draw: Draw) -> None:
    regions = [("a lazy dog", FULL)]
    assert_close(draw(regions=regions, regional_base_ratio=1.0), draw(), 1e-9)
    assert relative_difference(draw(regions=regions, regional_base_ratio=0.5), draw(regions=regions)) > 1e-3


def test_grey_mixes_like_a_base_ratio(draw: Draw) -> None:
    grey = draw(regions=[("a lazy dog", torch.full((64, 64), 0.25))])
    assert_close(grey, draw(regions=[("a lazy dog", FULL)], regional_base_ratio=0.75), 1e-6)


def test_without_a_negative_prompt_of_its_own_a_region_has_that_of_the_call(draw: Draw) -> None:
    shared = draw(regions=[("a lazy dog", LEFT)], negative_prompt="ugly")
    assert_close(draw(regions=[Region("a lazy dog", LEFT, "ugly")], negative_prompt="ugly"), shared, 1e-9)
    own = draw(regions=[Region("a lazy dog", LEFT, "a cat")], negative_prompt="ugly")
    assert relative_difference(own, shared) > 1e-3


def test_states_of_a_prompt_do_what_the_prompt_does(make: Any, inputs: Any) -> None:
    pipe = make(Kandinsky3Pipeline, "3.1")
    names = ("prompt_embeds", "negative_prompt_embeds", "attention_mask", "negative_attention_mask")
    states = dict(zip(names, pipe.encode_prompt("a lazy dog"), strict=True))
    by_text = pipe(**inputs("", regions=[("a lazy dog", LEFT)]), generator=seeded(0)).images
    by_states = pipe(**inputs("", regions=[Region(None, LEFT, **states)]), generator=seeded(0)).images
    assert_close(by_states, by_text, 1e-5)


@pytest.mark.parametrize(("name", "kind"), [*((name, "3.1 inpaint") for name in TASKS), (TASKS[0], "stock")])
def test_a_picture_of_a_batch_is_the_picture_made_alone(make: Any, inputs: Any, name: str, kind: str) -> None:
    pipe = float64(make(getattr(kandinsky_diffusers, name), kind))
    prompts, own = ["a fox", "a very lazy dog jumps over the table of a sad cat"], ["a cat", "a quick brown dog"]
    size = {"height": 72, "width": 60}
    regions = [("the lazy dog", LEFT), Region(own, [LEFT.T, LEFT], ["ugly", "bad picture"])]
    together = pipe(**inputs(name, prompt=prompts, regions=regions, **size), generator=seeded(0, 1)).images
    regions = [regions[0], Region(own[1], LEFT, "bad picture")]
    alone = pipe(**inputs(name, prompt=prompts[1], regions=regions, **size), generator=seeded(1)).images
    assert together.shape == (2, 72, 60, 3)
    assert_close(together[1], alone[0], 1e-5)


def test_with_a_crop_around_the_mask_the_masks_of_regions_are_cropped_too(make: Any, picture: Any) -> None:
    """A region lies where it lies in the whole picture: this one is all of what is painted."""
    pipe, whole = make(kandinsky_diffusers.Kandinsky3InpaintPipeline, "3.1"), picture.resize((128, 128))
    corner = PIL.Image.new("L", whole.size)
    corner.paste(255, (0, 0, 64, 64))
    arguments = {"image": whole, "mask_image": corner, **QUICK, "output_type": "pil", "padding_mask_crop": 0}
    in_the_corner, everywhere = (
        np.asarray(pipe("a red fox", **arguments, regions=[("a lazy dog", place)], generator=seeded(0)).images[0])
        for place in (corner, FULL)
    )
    assert np.array_equal(in_the_corner, everywhere)


def test_the_unet_is_left_as_it_was_even_by_an_error(make: Any, inputs: Any) -> None:
    pipe = make(Kandinsky3Pipeline, "3.1")
    before = [layer.processor for layer in cross_attentions(pipe.unet).values()]

    def stop(*_: Any) -> dict[str, Any]:
        assert all(layer.processor not in before for layer in cross_attentions(pipe.unet).values())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(**inputs("", regions=[("a lazy dog", LEFT)], callback_on_step_end=stop))
    assert [layer.processor for layer in cross_attentions(pipe.unet).values()] == before


@pytest.mark.parametrize(
    ("regions", "named"),
    [
        ([], "`regions`"),
        ("a lazy dog", "`regions`"),
        (["a lazy dog"], "`regions`"),
        ([("a dog", LEFT, "ugly")], "`regions`"),
        ([(3, LEFT)], r"`regions\[0\]`.*`prompt`"),
        ([("a cat", LEFT), (["a", "b"], LEFT)], r"`regions\[1\]` has 2 prompts"),
        ([("a dog", LEFT * 300)], r"`regions\[0\].mask`"),
        ([("a dog", [LEFT, LEFT])], r"`regions\[0\].mask`"),
        ([Region(None, LEFT)], r"`regions\[0\]`.*`prompt` is missing"),
        ([Region(None, LEFT, None, torch.zeros(1, 5, 7), torch.ones(1, 5))], "`prompt_embeds`"),
    ],
)
def test_wrong_regions_are_named(refused: Refused, regions: Any, named: str) -> None:
    refused("Kandinsky3Pipeline", {"regions": regions}, named)


def test_a_wrong_base_ratio_is_named(refused: Refused) -> None:
    refused("Kandinsky3Pipeline", {"regions": [("a dog", LEFT)], "regional_base_ratio": 1.5}, "`regional_base_ratio`")
