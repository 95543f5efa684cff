"""Where image-to-image starts: remaining timesteps and the noise to begin with."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PNDMScheduler

from ..inputs import check_strength
from .ancestral import AncestralStepper
from .tables import NoisesOnHost, linear_alphas_cumprod, noised, with_second_twice


def start_at(scheduler: Any, strength: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The timesteps that remain when a picture is the start, and the timestep to which it is noised.

    By default as in the rest of diffusers: the last `int(steps * strength)` steps, noised to the first of them. With
    the scheduler setting `start_timestep="original"` as in the originals: with start = `int(N * strength)`, N the
    number of training timesteps for DDIM and PLMS and of respaced ones for the ancestral sampler, it is noised to
    timestep number `start - 1` of those N, and the steps after it, for DDIM and PLMS up to and with `start`, remain
    (`generate_img2img` in kandinsky2/kandinsky2_1_model.py of the original).

    Args:
        scheduler: after `set_timesteps`.
        strength: from 0, keep the picture, to 1, forget it.

    Returns:
        timesteps `[steps]` and the noise timestep (no dimension), None where no noise is to be added (strength 0).

    Raises:
        ValueError: `strength` is not in [0, 1], or so low that no step remains.
    """
    check_strength(strength)
    if strength == 0.0:
        return scheduler.timesteps[:0], None
    # PLMS repeats its second timestep at the start; where it starts is known only after the cut.
    repeats_second = isinstance(scheduler, PNDMScheduler)
    plan = torch.unique_consecutive(scheduler.timesteps) if repeats_second else scheduler.timesteps
    if scheduler.config.get("start_timestep") == "original":
        kept, noise_timestep = _original_start(scheduler, plan, strength)
    else:
        order = getattr(scheduler, "order", 1)  # stock's UnCLIPScheduler has none
        count = -(-len(plan) // order)
        kept = plan[(count - int(count * strength)) * order :]
        noise_timestep = kept[:1].squeeze(0)
    if not len(kept):
        raise ValueError(f"`strength` of {strength} leaves none of {len(plan)} steps.")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(len(plan) - len(kept))
    if repeats_second:
        kept = torch.from_numpy(with_second_twice(kept.cpu().numpy())).to(plan)
    return kept, noise_timestep


def _original_start(scheduler: Any, plan: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(scheduler, AncestralStepper):
        kept = plan[len(plan) - int(len(plan) * strength) :]
        return kept, kept[:1].squeeze(0)
    start = int(scheduler.config.num_train_timesteps * strength)
    return plan[plan <= start], plan.new_tensor(start - 1)


def noise_to(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """`latents` noised to `timestep`, with the scheduler's betas or its `noise_beta_start`/`noise_beta_end`.

    Args:
        scheduler: any diffusers scheduler.
        latents: clean, `[batch, ...]`.
        noise: standard normal, shaped like `latents`.
        timestep: one training timestep, without dimension.
    """
    if not looks_up_on_host(scheduler):
        return scheduler.add_noise(latents, noise, timestep.reshape(1).expand(len(latents)).to(latents.device))
    betas = _noise_betas(scheduler)
    if betas is None:
        return scheduler.add_noise(latents, noise, timestep.cpu())
    table = linear_alphas_cumprod(*betas, scheduler.config.num_train_timesteps)
    return noised(torch.from_numpy(table), latents, noise, timestep.cpu())


def looks_up_on_host(scheduler: Any) -> bool:
    """Whether [`noise_to`] reads the timestep on the host; where it is, nothing waits for the other device."""
    return isinstance(scheduler, NoisesOnHost) or _noise_betas(scheduler) is not None


def _noise_betas(scheduler: Any) -> tuple[float, float] | None:
    start, end = (scheduler.config.get(f"noise_beta_{end}") for end in ("start", "end"))
    return None if start is None or end is None else (start, end)
