"""The denoising loop, guidance, noise that does not depend on the batch, and the callback of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_diffusers.sampling import (
    denoise,
    draw_noise,
    guide_from_uncond,
    guide_keep_variance,
    step_end_callback,
)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ------------------------------------------------------------------------------------------------------------ the loop
def test_each_step_predicts_combines_steps_and_then_tells() -> None:
    calls = []

    def record(name: str, *arguments: float, result: float) -> torch.Tensor:
        calls.append((name, *arguments))
        return torch.tensor(result)

    latents = denoise(
        torch.tensor(0.0),
        torch.tensor([9.0, 4.0]),
        predict=lambda x, t: record("predict", float(x), float(t), result=float(x) + 1),
        combine=lambda prediction: record("combine", float(prediction), result=float(prediction) + 10),
        step=lambda prediction, t, x: record("step", float(prediction), float(t), float(x), result=float(x) + 100),
        on_step_end=lambda index, t, x: record("end", index, float(t), float(x), result=float(x) + 1000),
    )
    assert calls == [
        ("predict", 0, 9),
        ("combine", 1),
        ("step", 11, 9, 0),
        ("end", 0, 9, 100),
        ("predict", 1100, 4),
        ("combine", 1101),
        ("step", 1111, 4, 1100),
        ("end", 1, 4, 1200),
    ]
    assert latents == 2200


def test_without_timesteps_the_latents_come_back() -> None:
    latents = torch.randn(2, 3)

    def never(*arguments: Any) -> torch.Tensor:
        pytest.fail("a step was made")

    assert denoise(latents, torch.empty(0), never, never, never, never) is latents


# ------------------------------------------------------------------------------------------------------------ guidance
def test_guidance_goes_from_the_unconditional_half_through_the_conditional_one() -> None:
    prediction = torch.tensor([[1.0, -2.0], [3.0, 2.0]])  # unconditional, conditional
    assert guide_from_uncond(prediction, 4.0).tolist() == [[9.0, 14.0]]  # 1 + 4 (3 - 1), -2 + 4 (2 + 2)
    assert guide_from_uncond(prediction, 1.0).tolist() == [[3.0, 2.0]]
    assert guide_from_uncond(prediction, 0.0).tolist() == [[1.0, -2.0]]


def test_each_sample_can_have_a_guidance_scale_of_its_own() -> None:
    prediction = torch.tensor([[1.0], [1.0], [3.0], [2.0]])
    assert guide_from_uncond(prediction, torch.tensor([[2.0], [5.0]])).tolist() == [[5.0], [6.0]]


def test_the_variance_is_that_of_the_conditional_half_and_is_not_guided() -> None:
    unconditional, conditional = [1.0, 0.0, 7.0, 8.0], [2.0, 1.0, 5.0, 6.0]  # two channels of noise, two of variance
    prediction = torch.tensor([unconditional, conditional])[..., None, None]
    guided = guide_keep_variance(prediction, 3.0, channels=2)
    assert guided.shape == (1, 4, 1, 1)
    assert guided.flatten().tolist() == [4.0, 3.0, 5.0, 6.0]


# --------------------------------------------------------------------------------------------------------------- noise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "generator",
    [lambda: None, lambda: seeded(3)[0], lambda: seeded(3), lambda: seeded(3, 4)],
    ids=["global", "one", "list of one", "one for each row"],
)
def test_noise_is_that_of_diffusers(generator: Callable[[], Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours = draw_noise([2, 3, 4], generator(), "cpu", dtype)
    torch.manual_seed(0)
    stock = randn_tensor((2, 3, 4), generator=generator(), device=torch.device("cpu"), dtype=dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, stock)


@given(
    seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=4, unique=True),
    rows_each=st.integers(1, 3),
    shape=st.lists(st.integers(1, 5), max_size=3),
)
def test_a_generator_draws_the_same_numbers_in_every_batch(seeds: list[int], rows_each: int, shape: list[int]) -> None:
    together = draw_noise((rows_each * len(seeds), *shape), seeded(*seeds))
    for index, seed in enumerate(seeds):
        alone = draw_noise((rows_each, *shape), seeded(seed))
        assert torch.equal(together[index :: len(seeds)], alone)


def test_a_generator_goes_on_where_it_was() -> None:
    generators, (alone,) = seeded(1, 2), seeded(2)
    for _ in range(2):
        assert torch.equal(draw_noise((2, 3), generators)[1], torch.randn(3, generator=alone))


def test_generators_that_do_not_share_the_batch_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`generator` is a list of 2, .* batch of 3"):
        draw_noise((3, 4), seeded(0, 1))


# ------------------------------------------------------------------------------------------------------------ callback
@pytest.mark.parametrize("returned", [None, {}], ids=["nothing", "an empty dict"])
def test_a_callback_that_changes_nothing(returned: Any) -> None:
    latents, conditions = torch.zeros(1), {"image_embeds": torch.ones(1)}
    on_step_end = step_end_callback("pipeline", conditions, lambda *arguments: returned)
    assert on_step_end is not None
    assert on_step_end(0, torch.tensor(9), latents) is latents
    assert list(conditions) == ["image_embeds"]


def test_a_callback_gets_what_it_names_and_replaces_what_it_returns() -> None:
    conditions = {"image_embeds": torch.zeros(1), "prompt_embeds": torch.zeros(1)}
    seen: list[Any] = []

    def callback(pipeline: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        seen.append((pipeline, index, int(timestep), sorted(tensors)))
        return {"latents": torch.ones(1), "image_embeds": torch.ones(1)}

    on_step_end = step_end_callback("pipeline", conditions, callback, ["latents", "image_embeds"])
    assert on_step_end is not None
    assert on_step_end(2, torch.tensor(9), torch.zeros(1)) == 1
    assert seen == [("pipeline", 2, 9, ["image_embeds", "latents"])]
    assert (conditions["image_embeds"], conditions["prompt_embeds"]) == (1, 0)


def test_what_a_callback_returns_stays_its_own() -> None:
    returned = {"latents": torch.ones(1)}
    on_step_end = step_end_callback("pipeline", {}, lambda *arguments: returned)
    assert on_step_end is not None
    assert [float(on_step_end(index, torch.tensor(9), torch.zeros(1))) for index in range(2)] == [1.0, 1.0]


def test_no_callback_costs_nothing() -> None:
    assert step_end_callback("pipeline", {}, None) is None
