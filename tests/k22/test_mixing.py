"""Mixtures of prompts and pictures: embeddings from the priors, and series of pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from diffusers.utils import make_image_grid

import kandinsky_diffusers
from kandinsky_diffusers import KandinskyV22CombinedPipeline
from tests.k22.conftest import COMBINED, PRIORS, QUICK, seeded


Make = Callable[..., Any]
SERIES = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
QUICK_MIX = {**QUICK, "prior_num_inference_steps": 2, "output_type": "np"}


@pytest.mark.parametrize("name", PRIORS)
def test_a_series_of_embeddings_leads_from_item_to_item(make: Make, picture: Any, name: str) -> None:
    prior, steps = make(getattr(kandinsky_diffusers, name)), {"num_inference_steps": 2}
    mixed = prior.interpolate(["a cat", picture], SERIES, generator=seeded(1)[0], **steps)
    cat = prior.interpolate(["a cat"], [1.0], generator=seeded(1)[0], **steps).image_embeds
    shown = prior.interpolate([picture], [1.0], **steps).image_embeds
    assert torch.equal(mixed.image_embeds, torch.cat([cat, (cat + shown) / 2, shown]))
    assert torch.equal(mixed.negative_image_embeds, prior.get_zero_embed().expand(3, -1))
    assert not torch.allclose(cat, shown)


def test_several_embeddings_for_each_list_of_weights(make: Make, picture: Any) -> None:
    prior, items = make(kandinsky_diffusers.KandinskyV22PriorPipeline), ["a cat", picture]
    arguments = {"num_inference_steps": 2, "num_images_per_prompt": 2, "negative_prompt": "ugly"}
    mixed = prior.interpolate(items, SERIES, **arguments, generator=seeded(1, 2))
    parts = [prior.interpolate(items, weights, **arguments, generator=seeded(1, 2)) for weights in SERIES]
    for kind in ("image_embeds", "negative_image_embeds"):
        assert torch.equal(mixed[kind], torch.cat([part[kind] for part in parts]))


@pytest.mark.parametrize("name", COMBINED)
def test_mixing_draws_a_series_of_pictures(make: Make, inputs: Any, picture: Any, name: str) -> None:
    pipe, own = make(getattr(kandinsky_diffusers, name)), inputs(name, output_type="pil")
    del own["prompt"]
    images = pipe.mix(["a cat", picture], SERIES, **own).images
    assert make_image_grid(images, rows=1, cols=3).size == (3 * 64, 64)


@pytest.mark.parametrize(
    ("auto", "repo", "needed"),
    [
        (AutoPipelineForText2Image, "kandinsky-2-1", ()),
        (AutoPipelineForImage2Image, "kandinsky-2-1", ("image",)),
        (AutoPipelineForInpainting, "kandinsky-2-1-inpaint", ("image", "mask_image")),
    ],
)
def test_mixing_with_2_1(
    converted_21: Path, picture: Any, mask: Any, auto: Any, repo: str, needed: tuple[str, ...]
) -> None:
    pipe = auto.from_pretrained(converted_21 / repo)
    pipe.set_progress_bar_config(disable=True)
    given = {"image": picture, "mask_image": mask}
    arguments = {**QUICK_MIX, "output_type": "pil", **{name: given[name] for name in needed}}
    arguments |= {"strength": 1.0} if needed == ("image",) else {}
    series = pipe.mix(["a cat", picture], SERIES, **arguments, generator=seeded(1)[0]).images
    assert make_image_grid(series, rows=1, cols=3).size == (3 * 64, 64)
    last = pipe.mix(["a cat", picture], SERIES[-1], **arguments, generator=seeded(1)[0]).images
    assert np.array_equal(np.asarray(series[-1]), np.asarray(last[0]))


def test_each_picture_of_a_series_is_the_one_of_its_weights(make: Make, picture: Any) -> None:
    pipe, items = make(KandinskyV22CombinedPipeline), ["a cat", picture, "a dog"]
    series = [[0.2, 0.3, 0.5], [1.0, -1.0, 1.0]]
    arguments = {**QUICK_MIX, "num_images_per_prompt": 2, "negative_prompt": "ugly"}
    together = pipe.mix(items, series, **arguments, generator=seeded(1, 2)).images
    assert len(together) == 4
    for index, weights in enumerate(series):
        alone = pipe.mix(items, weights, **arguments, generator=seeded(1, 2)).images
        assert np.array_equal(together[2 * index : 2 * index + 2], alone)


def test_mixing_one_prompt_is_drawing_it(make: Make) -> None:
    pipe = make(KandinskyV22CombinedPipeline)
    mixed = pipe.mix(["a cat"], [1.0], **QUICK_MIX, generator=seeded(1)[0]).images
    assert np.array_equal(mixed, pipe("a cat", **QUICK_MIX, generator=seeded(1)[0]).images)


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_a_series_of_any_kind_of_output(make: Make, output_type: str) -> None:
    pipe, items = make(KandinskyV22CombinedPipeline), ["a cat", "a dog"]
    (images,) = pipe.mix(items, SERIES, **{**QUICK_MIX, "output_type": output_type}, return_dict=False)
    assert images.shape == ((3, 3, 64, 64) if output_type == "pt" else (3, 4, 8, 8))


def test_without_a_generator_a_series_is_new_each_time_and_has_one_noise(make: Make, picture: Any) -> None:
    pipe = make(KandinskyV22CombinedPipeline)
    first, second = (pipe.mix([picture], [[1.0], [1.0]], **QUICK_MIX).images for _ in range(2))
    assert np.array_equal(first[0], first[1])
    assert not np.allclose(first, second)


@pytest.mark.parametrize("negative", ["negative_prompt", "negative_prior_prompt"])
def test_negatives_of_a_mixture_act(make: Make, negative: str) -> None:
    pipe, items = make(KandinskyV22CombinedPipeline), ["a cat", "a dog"]
    arguments = {**QUICK_MIX, "output_type": "latent"}
    with_negative = pipe.mix(items, [0.5, 0.5], **arguments, **{negative: "ugly"}, generator=seeded(1)[0]).images
    without = pipe.mix(items, [0.5, 0.5], **arguments, generator=seeded(1)[0]).images
    assert not torch.allclose(with_negative, without)
