"""What lasts as long as the loop of one call of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .attention import processor_states
from .compilation import is_compiled
from .context_cache import ContextCache
from .lora import times_changed


T = TypeVar("T")


class RunningCall:
    """The timesteps of a loop, on the host for the scheduler and on the device for the models; and what models keep.

    A scheduler computes with numbers that it looks up by the timestep. On the device it would have to wait, at each
    step, for all that is still being computed there.

    Args:
        timesteps: `[steps]`, as the scheduler has them.
        device: where the models run; all timesteps go there at once.
        watched: whether a callback of the user's, which may change anything, is called between steps.
    """

    def __init__(self, timesteps: torch.Tensor, device: torch.device, watched: bool):
        self.timesteps = list(timesteps.to(device).unbind())
        self._on_host = {id(moved): own for moved, own in zip(self.timesteps, timesteps.cpu().unbind(), strict=True)}
        self._watched = watched
        self._made: dict[int, tuple[list[Any], list[Any], Any]] = {}

    def on_host(self, timestep: torch.Tensor) -> torch.Tensor:
        """One of `timesteps` as the scheduler has it; any other is copied."""
        own = self._on_host.get(id(timestep))
        return timestep.cpu() if own is None else own

    def once(self, model: Any, inputs: Sequence[Any], make: Callable[[], T]) -> T | None:
        """What `make` has made of these inputs for `model`; made anew when one of them has changed.

        None where it could be outdated in a way that cannot be seen: a callback may change the weights and scales of
        loaded adapters at any step.

        Args:
            model: what it is for.
            inputs: tensors, which change when there is another one in the place of it, or in place; and other
                things, compared by their values.
            make: makes it.
        """
        if self._watched and getattr(model, "peft_config", None):
            return None
        inputs = [*inputs, times_changed(model)]
        state = [_state_of(item) for item in inputs]
        made = self._made.get(id(model))
        if made is None or made[1] != state:
            made = self._made[id(model)] = (inputs, state, make())  # the inputs, so that ids stay theirs
        return made[2]

    def context_cache(self, model: Any, inputs: Sequence[Any]) -> ContextCache | None:
        """The cache for what `model` computes of these inputs; None where it cannot use one.

        A model that is compiled as a whole gets none, for its code would be made twice.
        """
        if not hasattr(type(model), "supports_context_cache") or is_compiled(model):
            return None
        if self._watched:
            inputs = [*inputs, *processor_states(model)]
        return self.once(model, inputs, lambda: ContextCache() if model.supports_context_cache else None)


class RunsCalls:
    """Mixed into pipelines: the running call, where there is one."""

    _running: RunningCall | None = None

    @contextmanager
    def _as_running(self, call: RunningCall) -> Iterator[RunningCall]:
        before, self._running = self._running, call  # a callback may call the pipeline, too
        try:
            yield call
        finally:
            self._running = before

    def _on_host(self, timestep: torch.Tensor) -> torch.Tensor:
        """A timestep of the loop as the scheduler has it; outside of a loop, as it is."""
        return timestep if self._running is None else self._running.on_host(timestep)

    def _context_cache(self, model: Any, inputs: Sequence[Any]) -> ContextCache | None:
        """See [`RunningCall.context_cache`]; None outside of a loop."""
        return None if self._running is None else self._running.context_cache(model, inputs)


def _state_of(item: Any) -> Any:
    if not isinstance(item, torch.Tensor):
        return item
    return id(item), None if item.is_inference() else item._version
