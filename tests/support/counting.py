"""Counting what a model does, so that a saving that stops to work is noticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from kandinsky_diffusers.context_cache import ContextCache


@contextmanager
def calls_of(model: torch.nn.Module, *names: str) -> Iterator[Mapping[str, set[int]]]:
    """How often each module that is called one of `names` runs: of each name the different numbers."""
    counts: Counter[str] = Counter()
    paths = {path: path.rpartition(".")[2] for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    found: dict[str, set[int]] = {}

    def count(path: str) -> Any:
        return lambda *_: counts.update([path])

    hooks = [model.get_submodule(path).register_forward_hook(count(path)) for path in paths]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        assert set(paths.values()) == set(names), f"there is no module called {set(names) - set(paths.values())}"
        for path, name in paths.items():
            found.setdefault(name, set()).add(counts[path])


@contextmanager
def rows_of(model: torch.nn.Module, argument: str = "sample") -> Iterator[list[int]]:
    """The size of the batch at each call of `model`, whose first argument is called so."""
    rows: list[int] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        first = args[0] if args else kwargs.get(argument)
        if first is not None:  # no prefill, no projection
            rows.append(len(first))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


@contextmanager
def filled_ahead(*models: torch.nn.Module) -> Iterator[list[ContextCache]]:
    """Caches are filled before the first forward that gets them, which then must find all it needs; yields them."""
    caches: list[ContextCache] = []
    kept: dict[int, int] = {}

    def fill(model: Any, args: Any, kwargs: Any) -> None:
        cache = _cache_in(kwargs)
        if cache is not None and not cache.filled:
            assert model.forward(*args, **kwargs, fill=True) is None
            assert cache.filled
            caches.append(cache)
            kept[id(cache)] = len(tree_leaves(cache))

    def check(model: Any, args: Any, kwargs: Any, output: Any) -> None:
        cache = _cache_in(kwargs)
        assert cache is None or len(tree_leaves(cache)) == kept[id(cache)]

    hooks = [model.register_forward_pre_hook(fill, with_kwargs=True) for model in models]
    hooks += [model.register_forward_hook(check, with_kwargs=True) for model in models]
    try:
        yield caches
    finally:
        for hook in hooks:
            hook.remove()


def _cache_in(kwargs: Mapping[str, Any]) -> ContextCache | None:
    return kwargs.get("cache") or (kwargs.get("added_cond_kwargs") or {}).get("cache")
