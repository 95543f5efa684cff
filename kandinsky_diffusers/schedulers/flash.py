"""The sampler of Kandinsky 3.1 Flash and KandiSuperRes Flash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..inputs import check_at_most, check_counts
from .ancestral import KandinskySchedulerOutput
from .kandinsky3 import (
    UNBOUNDED,
    Generator,
    Kandinsky3Stepper,
    cosine_alphas_cumprod,
    noise_for,
    output_of,
)
from .tables import linear_alphas_cumprod, state_every_setting


class Kandinsky3FlashScheduler(Kandinsky3Stepper, SchedulerMixin, ConfigMixin):
    """The sampler of the Flash models: predict the clean latents, noise them anew, a little less at each step.

    (`generate` with `gan=True` in kandinsky3/t2i_pipeline.py of the original of Kandinsky 3.1, and
    KandiSuperRes/model/diffusion_sr_turbo.py; multistep consistency sampling, algorithm 1 of
    https://arxiv.org/abs/2303.01469.)

    Args:
        num_train_timesteps: length of the training schedule.
        timesteps: those that the network was distilled for, descending.
        thresholding: whether the predicted clean latents are thresholded (see [`Kandinsky3AncestralScheduler`]); the
            original does not.
        dynamic_thresholding_ratio: the quantile.
        default_num_inference_steps: what a pipeline takes when it is told none.
        default_guidance_scale: what a pipeline takes when it is told none; 0 is without guidance.
        beta_schedule: `"squaredcos_cap_v2"`, or `"linear"` (KandiSuperRes).
        prediction_type: `"epsilon"`, or `"sample"` for a network that predicts what is clean (KandiSuperRes).
        beta_start: first of the linear betas.
        beta_end: last of the linear betas.
        clip_sample: False, the only one.
        sample_max_value: for stock's schedulers; here nothing limits the threshold.
        timestep_spacing: `"trailing"`, for stock's schedulers.

    Raises:
        ValueError: a setting is not among those accepted.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        timesteps: Sequence[int] = (979, 729, 479, 229),
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.99,
        default_num_inference_steps: int = 4,
        default_guidance_scale: float = 0.0,
        beta_schedule: Literal["squaredcos_cap_v2", "linear"] = "squaredcos_cap_v2",
        prediction_type: Literal["epsilon", "sample"] = "epsilon",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        clip_sample: bool = False,
        sample_max_value: float = UNBOUNDED,
        timestep_spacing: Literal["trailing"] = "trailing",
    ):
        self._check_settings(beta_schedule=("squaredcos_cap_v2", "linear"), prediction_type=("epsilon", "sample"))
        self._check_timesteps(timesteps)
        self.register_to_config(timesteps=list(timesteps))  # as it comes back from a file
        state_every_setting(self)
        self.alphas_cumprod = cosine_alphas_cumprod(num_train_timesteps, torch.float64)
        if beta_schedule == "linear":
            self.alphas_cumprod = torch.from_numpy(linear_alphas_cumprod(beta_start, beta_end, num_train_timesteps))
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps.

        Args:
            num_inference_steps: how many of the configured timesteps; fewer than there are begin with the first and
                skip evenly. None for all.
            device: where `timesteps` goes.
            timesteps: descending, to use instead of the configured ones.

        Raises:
            TypeError, ValueError: `num_inference_steps` is no int from 1 to the number of configured timesteps, both
                arguments are given, or `timesteps` do not descend within the training schedule.
        """
        if timesteps is not None and num_inference_steps is not None:
            raise ValueError("both `num_inference_steps` and `timesteps` are given; accepted is one of them.")
        if timesteps is None:
            configured = self.config.timesteps
            timesteps = _evenly(configured, len(configured) if num_inference_steps is None else num_inference_steps)
        self._check_timesteps(timesteps)
        self._begin(np.array(timesteps), device)
        self._kept_alphas = self.alphas_cumprod[list(timesteps)[::-1]]

    def noised_start(
        self, latents: torch.Tensor, generator: Generator = None, variance_noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sample to begin with: the original takes pure noise `latents` for clean and noises them once more.

        Args:
            latents: standard normal.
            generator: for the noise.
            variance_noise: noise to use instead, shaped like `latents`.
        """
        return self._noised(len(self.timesteps) - 1, latents, noise_for(latents, generator, variance_noise))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: Generator = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> KandinskySchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step: the clean latents, noised to the next timestep unless this is the last.

        Args:
            model_output: the predicted noise, or what is clean, shaped like `sample`.
            timestep: the current one of `timesteps`.
            sample: `[batch, channels, height, width]`.
            generator: for the noise of the step; the last step draws none.
            variance_noise: noise to use instead, shaped like `sample`.
            return_dict: return a tuple if False.
        """
        index = self._advance(timestep)
        x0 = self._clean(float(self._kept_alphas[index]), sample.float(), model_output.float())
        previous = x0
        if index > 0:
            previous = self._noised(index - 1, x0, noise_for(sample, generator, variance_noise))
        return output_of(previous, x0, sample, return_dict)

    def _noised(self, index: int, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        alpha = float(self._kept_alphas[index])
        return alpha**0.5 * latents + (1.0 - alpha) ** 0.5 * noise.to(latents)

    def _check_timesteps(self, timesteps: Sequence[int]) -> None:
        last = self.config.num_train_timesteps - 1
        inside = all(0 <= timestep <= last for timestep in timesteps)
        if not timesteps or not inside or any(np.diff(timesteps) >= 0):
            raise ValueError(f"`timesteps` is {list(timesteps)}; accepted are descending ones from {last} to 0.")


def _evenly(timesteps: Sequence[int], count: int) -> list[int]:
    check_counts(num_inference_steps=count)
    check_at_most("num_inference_steps", count, len(timesteps))
    return [timesteps[index * len(timesteps) // count] for index in range(count)]
