"""Ancestral samplers on respaced timesteps: the decoder's with learned variance, the prior's with the posterior's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import UnCLIPScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from .. import sampling
from ..components import SavedAsStock
from ..inputs import check_choice
from .tables import (
    NoisesOnHost,
    Posterior,
    cosine_betas,
    dynamically_thresholded,
    linear_alphas_cumprod,
    respaced_timesteps,
    state_every_setting,
)


@dataclass
class KandinskySchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample: the less noisy sample, shaped like the input.
        pred_original_sample: the clean sample as predicted at this step.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class AncestralStepper(NoisesOnHost):
    """Position in a respaced process, shared by the ancestral samplers; `timesteps` are [`respaced_timesteps`]."""

    order = 1
    init_noise_sigma = 1.0
    config: Any
    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose `num_inference_steps` timesteps ([`respaced_timesteps`]).

        Raises:
            TypeError, ValueError: `num_inference_steps` is no int from 1 to `num_train_timesteps`.
        """
        alphas_cumprod = self.alphas_cumprod.numpy()
        timesteps = respaced_timesteps(len(alphas_cumprod), num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(timesteps).to(device)
        self._posterior = Posterior.of(alphas_cumprod[timesteps[::-1]])
        self._begun = False
        self._steps_left = num_inference_steps

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at `timesteps[begin_index]`, as image-to-image does."""
        self._begun = True
        self._steps_left = len(self.timesteps) - begin_index

    def _advance(self, timestep: torch.Tensor | int) -> int:
        """Index of this step in the tables. Counted, so that nothing in the loop waits for the device."""
        if not self._begun:
            matches = (self.timesteps == int(timestep)).nonzero()
            if not len(matches):
                raise ValueError(f"`timestep` is {int(timestep)}; accepted are {self.timesteps.tolist()}.")
            self.set_begin_index(int(matches[0]))
        self._steps_left -= 1
        return self._steps_left

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Returns `sample` as it is; here for interchangeability with other schedulers."""
        return sample

    def _previous(
        self, index: int, x0: torch.Tensor, sample: torch.Tensor, log_variance: Any, generator: Any, noise: Any
    ) -> torch.Tensor:
        mean = float(self._posterior.x0_coefficient[index]) * x0
        mean = mean + float(self._posterior.sample_coefficient[index]) * sample
        if index == 0:
            return mean
        if noise is None:
            noise = sampling.draw_noise(sample.shape, generator, sample.device, sample.dtype)
        return mean + torch.exp(0.5 * log_variance) * noise.to(mean)


class KandinskyAncestralScheduler(AncestralStepper, SchedulerMixin, ConfigMixin):
    """The "p_sampler" of Kandinsky 2.0 and 2.1: ancestral sampling with learned variance and a dynamic threshold.

    Float64 tables on respaced timesteps (`p_sample` in kandinsky2/model/gaussian_diffusion.py of the original).

    Args:
        num_train_timesteps: length of the training schedule.
        beta_start: first of the linear betas.
        beta_end: last of the linear betas.
        denoised_range: the predicted clean latents are clamped to plus/minus this first (2.1: 2.0); None: no clamp.
        dynamic_thresholding_ratio: then this quantile s of their absolute values, at least 1, clips them and divides
            them (https://arxiv.org/abs/2205.11487, section 2.3); None for no threshold.
        denoised_thresholding: when inpainting, threshold the predicted clean latents once more, before the known ones
            are put into them (2.0).
        variance_type: `"learned_range"`, the only one: the network predicts `2 * channels` channels.
        prediction_type: `"epsilon"`, the only one.
        threshold_reference: `"sample"` takes the quantile of each sample; `"first"`, as the original, that of
            the first sample for the whole batch.
        noise_beta_start: see the module's description.
        noise_beta_end: see the module's description.
        start_timestep: see the module's description.
        grow_mask: see the module's description.

    Raises:
        ValueError: a setting is not among those accepted.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        denoised_range: float | None = 2.0,
        dynamic_thresholding_ratio: float | None = 0.995,
        denoised_thresholding: bool = False,
        variance_type: Literal["learned_range"] = "learned_range",
        prediction_type: Literal["epsilon"] = "epsilon",
        threshold_reference: Literal["sample", "first"] = "sample",
        noise_beta_start: float | None = None,
        noise_beta_end: float | None = None,
        start_timestep: Literal["diffusers", "original"] = "diffusers",
        grow_mask: bool = True,
    ):
        check_choice("variance_type", variance_type, ("learned_range",))
        check_choice("prediction_type", prediction_type, ("epsilon",))
        check_choice("threshold_reference", threshold_reference, ("sample", "first"))
        check_choice("start_timestep", start_timestep, ("diffusers", "original"))
        state_every_setting(self)
        self.alphas_cumprod = torch.from_numpy(linear_alphas_cumprod(beta_start, beta_end, num_train_timesteps))
        self.set_timesteps(num_train_timesteps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        known_latents: torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> KandinskySchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One ancestral step.

        Args:
            model_output: `[batch, 2 * channels, height, width]`, noise and variance in [-1, 1].
            timestep: the current one of `timesteps`.
            sample: `[batch, channels, height, width]`.
            generator: for the noise of the step; the last step draws none.
            variance_noise: noise to use instead, shaped like `sample`.
            known_latents: clean latents that the prediction is set to where `keep_mask` is 1 (inpainting), before the
                dynamic threshold.
            keep_mask: `[batch, 1, height, width]`, 1 keeps, 0 repaints.
            return_dict: return a tuple if False.
        """
        index = self._advance(timestep)
        noise_prediction, variance_prediction = model_output.float().split(sample.shape[1], dim=1)
        x0 = self._clean(index, sample.float(), noise_prediction)
        if known_latents is not None and keep_mask is not None:
            x0 = self._threshold(x0) if self.config.denoised_thresholding else x0
            x0 = x0 * (1.0 - keep_mask.float()) + known_latents.float() * keep_mask.float()
        x0 = self._threshold(x0)
        share = (variance_prediction + 1.0) / 2.0
        log_variance = share * float(self._posterior.log_beta[index])
        log_variance = log_variance + (1.0 - share) * float(self._posterior.log_variance[index])
        previous = self._previous(index, x0, sample.float(), log_variance, generator, variance_noise)
        previous, x0 = previous.to(sample.dtype), x0.to(sample.dtype)
        return KandinskySchedulerOutput(previous, x0) if return_dict else (previous, x0)

    def _clean(self, index: int, sample: torch.Tensor, noise_prediction: torch.Tensor) -> torch.Tensor:
        alpha = float(self._posterior.alphas_cumprod[index])
        x0 = (1.0 / alpha) ** 0.5 * sample - (1.0 / alpha - 1.0) ** 0.5 * noise_prediction
        limit = self.config.denoised_range
        return x0 if limit is None else x0.clamp(-limit, limit)

    def _threshold(self, x0: torch.Tensor) -> torch.Tensor:
        ratio = self.config.dynamic_thresholding_ratio
        if ratio is None:
            return x0
        return dynamically_thresholded(x0, ratio, x0[:1] if self.config.threshold_reference == "first" else x0)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class KandinskyUnCLIPScheduler(SavedAsStock, AncestralStepper, UnCLIPScheduler):
    """[`UnCLIPScheduler`] with float64 tables and the original's timesteps, for the prior of 2.1 and 2.2.

    The last step divides two tiny numbers; in float32, as in stock, that moves the image embedding by 5e-4 of its
    value. Takes any number of steps from 1. The prior pipelines take it on when they are given the stock class, and
    save it under the stock name, whose configuration is the same.

    Raises:
        ValueError: `variance_type` is not `"fixed_small_log"`, the one that Kandinsky's priors use.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        variance_type: Literal["fixed_small_log"] = "fixed_small_log",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        prediction_type: Literal["epsilon", "sample"] = "epsilon",
        beta_schedule: Literal["squaredcos_cap_v2"] = "squaredcos_cap_v2",
    ):
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            variance_type=variance_type,
            clip_sample=clip_sample,
            clip_sample_range=clip_sample_range,
            prediction_type=prediction_type,
            beta_schedule=beta_schedule,
        )
        check_choice("variance_type", variance_type, ("fixed_small_log",))
        check_choice("prediction_type", prediction_type, ("epsilon", "sample"))
        self.betas = torch.from_numpy(cosine_betas(num_train_timesteps))
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.set_timesteps(num_train_timesteps)

    @classmethod
    def replaces(cls, component: UnCLIPScheduler) -> bool:
        """Only where the variance is the posterior's own; a decoder's UnCLIP learns its variance."""
        return component.config.variance_type == "fixed_small_log"

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        prev_timestep: torch.Tensor | int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: torch.Tensor | None = None,
    ) -> KandinskySchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One ancestral step with the posterior's own variance.

        Args:
            model_output: `[batch, width]`, the clean embedding or the noise, by `prediction_type`.
            timestep: the current one of `timesteps`.
            sample: `[batch, width]`.
            prev_timestep: not needed here, the scheduler knows its next timestep; accepted as in stock.
            generator: for the noise of the step; the last step draws none.
            return_dict: return a tuple if False.
            variance_noise: noise to use instead, shaped like `sample`.
        """
        index = self._advance(timestep)
        alpha = float(self._posterior.alphas_cumprod[index])
        x0, x = model_output.float(), sample.float()
        if self.config.prediction_type == "epsilon":
            x0 = (x - (1.0 - alpha) ** 0.5 * x0) / alpha**0.5
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        log_variance = torch.tensor(self._posterior.log_variance[index], dtype=torch.float32)
        previous = self._previous(index, x0, x, log_variance, generator, variance_noise)
        previous, x0 = previous.to(sample.dtype), x0.to(sample.dtype)
        return KandinskySchedulerOutput(previous, x0) if return_dict else (previous, x0)
