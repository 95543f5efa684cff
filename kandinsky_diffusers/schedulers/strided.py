"""DDIM and PLMS on the originals' own list of timesteps."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import DDIMScheduler, PNDMScheduler
from diffusers.configuration_utils import register_to_config

from ..inputs import check_choice
from .tables import NoisesOnHost, state_every_setting, strided_timesteps, with_second_twice


class KandinskyDDIMScheduler(NoisesOnHost, DDIMScheduler):
    """[`DDIMScheduler`] on the original's own list of timesteps ([`strided_timesteps`]) and with its settings.

    Equal to stock where the number of steps divides `num_train_timesteps`; elsewhere stock leaves out the noisiest
    timesteps and this does not, so that it may make more steps than asked for.

    Args: those of [`DDIMScheduler`], with 2.1's values as defaults, and `noise_beta_start`, `noise_beta_end`,
        `start_timestep`, `grow_mask`, for which see the module's description.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = False,
        steps_offset: int = 1,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["leading"] = "leading",
        rescale_betas_zero_snr: bool = False,
        noise_beta_start: float | None = None,
        noise_beta_end: float | None = None,
        start_timestep: Literal["diffusers", "original"] = "diffusers",
        grow_mask: bool = True,
    ):
        check_choice("start_timestep", start_timestep, ("diffusers", "original"))
        check_choice("timestep_spacing", timestep_spacing, ("leading",))
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        state_every_setting(self)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps ([`strided_timesteps`]).

        Raises:
            ValueError: `num_inference_steps` is below 1 or above `num_train_timesteps`.
        """
        timesteps = strided_timesteps(self.config.num_train_timesteps, num_inference_steps, self.config.steps_offset)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(timesteps).to(device)


class KandinskyPNDMScheduler(NoisesOnHost, PNDMScheduler):
    """[`PNDMScheduler`] as the original's PLMS, on its own list of timesteps ([`strided_timesteps`]).

    The second timestep appears twice: the first step is a pseudo improved Euler step with two network calls.

    Args: those of [`PNDMScheduler`], with 2.1's values as defaults, and `noise_beta_start`, `noise_beta_end`,
        `start_timestep`, `grow_mask`, for which see the module's description.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        skip_prk_steps: bool = True,
        set_alpha_to_one: bool = False,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        timestep_spacing: Literal["leading"] = "leading",
        steps_offset: int = 1,
        noise_beta_start: float | None = None,
        noise_beta_end: float | None = None,
        start_timestep: Literal["diffusers", "original"] = "diffusers",
        grow_mask: bool = True,
    ):
        check_choice("start_timestep", start_timestep, ("diffusers", "original"))
        check_choice("timestep_spacing", timestep_spacing, ("leading",))
        check_choice("skip_prk_steps", skip_prk_steps, (True,))
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            skip_prk_steps=skip_prk_steps,
            set_alpha_to_one=set_alpha_to_one,
            prediction_type=prediction_type,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
        )
        state_every_setting(self)
        # the repeated second step asks for the timestep before it, which may be the one past the end
        self.alphas_cumprod = torch.cat([self.alphas_cumprod, self.alphas_cumprod[-1:]])

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps ([`strided_timesteps`]).

        Raises:
            ValueError: `num_inference_steps` is below 1 or above `num_train_timesteps`.
        """
        timesteps = strided_timesteps(self.config.num_train_timesteps, num_inference_steps, self.config.steps_offset)
        super().set_timesteps(num_inference_steps)
        self.timesteps = torch.from_numpy(with_second_twice(timesteps)).to(device)
