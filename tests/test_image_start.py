"""Where image-to-image starts, and how a picture is noised to begin with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from diffusers.pipelines import kandinsky
from hypothesis import assume, given

from kandinsky_diffusers import (
    KandinskyAncestralScheduler,
    KandinskyDDIMScheduler,
    KandinskyPNDMScheduler,
)
from kandinsky_diffusers.schedulers import noise_to, start_at
from tests.support.parity import assert_close
from tests.support.schedulers import AS_ORIGINAL, DECODER_SCHEDULERS, predict, seeded, step_counts, strengths


@pytest.fixture(scope="module")
def config(converted_21: Path) -> Any:
    """The DDIM configuration of the converted decoder."""
    return DDIMScheduler.load_config(converted_21 / "kandinsky-2-1", subfolder="scheduler")


# -------------------------------------------------------------------------------------------------- where a run starts
@given(steps=step_counts, strength=strengths)
@pytest.mark.parametrize("cls", [KandinskyDDIMScheduler, DDIMScheduler, KandinskyAncestralScheduler])
def test_image_to_image_starts_where_diffusers_does(cls: Any, steps: int, strength: float) -> None:
    scheduler = cls()
    scheduler.set_timesteps(steps)
    assume(int(len(scheduler.timesteps) * strength) > 0)
    timesteps, noise_timestep = start_at(scheduler, strength)
    stock = SimpleNamespace(scheduler=scheduler)
    get_timesteps: Any = kandinsky.KandinskyImg2ImgPipeline.get_timesteps
    expected, count = get_timesteps(stock, len(scheduler.timesteps), strength, "cpu")
    assert timesteps.tolist() == expected.tolist()
    assert len(timesteps) == count
    assert noise_timestep == timesteps[0]


@pytest.mark.parametrize("cls", [KandinskyPNDMScheduler, PNDMScheduler])
def test_plms_calls_the_network_twice_where_it_starts(config: dict[str, Any], cls: Any) -> None:
    scheduler = cls.from_config(config, skip_prk_steps=True)
    scheduler.set_timesteps(10)
    timesteps, noise_timestep = start_at(scheduler, 0.4)
    assert timesteps.tolist() == [301, 201, 201, 101, 1]
    assert noise_timestep == 301
    sample = torch.randn(1, 4, 2, 2, generator=seeded())
    for timestep in timesteps:
        sample = scheduler.step(predict(sample, timestep), timestep, sample).prev_sample
    assert sample.isfinite().all()


def test_schedulers_of_the_second_order_start_at_a_whole_step() -> None:
    from diffusers import HeunDiscreteScheduler

    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(10)
    timesteps, noise_timestep = start_at(scheduler, 0.4)
    assert len(timesteps) == 2 * 4 - 1
    assert noise_timestep == timesteps[0] != timesteps[1] == timesteps[2]


@given(steps=step_counts, strength=strengths)
@pytest.mark.parametrize("cls", [KandinskyDDIMScheduler, KandinskyPNDMScheduler])
def test_the_originals_start_of_ddim_and_plms(cls: Any, steps: int, strength: float) -> None:
    """Noised to one timestep below `start`, and then all timesteps up to and with it."""
    scheduler = cls(start_timestep="original")
    scheduler.set_timesteps(steps)
    timesteps, noise_timestep = start_at(scheduler, strength)
    start = int(1000 * strength)
    plan = torch.unique_consecutive(scheduler.timesteps)
    assert noise_timestep == start - 1
    assert torch.unique_consecutive(timesteps).tolist() == [int(t) for t in plan if t <= start]


@given(steps=step_counts, strength=strengths)
def test_the_originals_start_of_the_ancestral_sampler(steps: int, strength: float) -> None:
    scheduler = KandinskyAncestralScheduler(start_timestep="original")
    scheduler.set_timesteps(steps)
    start = int(steps * strength)
    assume(start > 0)
    timesteps, noise_timestep = start_at(scheduler, strength)
    assert timesteps.tolist() == scheduler.timesteps.tolist()[steps - start :]
    assert noise_timestep == timesteps[0]


def test_strength_from_keeping_to_forgetting() -> None:
    scheduler = KandinskyDDIMScheduler()
    scheduler.set_timesteps(10)
    timesteps, noise_timestep = start_at(scheduler, 0.0)
    assert (len(timesteps), noise_timestep) == (0, None)
    timesteps, noise_timestep = start_at(scheduler, 1.0)
    assert (timesteps.tolist(), noise_timestep) == (scheduler.timesteps.tolist(), 901)
    with pytest.raises(ValueError, match=r"`strength` of 0\.05 leaves none of 10 steps"):
        start_at(scheduler, 0.05)
    with pytest.raises(ValueError, match=r"`strength` is 1\.5"):
        start_at(scheduler, 1.5)


def test_the_ancestral_sampler_goes_on_from_where_a_run_starts() -> None:
    scheduler = KandinskyAncestralScheduler()
    scheduler.set_timesteps(10)
    timesteps, _ = start_at(scheduler, 0.3)
    sample, generator = torch.randn(1, 4, 2, 2, generator=seeded()), seeded(1)
    other, same = KandinskyAncestralScheduler(), seeded(1)
    other.set_timesteps(10)
    for timestep in timesteps:
        output = predict(sample, timestep, learned_variance=True)
        expected = other.step(output, timestep, sample, generator=same).prev_sample
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
        assert torch.equal(sample, expected)


# --------------------------------------------------------------------------------------------------- noising a picture
def noised(latents: torch.Tensor, noise: torch.Tensor, betas: np.ndarray, timestep: int) -> torch.Tensor:
    alpha = float(np.prod(1 - betas[: timestep + 1]))
    return alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise


@pytest.mark.parametrize("cls", [*DECODER_SCHEDULERS, DDIMScheduler])
def test_a_picture_is_noised_with_the_models_betas_or_with_those_asked_for(config: dict[str, Any], cls: Any) -> None:
    latents, noise = (torch.randn(2, 4, 3, 3, generator=seeded(seed)) for seed in (0, 1))
    timestep = torch.tensor(300)
    own, original = cls.from_config(config), cls.from_config({**config, **AS_ORIGINAL})
    for scheduler, beta_start, beta_end in ((own, 0.00085, 0.012), (original, 1e-4, 0.02)):
        expected = noised(latents, noise, np.linspace(beta_start, beta_end, 1000), 300)
        assert_close(noise_to(scheduler, latents, noise, timestep), expected, 1e-5)


def test_noising_keeps_the_type_of_the_latents() -> None:
    latents = torch.randn(2, 4, 3, 3, generator=seeded()).half()
    for scheduler in (
        KandinskyAncestralScheduler(),
        KandinskyDDIMScheduler(noise_beta_start=1e-4, noise_beta_end=0.02),
    ):
        assert noise_to(scheduler, latents, latents, torch.tensor(300)).dtype == torch.float16
