"""What a model computes of the conditions of a call: once in the call, and not at every step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree


T = TypeVar("T")


class KeyValue:
    """Keys and values that one attention layer has made of tokens, and that it takes in the place of these.

    It is no tuple on purpose, for hooks take those apart.

    Args:
        key: `[batch, tokens, heads, width of a head]`.
        value: likewise.
        pictures: likewise for the tokens that an IP-Adapter makes of pictures, one for each adapter; None for those
            that do not count.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, pictures: Sequence[KeyValue | None] = ()):
        self.key, self.value, self.pictures = key, value, tuple(pictures)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.key.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Batch and tokens."""
        return self.key.shape[0], self.key.shape[1]

    def split(self, tokens: Sequence[int], dim: int = 1) -> list[KeyValue]:
        """Of so many tokens each, without those of pictures; as tokens themselves are split along `dim`, 1."""
        parts = zip(self.key.split(list(tokens), dim), self.value.split(list(tokens), dim), strict=True)
        return [KeyValue(key, value) for key, value in parts]


class ContextCache:
    """What a model has computed of the conditions of one call. The first forward fills it, later ones read it.

    With `fill=True` a forward does nothing else.

    A model takes it in the place of what it attends to, and asks it for the keys and values of each layer. It is
    neither list nor dict, and has no `to`: hooks that offload copy such, and a copy that gets filled is lost.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}
        self._tokens: torch.Tensor | None = None
        self.filled = False

    def keep(self, name: Hashable, make: Callable[[], T]) -> T:
        """What is kept under `name`, made if it is not there yet."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def in_place_of(self, tokens: torch.Tensor) -> ContextCache:
        """This cache, for layers that else attend to `tokens` `[batch, tokens, width]`."""
        self._tokens = tokens
        return self

    def of_layer(self, layer: Any) -> KeyValue:
        """Keys and values of an attention layer; it makes them by `layer.processor.project(layer, tokens)`."""
        return self.keep(layer, lambda: layer.processor.project(layer, self._tokens))


class KeyValueCache:
    """Keys and values of the first tokens of a sequence, for one attention layer.

    The first call of the layer fills it; every later call attends to what it holds and then to its own tokens. It
    writes these behind the first ones, where the next call overwrites them, since to concatenate would copy all.
    It is neither list nor dict on purpose: offload hooks copy those, and a copy that gets filled is lost.

    Args:
        room: how many tokens each later call has.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._held: torch.Tensor | None = None

    def join(self, both: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """Keys and values to attend to, given those of this call's tokens, both `[2, batch, tokens, heads, width]`.

        What is returned is valid until the next call.
        """
        new = both if isinstance(both, torch.Tensor) else torch.stack(tuple(both))
        if self._held is None:
            with torch.inference_mode(False):  # else nothing could be written into it outside of that mode
                self._held = F.pad(new, (0, 0, 0, 0, 0, self._room))
            return new
        first = self._held.shape[2] - self._room
        if torch.is_grad_enabled():  # autograd may need what the next call would overwrite
            return torch.cat([self._held[:, :, :first], new], dim=2)
        self._held[:, :, first:] = new
        return self._held


def tokens_for(layer: Any, context: Any) -> Any:
    """What a layer attends to: `context`, or what a cache that stands for it has for this layer."""
    return context.of_layer(layer) if isinstance(context, ContextCache) else context


def fill_cache(cache: ContextCache | None, layers: Iterable[Any]) -> None:
    """Let a cache have the keys and values of all these layers, the last things that a model keeps there.

    Raises:
        ValueError: there is no cache.
    """
    if cache is None:
        raise ValueError("`fill` is True, and there is no `cache`; accepted is a ContextCache.")
    for layer in layers:
        cache.of_layer(layer)
    cache.filled = True


def _flatten_key_value(both: KeyValue) -> tuple[list[Any], None]:
    return [both.key, both.value, both.pictures], None


def _unflatten_key_value(parts: Any, _: None) -> KeyValue:
    return KeyValue(*parts)


def _flatten_keys(cache: KeyValueCache) -> tuple[list[Any], int]:
    return [cache._held], cache._room


def _unflatten_keys(parts: Any, room: int) -> KeyValueCache:
    cache = KeyValueCache(room)
    (cache._held,) = parts
    return cache


def _flatten_cache(cache: ContextCache) -> tuple[list[Any], tuple[bool, tuple[Hashable, ...]]]:
    return list(cache._kept.values()), (cache.filled, tuple(cache._kept))


def _unflatten_cache(parts: Any, names: tuple[bool, tuple[Hashable, ...]]) -> ContextCache:
    cache = ContextCache()
    cache.filled = names[0]
    cache._kept = dict(zip(names[1], parts, strict=True))
    return cache


pytree.register_pytree_node(KeyValueCache, _flatten_keys, _unflatten_keys)
pytree.register_pytree_node(KeyValue, _flatten_key_value, _unflatten_key_value)
pytree.register_pytree_node(ContextCache, _flatten_cache, _unflatten_cache)
