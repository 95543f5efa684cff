"""Components that the conversions of 2.0 and 2.1 have in common: M-CLIP with its tokenizer, and the samplers."""

from __future__ import annotations

from functools import partial

from . import mclip_weights
from .conversion.files import copy_tokenizer, tokenizer_check
from .conversion.recipe import ConfigComponent, FilesComponent, ModelComponent, Part


def mclip(file: str, folder: str) -> ModelComponent:
    """M-CLIP from a source file, whose configuration lies in that folder of the release."""
    return ModelComponent(
        "text_encoder",
        "kandinsky",
        "MultilingualCLIP",
        parts=(Part(file, mclip_weights.mclip_rules),),
        configure=partial(mclip_weights.mclip_config, folder=folder),
    )


def mclip_tokenizer(folder: str) -> FilesComponent:
    """The tokenizer of M-CLIP from that folder of the release."""
    return FilesComponent(
        "tokenizer",
        "transformers",
        "XLMRobertaTokenizer",
        write=partial(copy_tokenizer, root="release", folder=folder, class_name="XLMRobertaTokenizer"),
        check=partial(tokenizer_check, root="release", folder=folder),
    )


def ddim_scheduler(betas: tuple[float, float]) -> ConfigComponent:
    """The original's ``ddim_sampler`` for betas that grow linearly from one value to the other."""
    return ConfigComponent(
        "scheduler",
        "diffusers",
        "DDIMScheduler",
        config={
            **_schedule(betas),
            "beta_schedule": "linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
        },
    )


def ddpm_scheduler(betas: tuple[float, float], sample_max_value: float | None) -> ConfigComponent:
    """As near to the original's ``p_sampler`` as stock comes: float32 tables, but its timesteps and threshold."""
    return ConfigComponent(
        "ddpm_scheduler",
        "diffusers",
        "DDPMScheduler",
        config={
            **_schedule(betas),
            "beta_schedule": "linear",
            "variance_type": "learned_range",
            "clip_sample": False,
            "prediction_type": "epsilon",
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.995,
            "sample_max_value": sample_max_value,
            "timestep_spacing": "linspace",
        },
    )


def ancestral_scheduler(
    betas: tuple[float, float], denoised_range: float | None, *, denoised_thresholding: bool = False
) -> ConfigComponent:
    """The original's ``p_sampler``; arguments as of ``KandinskyAncestralScheduler``."""
    return ConfigComponent(
        "ancestral_scheduler",
        "kandinsky_diffusers",
        "KandinskyAncestralScheduler",
        config={
            **_schedule(betas),
            "denoised_range": denoised_range,
            "dynamic_thresholding_ratio": 0.995,
            "denoised_thresholding": denoised_thresholding,
            "variance_type": "learned_range",
            "prediction_type": "epsilon",
        },
        module="kandinsky_diffusers.schedulers",
    )


def _schedule(betas: tuple[float, float]) -> dict[str, float]:
    return {"num_train_timesteps": 1000, "beta_start": betas[0], "beta_end": betas[1]}
