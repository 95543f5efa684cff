"""Steps that compute only the first level of a UNet, and take the rest from steps before: approximate, and fast.

What the lower levels compute changes slowly from step to step, and they are most of the work (DeepCache,
https://arxiv.org/abs/2312.00858). diffusers has the hooks for it, those of TaylorSeer
(https://arxiv.org/abs/2503.06923); here is where they go, and when they begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import CacheMixin, TaylorSeerCacheConfig, UNet2DConditionModel
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook
from diffusers.utils.torch_utils import unwrap_module

from .compilation import is_compiled, is_compiled_whole
from .inputs import check_at_least, check_choice, check_counts


LEAST_INTERVAL = 2
ORDERS = (0, 1, 2)


class CachesSteps(CacheMixin):
    """Mixed into UNets: diffusers' way to caches, `enable_cache` and `disable_cache`."""

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        # diffusers asks for it after each call, and would leave an empty registry of hooks on a model without a cache
        if self.is_cache_enabled:
            super()._reset_stateful_cache(recurse)


class StepCacheMixin:
    """Mixed in before a [`KandinskyPipelineMixin`] with a `unet`."""

    unet: Any
    _weights_change: Callable[[], AbstractContextManager[None]]

    def enable_step_cache(self, interval: int = LEAST_INTERVAL, order: int = 0) -> None:
        """Compute the lower levels of the UNet at every `interval`-th step only. Approximate; off by default.

        The first step is computed whole, the third, and from there on every `interval`-th. In between only the first
        level runs, and what the others would give comes from the steps before. Each call begins anew, and so does a
        call in which conditions change. It is a matter of the UNet, and so of all pipelines that share it. `optimize`
        leaves out for it what cannot be beside it: CUDA graphs, and in 2.x compiled blocks. `exact_reference` does not
        switch it off.

        Args:
            interval: 2 or more.
            order: 0 takes what the last whole step gave, 1 goes on in a straight line from the last two, 2 in a
                parabola from the last three (the order of TaylorSeer).

        Raises:
            TypeError: `interval` is no int, or the UNet is none of those that diffusers can cache.
            ValueError: `interval` or `order` is another one, a cache is enabled already, the UNet has one level only,
                or it, or a layer that would be skipped, is compiled.
        """
        check_counts(interval=interval)
        check_at_least("interval", interval, LEAST_INTERVAL)
        check_choice("order", order, ORDERS)
        unet = self.unet
        if not isinstance(unwrap_module(unet), CacheMixin):
            raise TypeError(f"`unet` is a {type(unet).__name__}; accepted is one that is a diffusers `CacheMixin`.")
        with self._weights_change():
            unet.enable_cache(step_cache_config(unet, interval, order))
            try:
                check_not_compiled(unet)
            except ValueError:
                unet.disable_cache()
                raise

    def disable_step_cache(self) -> None:
        """Compute every step whole again."""
        if getattr(self.unet, "is_cache_enabled", False):
            with self._weights_change():
                self.unet.disable_cache()


class CachedSteps:
    """The steps of one call, for a UNet that may have a cache, which is emptied when something else is drawn.

    Args:
        unet: of the pipeline.
    """

    def __init__(self, unet: Any):
        self._unet = unet
        self._drawn: tuple[int, dict[str, Any]] | None = None

    @contextmanager
    def step(self, halves: int, conditions: Mapping[str, Any]) -> Iterator[None]:
        """Run a step in this.

        Args:
            halves: 2 where the UNet runs with and without the conditions.
            conditions: what it sees besides latents and timestep; another tensor is another condition.
        """
        if not getattr(self._unet, "is_cache_enabled", False):
            yield
            return
        if self._drawn is None or not _are_same(self._drawn, (halves, conditions)):
            check_not_compiled(self._unet)
            self._unet._reset_stateful_cache()
            self._drawn = halves, dict(conditions)
        with self._unet.cache_context("denoising"):
            yield


def step_cache_config(unet: Any, interval: int, order: int = 0) -> TaylorSeerCacheConfig:
    """The settings for `unet.enable_cache(...)`, see [`StepCacheMixin.enable_step_cache`].

    Raises:
        ValueError: the UNet has one level only.
    """
    last = len(unet.up_blocks) - 2  # of the lower levels' blocks; its output goes up into the first level
    if last < 0:
        raise ValueError("`unet` has 1 level; accepted are 2 or more, for the first one is never skipped.")
    skipped = [rf"up_blocks\.{level}" for level in range(last)]
    if isinstance(unet, UNet2DConditionModel):
        # blocks on the way down give their skips too, which these hooks cannot keep; their layers give one tensor
        skipped += [r"down_blocks\.0\.downsamplers\.\d+", "mid_block"]
        skipped += [r"down_blocks\.[1-9]\.(resnets|attentions|downsamplers)\.\d+"]
    else:
        skipped += [r"down_blocks\.[1-9]"]
    return TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=1,
        max_order=order,
        taylor_factors_dtype=None,  # as it is
        skip_predict_identifiers=skipped,
        cache_identifiers=[rf"up_blocks\.{last}"],
    )


def check_not_compiled(unet: Any) -> None:
    """Raises ValueError where a UNet with a step cache, or a layer of it that is skipped, is compiled."""
    if is_compiled_whole(unet):
        raise ValueError(
            "the UNet is compiled as a whole, and its step cache decides at each step what to compute; accepted is"
            " one of both."
        )
    compiled = [name for name, layer in skipped_layers(unet).items() if is_compiled(layer)]
    if compiled:
        raise ValueError(
            f"{len(compiled)} layers that the step cache skips are compiled, such as `{compiled[0]}`; accepted is one"
            " of both, the step cache or compiled layers."
        )


def skipped_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers of a model that its step cache skips, by their paths; none without one."""
    return {name: layer for name, layer in model.named_modules() if _has_step_cache(layer)}


def _has_step_cache(layer: torch.nn.Module) -> bool:
    hooks = getattr(vars(layer).get("_diffusers_hook"), "hooks", {})
    return any(isinstance(hook, TaylorSeerCacheHook) for hook in hooks.values())


def _are_same(drawn: tuple[int, Mapping[str, Any]], before: tuple[int, Mapping[str, Any]]) -> bool:
    (halves, conditions), (halves_before, conditions_before) = drawn, before
    if halves != halves_before or conditions.keys() != conditions_before.keys():
        return False
    return all(condition is conditions_before[name] for name, condition in conditions.items())
