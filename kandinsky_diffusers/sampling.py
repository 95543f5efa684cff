"""The one denoising loop, guidance, and the one source of noise.

Everything that differs between versions and tasks comes in as a callable: *predict* runs the network, *combine* is the
guidance, *step* is the scheduler. The loop knows nothing of text, masks or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor


Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Combine = Callable[[torch.Tensor], torch.Tensor]
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
OnStepEnd = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def denoise(
    latents: torch.Tensor,
    timesteps: Iterable[torch.Tensor],
    predict: Predict,
    combine: Combine,
    step: Step,
    on_step_end: OnStepEnd | None = None,
) -> torch.Tensor:
    """Walk `latents` down `timesteps`.

    Args:
        latents: the noisy start, any shape `[batch, ...]`.
        timesteps: training timesteps, from noisy to clean; wrap them in a progress bar to show one.
        predict: `(latents, timestep) -> prediction`, usually for the conditional and unconditional half at once.
        combine: `(prediction) -> prediction`, guidance.
        step: `(prediction, timestep, latents) -> latents`, one scheduler step.
        on_step_end: `(index, timestep, latents) -> latents`, called after each step.

    Returns:
        The latents after the last step, shaped like `latents`.
    """
    for index, timestep in enumerate(timesteps):
        latents = step(combine(predict(latents, timestep)), timestep, latents)
        if on_step_end is not None:
            latents = on_step_end(index, timestep, latents)
    return latents


def guide_from_uncond(prediction: torch.Tensor, guidance_scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance of Kandinsky 2.x, `u + g (c - u)` (https://arxiv.org/abs/2207.12598).

    Args:
        prediction: `[2 * batch, ...]`, the unconditional half first.
        guidance_scale: g; 1 means the conditional prediction alone. May be a tensor that broadcasts against one half.
    """
    uncond, cond = prediction.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def guide_beyond_cond(prediction: torch.Tensor, guidance_scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance of Kandinsky 3.x, `(g + 1) c - g u`.

    Args:
        prediction: `[2 * batch, ...]`, the unconditional half first.
        guidance_scale: g; 0 means the conditional prediction alone. May be a tensor that broadcasts against one half.
    """
    uncond, cond = prediction.chunk(2)
    return (guidance_scale + 1.0) * cond - guidance_scale * uncond


def guide_keep_variance(prediction: torch.Tensor, guidance_scale: float | torch.Tensor, channels: int) -> torch.Tensor:
    """Guide the first `channels` channels of a learned-variance prediction; the variance is the conditional half's.

    (`model_fn` in kandinsky2/kandinsky2_1_model.py of the original.)

    Args:
        prediction: `[2 * batch, 2 * channels, height, width]`, the unconditional half first.
        guidance_scale: see [`guide_from_uncond`].
        channels: number of latent channels.
    """
    noise, variance = prediction.split(channels, dim=1)
    return torch.cat([guide_from_uncond(noise, guidance_scale), variance.chunk(2)[1]], dim=1)


def draw_noise(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Standard normal noise; every draw of the package comes from here.

    Args:
        shape: `[batch, ...]`.
        generator: one generator for the whole batch, or a list of n for a batch of k * n rows. Generator i then draws
            rows i, n + i, 2n + i ... in one go, so that a sample gets the same numbers in any batch it is part of.
        device: where the tensor lives. A generator of another device draws there, and the tensor is moved.
        dtype: of the tensor.

    Raises:
        ValueError: the batch is no multiple of the number of generators.
    """
    if not isinstance(generator, list):
        return _drawn(shape, generator, device, dtype)
    rows, remainder = divmod(shape[0], len(generator))
    if remainder:
        raise ValueError(f"`generator` is a list of {len(generator)}, which does not divide the batch of {shape[0]}.")
    each = [_drawn((rows, *shape[1:]), g, device, dtype) for g in generator]
    return torch.stack(each, dim=1).reshape(tuple(shape))


def step_end_callback(
    pipeline: Any,
    conditions: dict[str, torch.Tensor],
    callback: Callable[..., dict] | None,
    tensor_inputs: Sequence[str] = ("latents",),
) -> OnStepEnd | None:
    """Adapt diffusers' `callback_on_step_end(pipeline, index, timestep, tensors) -> tensors` to the loop.

    Args:
        pipeline: handed to the callback.
        conditions: named tensors that *predict* reads at each step; what the callback returns replaces them.
        callback: the user's function, or None.
        tensor_inputs: which of `"latents"` and the names in `conditions` the callback gets; None where there is no
            such condition, such as a negative one without guidance.
    """
    if callback is None:
        return None

    def on_step_end(index: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        named = {"latents": latents, **conditions}
        changed = dict(callback(pipeline, index, timestep, {name: named.get(name) for name in tensor_inputs}) or {})
        latents = changed.pop("latents", latents)
        conditions.update(changed)
        return latents

    return on_step_end


def _drawn(
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    place = None if device is None else torch.device(device)
    source = place if generator is None else generator.device
    noise = randn_tensor(tuple(shape), generator=generator, device=source, dtype=dtype)
    if place is None or place.type != "cuda" or noise.device.type != "cpu":
        return noise.to(place)
    return noise.pin_memory().to(place, non_blocking=True)  # the host does not wait for what the device still computes
