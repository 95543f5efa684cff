"""The samplers of Kandinsky 3.0 and 3.1, on the squared-cosine schedule.

Their configurations say what stock's schedulers need to know, too, so that one of these can be made of them:
`pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .. import sampling
from ..components import SavedAsStock
from ..inputs import check_at_most, check_choice, check_counts
from .ancestral import AncestralStepper, KandinskySchedulerOutput
from .tables import Posterior, cosine_betas, dynamically_thresholded, noised, state_every_setting


Generator = torch.Generator | list[torch.Generator] | None

UNBOUNDED = 1e6  # `sample_max_value`: the originals do not limit the threshold


class Kandinsky3Stepper(AncestralStepper):
    """What these two samplers and that of Flash share: position in the timesteps, and the clean latents."""

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _begin(self, timesteps: np.ndarray, device: torch.device | str | None) -> None:
        self.num_inference_steps = len(timesteps)
        self.timesteps = torch.from_numpy(timesteps.astype(np.int64)).to(device)
        self._begun = False
        self._steps_left = len(timesteps)

    def _check_steps(self, num_inference_steps: int) -> None:
        check_counts(num_inference_steps=num_inference_steps)
        check_at_most("num_inference_steps", num_inference_steps, self.config.num_train_timesteps)

    def _clean(self, alpha: float, sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """Formula (15) of https://arxiv.org/abs/2006.11239, unless it is predicted; then the dynamic threshold."""
        x0 = prediction
        if self.config.prediction_type == "epsilon":
            x0 = (sample - (1.0 - alpha) ** 0.5 * prediction) / alpha**0.5
        if not self.config.thresholding:
            return x0
        return dynamically_thresholded(x0, self.config.dynamic_thresholding_ratio)

    def _check_settings(self, **accepted: Sequence[Any]) -> None:
        usual = {"beta_schedule": ("squaredcos_cap_v2",), "prediction_type": ("epsilon",), "clip_sample": (False,)}
        for name, values in (usual | accepted).items():
            check_choice(name, self.config[name], values)


class Kandinsky3DDPMScheduler(SavedAsStock, Kandinsky3Stepper, SchedulerMixin, ConfigMixin):
    """The sampler of Kandinsky 3.0: ancestral steps with the posterior's mean and variance, on few betas.

    The cosine schedule has as many betas as there are steps, and step i of n is shown to the network as timestep
    `i * (num_train_timesteps // n)` (`p_sample` in kandinsky3/model/diffusion.py of the original). Stock's DDPM
    leaves the betas as they are, and differs in nothing else.

    Args:
        num_train_timesteps: length of the training schedule.
        thresholding: whether the predicted clean latents are thresholded.
        dynamic_thresholding_ratio: this quantile s of their absolute values, at least 1, clips them and divides them
            (https://arxiv.org/abs/2205.11487, section 2.3).
        default_num_inference_steps: what a pipeline takes when it is told none.
        default_guidance_scale: what a pipeline takes when it is told none.
        beta_schedule: `"squaredcos_cap_v2"`, the only one.
        prediction_type: `"epsilon"`, the only one.
        variance_type: `"fixed_small"`, the only one.
        clip_sample: False, the only one.
        sample_max_value: for stock's schedulers; here nothing limits s.
        timestep_spacing: `"leading"`, for stock's schedulers.
        kandinsky3_respaced: whether it is saved as stock's DDPM, which then takes its place where this package is not
            installed; a stock DDPM with this setting becomes this class in our pipelines.

    Raises:
        ValueError: a setting is not among those accepted.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        thresholding: bool = True,
        dynamic_thresholding_ratio: float = 0.99,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 3.0,
        beta_schedule: Literal["squaredcos_cap_v2"] = "squaredcos_cap_v2",
        prediction_type: Literal["epsilon"] = "epsilon",
        variance_type: Literal["fixed_small"] = "fixed_small",
        clip_sample: bool = False,
        sample_max_value: float = UNBOUNDED,
        timestep_spacing: Literal["leading"] = "leading",
        kandinsky3_respaced: bool = False,
    ):
        self._check_settings(variance_type=("fixed_small",))
        state_every_setting(self)
        self.set_timesteps(num_train_timesteps)

    @classmethod
    def replaces(cls, component: Any) -> bool:
        """Whether `component`, a stock DDPM, is configured to be this."""
        return bool(component.config.get("kandinsky3_respaced", False))

    @property
    def runs_in_stock(self) -> bool:
        """Whether it is saved as stock's DDPM."""
        return self.config.kandinsky3_respaced

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps and compute the betas of this many steps.

        Raises:
            TypeError, ValueError: `num_inference_steps` is no int from 1 to `num_train_timesteps`.
        """
        self._check_steps(num_inference_steps)
        self._stride = self.config.num_train_timesteps // num_inference_steps
        self._begin(np.arange(num_inference_steps)[::-1] * self._stride, device)
        self._posterior = Posterior.of(np.cumprod(1.0 - cosine_betas(num_inference_steps)))
        self.alphas_cumprod = torch.from_numpy(self._posterior.alphas_cumprod)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`original_samples` as they are at `timesteps` (one per sample, of those that were set)."""
        return noised(self.alphas_cumprod, original_samples, noise, timesteps // self._stride)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: Generator = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> KandinskySchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One ancestral step.

        Args:
            model_output: the predicted noise, shaped like `sample`.
            timestep: the current one of `timesteps`.
            sample: `[batch, channels, height, width]`.
            generator: for the noise of the step. As in the original, the last step draws, too, and adds nothing.
            variance_noise: noise to use instead, shaped like `sample`.
            return_dict: return a tuple if False.
        """
        index = self._advance(timestep)
        x = sample.float()
        x0 = self._clean(float(self._posterior.alphas_cumprod[index]), x, model_output.float())
        noise = noise_for(sample, generator, variance_noise)
        log_variance = torch.tensor(self._posterior.log_variance[index], dtype=torch.float32)
        previous = self._previous(index, x0, x, log_variance, None, noise)
        return output_of(previous, x0, sample, return_dict)


class Kandinsky3AncestralScheduler(Kandinsky3Stepper, SchedulerMixin, ConfigMixin):
    """The sampler of Kandinsky 3.1: DDIM's steps with noise, down to the first training timestep.

    Formulas (12) and (16) of https://arxiv.org/abs/2010.02502, with `eta` inside of the root of sigma, the noise
    computed anew from the thresholded clean latents, and a last step that takes away the variance of its noise without
    adding any (`p_sample` in kandinsky3/model/diffusion.py of the original).

    Args:
        num_train_timesteps: length of the training schedule.
        eta: from 0, no noise is added, to 1, as much as the posterior has. Stock's DDIM has the root of it.
        thresholding: whether the predicted clean latents are thresholded.
        dynamic_thresholding_ratio: this quantile s of their absolute values, at least 1, clips them and divides them
            (https://arxiv.org/abs/2205.11487, section 2.3).
        default_num_inference_steps: what a pipeline takes when it is told none.
        default_guidance_scale: what a pipeline takes when it is told none.
        exact_coefficients: False computes them in float32, as the original does; where few steps begin at pure noise,
            one of them then is nothing but rounding error.
        beta_schedule: `"squaredcos_cap_v2"`, the only one.
        prediction_type: `"epsilon"`, the only one.
        clip_sample: False, the only one.
        sample_max_value: for stock's schedulers; here nothing limits s.
        timestep_spacing: `"trailing"`, for stock's schedulers.

    Raises:
        ValueError: a setting is not among those accepted.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        eta: float = 1.0,
        thresholding: bool = True,
        dynamic_thresholding_ratio: float = 0.99,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 3.0,
        exact_coefficients: bool = True,
        beta_schedule: Literal["squaredcos_cap_v2"] = "squaredcos_cap_v2",
        prediction_type: Literal["epsilon"] = "epsilon",
        clip_sample: bool = False,
        sample_max_value: float = UNBOUNDED,
        timestep_spacing: Literal["trailing"] = "trailing",
    ):
        self._check_settings()
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"`eta` is {eta}; accepted is 0 (no noise) to 1 (as much as the posterior has).")
        state_every_setting(self)
        dtype = torch.float64 if exact_coefficients else torch.float32
        self.alphas_cumprod = cosine_alphas_cumprod(num_train_timesteps, dtype)
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps, from the last one down in strides of `num_train_timesteps / num_inference_steps`.

        The stride is rounded up, so there may be fewer steps than asked for: 250 for 300, as in the original.

        Raises:
            TypeError, ValueError: `num_inference_steps` is no int from 1 to `num_train_timesteps`.
        """
        self._check_steps(num_inference_steps)
        count = self.config.num_train_timesteps
        timesteps = np.arange(count - 1, 0, -(-count // num_inference_steps) * -1)
        self._begin(timesteps, device)
        self._kept_alphas = self.alphas_cumprod[[0, *timesteps[::-1]]]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: Generator = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> KandinskySchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step.

        Args:
            model_output: the predicted noise, shaped like `sample`.
            timestep: the current one of `timesteps`.
            sample: `[batch, channels, height, width]`.
            generator: for the noise of the step. As in the original, the last step draws, too, and adds nothing.
            variance_noise: noise to use instead, shaped like `sample`.
            return_dict: return a tuple if False.
        """
        index = self._advance(timestep)
        alpha, previous_alpha = float(self._kept_alphas[index + 1]), float(self._kept_alphas[index])
        sigma, direction = self._coefficients(index)
        x = sample.float()
        x0 = self._clean(alpha, x, model_output.float())
        epsilon = (x - alpha**0.5 * x0) / (1.0 - alpha) ** 0.5
        noise = noise_for(sample, generator, variance_noise)
        previous = previous_alpha**0.5 * x0 + direction * epsilon
        if index > 0:
            previous = previous + sigma * noise.to(previous)
        return output_of(previous, x0, sample, return_dict)

    def _coefficients(self, index: int) -> tuple[float, float]:
        """Those of the fresh noise and of the predicted noise, in the order in which the original rounds them."""
        alpha, previous = self._kept_alphas[index + 1], self._kept_alphas[index]
        sigma = (self.config.eta * (1.0 - alpha / previous) * (1.0 - previous) / (1.0 - alpha)).sqrt()
        # at eta 1 and few steps the second is almost 0, and in float32 it may come out below
        return float(sigma), float((1.0 - previous - sigma**2).clamp(min=0.0).sqrt())


def cosine_alphas_cumprod(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Cumulative products of 1 - beta on the squared-cosine schedule, computed in `dtype`."""
    return torch.cumprod(1.0 - torch.from_numpy(cosine_betas(count)).to(dtype), dim=0)


def noise_for(sample: torch.Tensor, generator: Generator, noise: torch.Tensor | None) -> torch.Tensor:
    """`noise`, or a fresh draw shaped like `sample`."""
    if noise is not None:
        return noise
    return sampling.draw_noise(sample.shape, generator, sample.device, sample.dtype)


def output_of(
    previous: torch.Tensor, x0: torch.Tensor, sample: torch.Tensor, return_dict: bool
) -> KandinskySchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
    """What a step returns, in the dtype of `sample`."""
    previous, x0 = previous.to(sample.dtype), x0.to(sample.dtype)
    return KandinskySchedulerOutput(previous, x0) if return_dict else (previous, x0)
