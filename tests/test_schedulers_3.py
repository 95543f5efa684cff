"""The samplers of Kandinsky 3.x: timesteps, coefficients, settings, saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky_diffusers import (
    Kandinsky3AncestralScheduler,
    Kandinsky3DDPMScheduler,
    Kandinsky3FlashScheduler,
    sampling,
)
from kandinsky_diffusers.components import adopt, stock_identity
from tests.support.parity import assert_close


SAMPLERS = [Kandinsky3DDPMScheduler, Kandinsky3AncestralScheduler, Kandinsky3FlashScheduler]
FLASH = [979, 729, 479, 229]


def run(scheduler: Any, latents: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A whole run with a network that says a tenth of what it sees."""
    generator = torch.Generator().manual_seed(seed)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(latents * 0.1, timestep, latents, generator=generator).prev_sample
    return latents


def noise(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ steps
@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 1000), exact=st.booleans(), eta=st.floats(0, 1))
def test_the_ancestral_sampler_is_finite_for_every_number_of_steps(steps: int, exact: bool, eta: float) -> None:
    scheduler = Kandinsky3AncestralScheduler(eta=eta, exact_coefficients=exact)
    scheduler.set_timesteps(steps)
    coefficients = torch.tensor([scheduler._coefficients(index) for index in range(len(scheduler.timesteps))])
    assert coefficients.isfinite().all()
    # formula (12) of DDIM: what is left of the variance after the noise of the step
    previous = scheduler._kept_alphas[:-1]
    assert ((coefficients**2).sum(dim=1) <= 1 - previous + 1e-6).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("cls", SAMPLERS[:2])
def test_a_run_is_finite(cls: Any, steps: int) -> None:
    scheduler = cls()
    scheduler.set_timesteps(steps)
    assert run(scheduler, noise()).isfinite().all()


@pytest.mark.parametrize(
    ("steps", "count", "last"), [(50, 50, 19), (30, 30, 13), (300, 250, 3), (75, 72, 5), (7, 7, 141), (1, 1, 999)]
)
def test_the_timesteps_of_3_1_are_the_originals(steps: int, count: int, last: int) -> None:
    """(kandinsky3/t2i_pipeline.py: `range(999, 0, -1000 // steps)`.)"""
    scheduler = Kandinsky3AncestralScheduler()
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -1000 // steps))
    assert (len(scheduler.timesteps), scheduler.timesteps[-1]) == (count, last)


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 1000))
def test_the_timesteps_of_3_0_are_strides_of_as_many_betas(steps: int) -> None:
    scheduler = Kandinsky3DDPMScheduler()
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == [index * (1000 // steps) for index in reversed(range(steps))]
    stock = DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(scheduler.alphas_cumprod.float(), stock.alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_3_0_is_stocks_ddpm_on_as_many_betas() -> None:
    ours, steps = Kandinsky3DDPMScheduler(), 20
    ours.set_timesteps(steps)
    stock = DDPMScheduler(
        num_train_timesteps=steps,
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.99,
        sample_max_value=1e6,
        clip_sample=False,
        variance_type="fixed_small",
    )
    stock.set_timesteps(steps)
    sample, prediction = noise(), noise() * 0.3
    for ours_at, stock_at in list(zip(ours.timesteps, stock.timesteps, strict=True))[1:]:
        ours.set_timesteps(steps)
        drawn = torch.Generator().manual_seed(2)
        mine = ours.step(prediction, ours_at, sample, generator=drawn).prev_sample
        theirs = stock.step(prediction, int(stock_at), sample, generator=torch.Generator().manual_seed(2)).prev_sample
        assert_close(mine, theirs, 1e-4)


def test_3_1_is_stocks_ddim_with_the_root_of_eta() -> None:
    ours = Kandinsky3AncestralScheduler(eta=0.25)
    ours.set_timesteps(50)
    stock = DDIMScheduler.from_config(ours.config, set_alpha_to_one=False, thresholding=True)
    stock.set_timesteps(50)
    assert stock.timesteps.tolist() == ours.timesteps.tolist()
    sample, prediction = noise(), noise() * 0.3
    for timestep in ours.timesteps[:-1]:
        ours.set_timesteps(50)
        mine = ours.step(prediction, timestep, sample, variance_noise=noise()).prev_sample
        options = {"eta": 0.5, "use_clipped_model_output": True, "variance_noise": noise()}
        assert_close(mine, stock.step(prediction, int(timestep), sample, **options).prev_sample, 1e-4)


def test_flash_starts_from_noise_that_is_noised_again() -> None:
    scheduler = Kandinsky3FlashScheduler()
    assert scheduler.timesteps.tolist() == FLASH
    alpha = scheduler.alphas_cumprod[979].float()
    start = scheduler.noised_start(noise(), variance_noise=noise(2) * 0.5)
    assert_close(start, alpha.sqrt() * noise() + (1 - alpha).sqrt() * noise() * 0.5, 1e-6)


def test_flash_ends_at_what_the_network_predicts() -> None:
    scheduler = Kandinsky3FlashScheduler()
    *_, last = [scheduler.step(noise() * 0.2, timestep, noise()).prev_sample for timestep in scheduler.timesteps]
    alpha = scheduler.alphas_cumprod[FLASH[-1]].float()
    assert_close(last, (noise() - (1 - alpha).sqrt() * noise() * 0.2) / alpha.sqrt(), 1e-6)


@pytest.mark.parametrize(("steps", "chosen"), [(None, FLASH), (4, FLASH), (2, [979, 479]), (1, [979])])
def test_fewer_steps_of_flash_skip_evenly(steps: int | None, chosen: list[int]) -> None:
    scheduler = Kandinsky3FlashScheduler()
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == chosen


def test_flash_takes_timesteps_of_the_user() -> None:
    scheduler = Kandinsky3FlashScheduler()
    scheduler.set_timesteps(timesteps=[900, 100])
    assert scheduler.timesteps.tolist() == [900, 100]


def test_flash_of_a_network_that_predicts_what_is_clean_renoises_it_on_linear_betas() -> None:
    """KandiSuperRes Flash: the prediction is what comes out, and in between formula (4) of DDPM makes it noisy."""
    scheduler = Kandinsky3FlashScheduler(beta_schedule="linear", prediction_type="sample")
    alphas = DDPMScheduler(beta_schedule="linear").alphas_cumprod
    clean, fresh, sample = noise(), noise() * 2, noise() * 3
    for timestep, following in zip(FLASH, [*FLASH[1:], None], strict=True):
        expected = clean
        if following is not None:
            expected = alphas[following] ** 0.5 * clean + (1 - alphas[following]) ** 0.5 * fresh
        result: Any = scheduler.step(clean, timestep, sample, variance_noise=fresh)
        assert_close(result.prev_sample, expected, 1e-5)
        assert torch.equal(result.pred_original_sample, clean)


# ------------------------------------------------------------------------------------------------ settings
@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize(
    ("setting", "value"),
    [("beta_schedule", "scaled_linear"), ("prediction_type", "v_prediction"), ("clip_sample", True)],
)
def test_a_setting_that_the_samplers_do_not_have_is_refused(cls: Any, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{setting}`"):
        cls(**{setting: value})


@pytest.mark.parametrize(
    ("cls", "arguments", "named"),
    [
        (Kandinsky3AncestralScheduler, {"eta": 1.5}, "`eta`"),
        (Kandinsky3DDPMScheduler, {"variance_type": "learned"}, "`variance_type`"),
        (Kandinsky3FlashScheduler, {"timesteps": [229, 479]}, "`timesteps`"),
        (Kandinsky3FlashScheduler, {"timesteps": [1000]}, "`timesteps`"),
        (Kandinsky3FlashScheduler, {"timesteps": []}, "`timesteps`"),
    ],
)
def test_a_value_out_of_range_is_named(cls: Any, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        cls(**arguments)


@pytest.mark.parametrize("steps", [0, 1001, 2.5])
@pytest.mark.parametrize("cls", SAMPLERS)
def test_a_number_of_steps_out_of_range_is_named(cls: Any, steps: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="`num_inference_steps`"):
        cls().set_timesteps(steps)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_each_sample_of_a_batch_is_thresholded_by_itself(cls: Any) -> None:
    latents = torch.cat([noise(1), noise(1) * 20])
    scheduler = cls(thresholding=True)
    timestep = scheduler.timesteps[len(scheduler.timesteps) // 2]
    both = scheduler.step(latents * 0.1, timestep, latents).pred_original_sample
    for number in range(2):
        scheduler = cls(thresholding=True)
        one = latents[number : number + 1]
        assert_close(scheduler.step(one * 0.1, timestep, one).pred_original_sample, both[number : number + 1], 1e-6)
    assert both.abs().max() <= 1.0 + 1e-6


@pytest.mark.parametrize("cls", SAMPLERS)
def test_noise_is_drawn_in_the_one_place(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    draw = sampling.draw_noise
    monkeypatch.setattr(sampling, "draw_noise", lambda shape, *rest: drawn.append(shape) or draw(shape, *rest))
    scheduler = cls()
    scheduler.step(noise(), scheduler.timesteps[0], noise())
    assert drawn == [noise().shape]


# ------------------------------------------------------------------------------------------------ saving
@pytest.mark.parametrize("cls", SAMPLERS)
def test_settings_are_saved_and_loaded(cls: Any, tmp_path: Path) -> None:
    before = cls(dynamic_thresholding_ratio=0.9, default_guidance_scale=2.5)
    before.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == cls.__name__
    after = cls.from_pretrained(tmp_path)
    assert dict(after.config) == dict(before.config)
    assert after.timesteps.tolist() == before.timesteps.tolist()


def test_one_that_is_saved_as_stocks_ddpm_comes_back(tmp_path: Path) -> None:
    before = Kandinsky3DDPMScheduler(kandinsky3_respaced=True)
    before.save_pretrained(tmp_path)
    stock = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    assert stock.config.beta_schedule == "squaredcos_cap_v2"
    after = adopt(stock)
    assert type(after) is Kandinsky3DDPMScheduler
    assert stock_identity(after) == ("diffusers", "DDPMScheduler")
    assert stock_identity(Kandinsky3DDPMScheduler()) is None
    assert type(adopt(diffusers.DDPMScheduler())) is diffusers.DDPMScheduler
