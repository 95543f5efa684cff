"""Timesteps, betas and posterior coefficients of the originals, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin

from ..inputs import check_at_most, check_counts


def respaced_timesteps(num_train_timesteps: int, num_inference_steps: int) -> np.ndarray:
    """Descending int64 timesteps from `num_train_timesteps - 1` to 0, as the originals space them.

    The stride is added up in floating point and each sum rounded half to even, which differs from `np.linspace` for
    some odd numbers of steps (`space_timesteps` in kandinsky2/model/respace.py of the original).

    Raises:
        ValueError: `num_inference_steps` is below 1 or above `num_train_timesteps`.
    """
    check_counts(num_inference_steps=num_inference_steps)
    check_at_most("num_inference_steps", num_inference_steps, num_train_timesteps)
    stride = (num_train_timesteps - 1) / (num_inference_steps - 1) if num_inference_steps > 1 else 1.0
    position, timesteps = 0.0, []
    for _ in range(num_inference_steps):
        timesteps.append(round(position))
        position += stride
    return np.array(timesteps[::-1], dtype=np.int64)


def strided_timesteps(num_train_timesteps: int, num_inference_steps: int, offset: int = 1) -> np.ndarray:
    """Descending int64 timesteps of the originals' DDIM and PLMS, `num_train_timesteps // steps` apart from `offset`.

    Where the number of steps does not divide `num_train_timesteps` there are more timesteps than asked for, as in the
    original (kandinsky2/model/samplers.py), and a last one of `num_train_timesteps`, on which the original crashes,
    becomes `num_train_timesteps - 1`.

    Raises:
        ValueError: `num_inference_steps` is below 1 or above `num_train_timesteps`.
    """
    check_counts(num_inference_steps=num_inference_steps)
    check_at_most("num_inference_steps", num_inference_steps, num_train_timesteps)
    ascending = np.arange(0, num_train_timesteps, num_train_timesteps // num_inference_steps) + offset
    return np.minimum(ascending, num_train_timesteps - 1)[::-1].astype(np.int64)


@dataclass(frozen=True)
class Posterior:
    """Float64 tables of q(x_{t-1} | x_t, x_0) on respaced timesteps, index 0 the cleanest.

    Formulas (6) and (7) of https://arxiv.org/abs/2006.11239, with betas recomputed from the kept cumulative products
    as in https://arxiv.org/abs/2102.09672.
    """

    alphas_cumprod: np.ndarray
    x0_coefficient: np.ndarray
    sample_coefficient: np.ndarray
    log_beta: np.ndarray
    log_variance: np.ndarray

    @classmethod
    def of(cls, kept_alphas_cumprod: np.ndarray) -> Posterior:
        """The tables for the kept cumulative products, ascending in time."""
        previous = np.append(1.0, kept_alphas_cumprod[:-1])
        betas = 1.0 - kept_alphas_cumprod / previous
        variance = betas * (1.0 - previous) / (1.0 - kept_alphas_cumprod)
        # At index 0 the variance is zero; the originals put its neighbour in its place before taking the logarithm.
        variance[0] = variance[min(1, len(variance) - 1)]
        return cls(
            alphas_cumprod=kept_alphas_cumprod,
            x0_coefficient=betas * np.sqrt(previous) / (1.0 - kept_alphas_cumprod),
            sample_coefficient=(1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - kept_alphas_cumprod),
            log_beta=np.log(betas),
            log_variance=np.log(np.maximum(variance, 1e-20)),
        )


def linear_alphas_cumprod(beta_start: float, beta_end: float, count: int) -> np.ndarray:
    """Cumulative products of 1 - beta for `count` linear betas."""
    return np.cumprod(1.0 - np.linspace(beta_start, beta_end, count, dtype=np.float64))


def cosine_betas(count: int, largest: float = 0.999) -> np.ndarray:
    """Betas of the squared-cosine schedule (https://arxiv.org/abs/2102.09672, formula 17)."""
    edges = np.arange(count + 1, dtype=np.float64) / count
    alphas_cumprod = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], largest)


def noised(
    alphas_cumprod: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """sqrt(a) latents + sqrt(1 - a) noise with a of `timesteps` `[batch]` or `[]`, formula (4) of the same paper."""
    alpha = alphas_cumprod[timesteps.to(alphas_cumprod.device).long()]
    if alpha.ndim:  # a number is left on the host, from where nothing has to be copied
        alpha = alpha.to(latents.device).view(-1, *[1] * (latents.ndim - 1))
    return alpha.sqrt().to(latents.dtype) * latents + (1.0 - alpha).sqrt().to(latents.dtype) * noise


class NoisesOnHost:
    """Mixed in before a stock scheduler: noise levels are looked up where the table is, which stays on the host."""

    alphas_cumprod: torch.Tensor

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`original_samples` as they are at `timesteps` (one per sample, or one): sqrt(a) x + sqrt(1 - a) noise."""
        return noised(self.alphas_cumprod, original_samples, noise, timesteps)


def dynamically_thresholded(x0: torch.Tensor, ratio: float, reference: torch.Tensor | None = None) -> torch.Tensor:
    """`x0` clipped to plus/minus s and divided by s (https://arxiv.org/abs/2205.11487, section 2.3).

    s is the quantile `ratio` of the absolute values of each sample, or of `reference`, and at least 1.
    """
    magnitudes = (x0 if reference is None else reference).abs().flatten(1)
    limit = torch.quantile(magnitudes, ratio, dim=1).clamp(min=1.0)
    limit = limit.view(-1, *[1] * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -limit), limit) / limit


def with_second_twice(timesteps: np.ndarray) -> np.ndarray:
    """The order in which PLMS calls the network: its first step is an improved Euler step with two calls."""
    return np.concatenate([timesteps[:2], timesteps[1:2], timesteps[2:]])


def state_every_setting(scheduler: ConfigMixin) -> None:
    """Let `from_config` of another class take over our defaults; it skips what is marked as one, and has its own."""
    scheduler.register_to_config(_use_default_values=[])
