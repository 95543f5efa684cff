"""The schedulers equal stock where stock is right, work for every number of steps, and keep their settings."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler, UnCLIPScheduler
from hypothesis import example, given, settings

from kandinsky_diffusers import (
    KandinskyAncestralScheduler,
    KandinskyDDIMScheduler,
    KandinskyPNDMScheduler,
    KandinskyUnCLIPScheduler,
)
from kandinsky_diffusers.schedulers import respaced_timesteps, strided_timesteps
from tests.support.parity import assert_close
from tests.support.schedulers import AS_ORIGINAL, DECODER_SCHEDULERS, predict, run, seeded, step_counts


DIVISORS_OF_1000 = [1, 2, 4, 5, 10, 20, 25, 50, 100, 250]
PRIOR_CONFIG = {"prediction_type": "sample", "clip_sample_range": 10.0}


@pytest.fixture(scope="module")
def config(converted_21: Path) -> Any:
    """The DDIM configuration of the converted decoder."""
    return DDIMScheduler.load_config(converted_21 / "kandinsky-2-1", subfolder="scheduler")


@pytest.fixture
def warnings_of_diffusers(caplog: pytest.LogCaptureFixture) -> Any:
    """What diffusers logs as a warning during a test; its loggers do not propagate."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog.records
    logger.removeHandler(caplog.handler)


# -------------------------------------------------------------------------------------------- equal to stock's numbers
@pytest.mark.parametrize("steps", DIVISORS_OF_1000)
@pytest.mark.parametrize(
    ("ours", "stock"), [(KandinskyDDIMScheduler, DDIMScheduler), (KandinskyPNDMScheduler, PNDMScheduler)]
)
def test_ddim_and_plms_are_stock_where_the_steps_divide_1000(
    config: dict[str, Any], ours: Any, stock: Any, steps: int
) -> None:
    start = torch.randn(2, 4, 5, 3, generator=seeded())
    scheduler, expected = ours.from_config(config), stock.from_config({**config, "skip_prk_steps": True})
    assert torch.equal(run(scheduler, start, steps), run(expected, start, steps))
    assert scheduler.timesteps.tolist() == expected.timesteps.tolist()


@pytest.mark.parametrize("ours", [KandinskyDDIMScheduler, KandinskyPNDMScheduler])
def test_defaults_are_those_of_the_converted_repo(config: dict[str, Any], ours: Any) -> None:
    start = torch.randn(1, 4, 5, 3, generator=seeded())
    assert torch.equal(run(ours(), start, 10), run(ours.from_config(config), start, 10))


@pytest.mark.parametrize("steps", [5, 10, 25, 50, 100])  # stock rounds its timesteps otherwise for some other numbers
def test_the_ancestral_sampler_is_stocks_ddpm_at_batch_one(converted_21: Path, steps: int) -> None:
    """201 values, so that the 99.5th percentile is one of them: between two, a clamp before or after it differs."""
    stock = DDPMScheduler.from_pretrained(converted_21 / "kandinsky-2-1", subfolder="ddpm_scheduler")
    start = torch.randn(1, 1, 3, 67, generator=seeded())
    reference = run(stock, start, steps, generator=seeded(1))
    scheduler = KandinskyAncestralScheduler()
    sample = run(scheduler, start, steps, generator=seeded(1))
    assert scheduler.timesteps.tolist() == stock.timesteps.tolist()
    assert_close(sample, reference, 1e-5)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
def test_unclip_is_stock_up_to_its_float32_tables(prediction_type: str) -> None:
    settings = {**PRIOR_CONFIG, "prediction_type": prediction_type}
    scheduler, stock, in_float64 = KandinskyUnCLIPScheduler(**settings), *(UnCLIPScheduler(**settings) for _ in "ab")
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert_close(getattr(scheduler, name), getattr(stock, name), 1e-6, name)
        setattr(in_float64, name, getattr(scheduler, name))
    start = torch.randn(3, 16, generator=seeded())
    sample = run(scheduler, start, 25, generator=seeded(1))
    assert_close(sample, run(in_float64, start, 25, generator=seeded(1)), 1e-5, "float64")
    assert_close(sample, run(stock, start, 25, generator=seeded(1)), 5e-3, "float32")


def test_unclip_takes_a_single_step_which_gives_the_predicted_embedding() -> None:
    scheduler = KandinskyUnCLIPScheduler(**PRIOR_CONFIG)
    start = torch.randn(3, 16, generator=seeded())
    sample = run(scheduler, start, 1)
    assert_close(sample, predict(start, scheduler.timesteps[0]).clamp(-10, 10), 1e-6)


# ----------------------------------------------------------------------------------------------- every number of steps
@settings(max_examples=10, deadline=None)
@given(steps=step_counts)
@example(1)
@example(2)
@example(36)  # the original's list has a timestep of 1000, on which it crashes
@example(501)  # the same, and its neighbour is 999
@example(1000)
@pytest.mark.parametrize("cls", [*DECODER_SCHEDULERS, KandinskyUnCLIPScheduler])
def test_every_number_of_steps(cls: Any, steps: int) -> None:
    scheduler = cls(**PRIOR_CONFIG) if cls is KandinskyUnCLIPScheduler else cls()
    sample = run(scheduler, torch.randn(1, 4, 2, 2, generator=seeded()), steps, **noise_of(cls))
    timesteps = scheduler.timesteps
    if cls is KandinskyPNDMScheduler:
        assert len(timesteps) < 2 or timesteps[1] == timesteps[2]
        timesteps = torch.unique_consecutive(timesteps)
    assert (timesteps[1:].diff() < 0).all()  # the first two are both 999 where the original's first is 1000
    assert (timesteps.diff() <= 0).all()
    assert 0 <= timesteps[-1] <= timesteps[0] < 1000
    assert len(timesteps) >= min(steps, 999)
    assert sample.isfinite().all()


def noise_of(cls: Any) -> dict[str, Any]:
    return {"generator": seeded()} if cls in (KandinskyAncestralScheduler, KandinskyUnCLIPScheduler) else {}


@given(steps=step_counts)
def test_timesteps_of_the_original_samplers(steps: int) -> None:
    """Both rules as the original has them: `range` from 1, and rounding half to even of a sum of strides."""
    strided = list(range(1, 1001, 1000 // steps))
    assert strided_timesteps(1000, steps).tolist()[::-1] == [min(timestep, 999) for timestep in strided]
    respaced, position = [], 0.0
    for _ in range(steps):
        respaced.append(round(position))
        position += 999 / (steps - 1) if steps > 1 else 0.0
    assert respaced_timesteps(1000, steps).tolist()[::-1] == respaced


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, None])
@pytest.mark.parametrize("cls", [*DECODER_SCHEDULERS, KandinskyUnCLIPScheduler])
def test_an_impossible_number_of_steps_is_refused(cls: Any, steps: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="`num_inference_steps`"):
        cls().set_timesteps(steps)


# ----------------------------------------------------------------------------------------------- the dynamic threshold
def clean_prediction(scheduler: KandinskyAncestralScheduler, sample: torch.Tensor) -> torch.Tensor:
    scheduler.set_timesteps(10)
    timestep = scheduler.timesteps[4]
    output = predict(sample, timestep, learned_variance=True)
    return scheduler.step(output, timestep, sample, generator=seeded(), return_dict=False)[1]


def test_each_sample_of_a_batch_has_its_own_threshold() -> None:
    samples = torch.randn(3, 4, 6, 6, generator=seeded()) * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1)
    noise = torch.randn(9, 3, 4, 6, 6, generator=seeded(1))

    def sampled(rows: slice) -> torch.Tensor:
        scheduler, sample = KandinskyAncestralScheduler(), samples[rows]
        scheduler.set_timesteps(10)
        for index, timestep in enumerate(scheduler.timesteps):
            draw = noise[index, rows] if index < 9 else None
            output = predict(sample, timestep, learned_variance=True)
            sample = scheduler.step(output, timestep, sample, variance_noise=draw).prev_sample
        return sample

    together = sampled(slice(None))
    for index in range(3):
        assert_close(together[index : index + 1], sampled(slice(index, index + 1)), 1e-6, f"sample {index}")


def test_the_originals_threshold_is_that_of_the_first_sample() -> None:
    samples = torch.randn(2, 4, 6, 6, generator=seeded()) * torch.tensor([0.01, 3.0]).view(2, 1, 1, 1)
    unlimited = clean_prediction(KandinskyAncestralScheduler(dynamic_thresholding_ratio=None), samples)
    limit = np.percentile(unlimited.abs().flatten(1).numpy(), 99.5, axis=1).clip(min=1.0)
    for reference, limits in (("sample", limit), ("first", [limit[0]] * 2)):
        scheduler: Any = KandinskyAncestralScheduler.from_config({"threshold_reference": reference})
        thresholded = clean_prediction(scheduler, samples)
        for clean, expected, largest in zip(thresholded, unlimited, limits, strict=True):
            assert_close(clean, expected.clamp(-largest, largest) / largest, 1e-5, reference)
    assert limit[1] > 1.0  # or there would be nothing to see


@pytest.mark.parametrize("largest", [2.0, 0.5, None])
def test_the_clean_prediction_is_clamped(largest: float | None) -> None:
    scheduler = KandinskyAncestralScheduler(denoised_range=largest, dynamic_thresholding_ratio=None)
    clean = clean_prediction(scheduler, 9 * torch.randn(1, 4, 6, 6, generator=seeded())).abs().max()
    assert clean > 2.0 if largest is None else clean == largest


def test_known_latents_are_put_into_the_clean_prediction_before_the_threshold() -> None:
    sample, known = (torch.randn(1, 4, 6, 6, generator=seeded(seed)) for seed in (0, 1))
    keep_mask = torch.zeros(1, 1, 6, 6)
    keep_mask[..., :3] = 1
    scheduler = KandinskyAncestralScheduler()
    scheduler.set_timesteps(10)
    timestep = scheduler.timesteps[4]
    output = predict(sample, timestep, learned_variance=True)
    known[..., 0, 0] = 4.0  # moves the threshold if it is put in first
    keeping = {"known_latents": known, "keep_mask": keep_mask}
    clean = scheduler.step(output, timestep, sample, generator=seeded(), **keeping, return_dict=False)[1]
    unlimited = clean_prediction(KandinskyAncestralScheduler(dynamic_thresholding_ratio=None), sample)
    blended = torch.where(keep_mask.bool(), known, unlimited)
    largest = torch.quantile(blended.abs().flatten(), 0.995)
    assert_close(clean, blended.clamp(-largest, largest) / largest, 1e-5)


# ----------------------------------------------------------------------------------------------------- noise and steps
@pytest.mark.parametrize("cls", [KandinskyAncestralScheduler, KandinskyUnCLIPScheduler])
def test_noise_can_be_given(cls: Any) -> None:
    start = torch.randn(2, 4, 2, 2, generator=seeded())
    noise = torch.randn(2, 4, 2, 2, generator=seeded(7))

    def step(**named: Any) -> torch.Tensor:
        scheduler = cls()
        scheduler.set_timesteps(5)
        timestep = scheduler.timesteps[0]
        output = predict(start, timestep, learned_variance=cls is KandinskyAncestralScheduler)
        return scheduler.step(output, timestep, start, **named).prev_sample

    assert torch.equal(step(variance_noise=noise), step(generator=seeded(7)))
    quiet, loud = step(variance_noise=torch.zeros_like(noise)), step(variance_noise=2 * noise)
    assert_close(step(variance_noise=noise), (quiet + loud) / 2, 1e-6)


@pytest.mark.parametrize("cls", [KandinskyAncestralScheduler, KandinskyUnCLIPScheduler])
def test_the_last_step_draws_no_noise(cls: Any) -> None:
    start = torch.randn(1, 4, 2, 2, generator=seeded())
    learned = cls is KandinskyAncestralScheduler
    scheduler = cls()
    scheduler.set_timesteps(5)
    generator = seeded(1)
    before = generator.get_state()
    timestep = scheduler.timesteps[-1]
    assert int(timestep) == 0
    scheduler.step(predict(start, timestep, learned), timestep, start, generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("cls", [KandinskyAncestralScheduler, KandinskyUnCLIPScheduler])
@pytest.mark.parametrize("begin", [0, 3])
def test_a_run_can_begin_later(cls: Any, begin: int) -> None:
    """Told by `set_begin_index`, or found by the first timestep: the same steps."""
    start = torch.randn(1, 4, 2, 2, generator=seeded())
    learned = cls is KandinskyAncestralScheduler
    results = []
    for told in (True, False):
        scheduler, sample, generator = cls(), start, seeded(1)
        scheduler.set_timesteps(5)
        if told:
            scheduler.set_begin_index(begin)
        for timestep in scheduler.timesteps[begin:]:
            output = predict(sample, timestep, learned)
            sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
        results.append(sample)
    assert torch.equal(*results)


def test_a_timestep_that_is_not_among_those_chosen_is_refused() -> None:
    scheduler = KandinskyAncestralScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="`timestep` is 998; accepted are"):
        scheduler.step(torch.zeros(1, 8, 2, 2), 998, torch.zeros(1, 4, 2, 2))


def test_a_step_can_return_a_tuple_and_keeps_the_type_of_the_sample() -> None:
    for cls, channels in ((KandinskyAncestralScheduler, 8), (KandinskyUnCLIPScheduler, 4)):
        scheduler = cls()
        scheduler.set_timesteps(5)
        sample = torch.zeros(1, 4, 2, 2, dtype=torch.float16)
        output = torch.zeros(1, channels, 2, 2, dtype=torch.float16)
        previous, clean = scheduler.step(output, scheduler.timesteps[0], sample, return_dict=False)
        assert previous.dtype == clean.dtype == torch.float16


# ------------------------------------------------------------------------------------------------------------ settings
SETTINGS = [
    (KandinskyDDIMScheduler, AS_ORIGINAL),
    (KandinskyDDIMScheduler, {"beta_end": 0.02, "clip_sample": True, "steps_offset": 0, "set_alpha_to_one": True}),
    (KandinskyPNDMScheduler, AS_ORIGINAL),
    (KandinskyAncestralScheduler, {**AS_ORIGINAL, "threshold_reference": "first", "denoised_range": 3.0}),
    (KandinskyAncestralScheduler, {"dynamic_thresholding_ratio": None, "denoised_range": None, "beta_start": 1e-4}),
    (KandinskyUnCLIPScheduler, PRIOR_CONFIG),
]


def without_bookkeeping(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.mark.parametrize(("cls", "changed"), SETTINGS)
def test_settings_survive_saving_and_copying(
    cls: Any, changed: dict[str, Any], tmp_path: Path, warnings_of_diffusers: list[logging.LogRecord]
) -> None:
    scheduler = cls(**changed)
    assert all(scheduler.config[name] == value for name, value in changed.items())
    scheduler.save_pretrained(tmp_path)
    for again in (cls.from_pretrained(tmp_path), cls.from_config(scheduler.config)):
        assert type(again) is cls
        assert without_bookkeeping(again.config) == without_bookkeeping(scheduler.config)
        start = torch.randn(1, 4, 2, 2, generator=seeded())
        assert torch.equal(run(again, start, 7, **noise_of(cls)), run(scheduler, start, 7, **noise_of(cls)))
    assert not warnings_of_diffusers


@pytest.mark.parametrize("cls", DECODER_SCHEDULERS)
def test_a_scheduler_is_made_from_the_repos_own_with_settings_beside_it(
    converted_21: Path, cls: Any, warnings_of_diffusers: list[logging.LogRecord]
) -> None:
    stock = DDIMScheduler.from_pretrained(converted_21 / "kandinsky-2-1", subfolder="scheduler")
    scheduler = cls.from_config(stock.config, **AS_ORIGINAL)
    assert all(scheduler.config[name] == value for name, value in AS_ORIGINAL.items())
    assert scheduler.config.beta_end == 0.012
    assert not warnings_of_diffusers


def test_the_ancestral_sampler_made_from_the_repos_ddim_is_the_originals(
    converted_21: Path, config: dict[str, Any]
) -> None:
    """The usual way to swap a scheduler, `X.from_config(pipe.scheduler.config)`."""
    repo = converted_21 / "kandinsky-2-1"
    expected = KandinskyAncestralScheduler.from_pretrained(repo, subfolder="ancestral_scheduler")
    start = torch.randn(1, 4, 4, 4, generator=seeded()) * 3
    swapped = run(KandinskyAncestralScheduler.from_config(config), start, 10, generator=seeded(1))
    assert torch.equal(swapped, run(expected, start, 10, generator=seeded(1)))


@pytest.mark.parametrize("cls", DECODER_SCHEDULERS)
def test_a_stock_scheduler_made_from_ours_has_its_betas_and_keeps_its_settings(cls: Any) -> None:
    scheduler = cls(**AS_ORIGINAL)
    stock = EulerDiscreteScheduler.from_config(scheduler.config)
    assert (stock.config.beta_start, stock.config.beta_end) == (0.00085, 0.012)
    again = cls.from_config(stock.config)
    assert all(again.config[name] == scheduler.config[name] for name in without_bookkeeping(scheduler.config))


@pytest.mark.parametrize(
    ("cls", "setting", "value"),
    [
        (KandinskyAncestralScheduler, "threshold_reference", "last"),
        (KandinskyAncestralScheduler, "variance_type", "fixed_small"),
        (KandinskyAncestralScheduler, "prediction_type", "sample"),
        (KandinskyAncestralScheduler, "start_timestep", "later"),
        (KandinskyDDIMScheduler, "start_timestep", "later"),
        (KandinskyDDIMScheduler, "timestep_spacing", "trailing"),
        (KandinskyPNDMScheduler, "start_timestep", "later"),
        (KandinskyPNDMScheduler, "timestep_spacing", "trailing"),
        (KandinskyPNDMScheduler, "skip_prk_steps", False),
        (KandinskyUnCLIPScheduler, "variance_type", "learned_range"),
    ],
)
def test_settings_that_do_not_exist_are_refused(cls: Any, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{setting}` is {value!r}; accepted is"):
        cls(**{setting: value})
