"""What the tests of schedulers share: kinds of schedulers, numbers to try, and a network of one line."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from diffusers import UnCLIPScheduler
from hypothesis import strategies as st

from kandinsky_diffusers import KandinskyAncestralScheduler, KandinskyDDIMScheduler, KandinskyPNDMScheduler


DECODER_SCHEDULERS = [KandinskyDDIMScheduler, KandinskyPNDMScheduler, KandinskyAncestralScheduler]
AS_ORIGINAL = {"noise_beta_start": 1e-4, "noise_beta_end": 0.02, "start_timestep": "original", "grow_mask": False}

step_counts = st.integers(1, 1000)
strengths = st.floats(0.01, 1.0, allow_subnormal=False)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def predict(sample: torch.Tensor, timestep: torch.Tensor, learned_variance: bool = False) -> torch.Tensor:
    """A network of one line, whose output depends on the sample and on the timestep."""
    noise = 0.8 * sample + torch.sin(sample + timestep / 100)
    return torch.cat([noise, torch.sin(3 * sample)], dim=1) if learned_variance else noise


def run(scheduler: Any, start: torch.Tensor, steps: int, **named: Any) -> torch.Tensor:
    """A whole run from `start`."""
    learned = scheduler.config.get("variance_type") == "learned_range"
    scheduler.set_timesteps(steps)
    sample = start
    for timestep, next_timestep in zip_longest(scheduler.timesteps, scheduler.timesteps[1:]):
        if isinstance(scheduler, UnCLIPScheduler):  # stock has to be told where a step leads
            named["prev_timestep"] = -1 if next_timestep is None else next_timestep
        sample = scheduler.step(predict(sample, timestep, learned), timestep, sample, **named).prev_sample
    return sample
