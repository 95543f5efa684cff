"""Checks of what a pipeline is called with, and the arithmetic of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch


def as_prompts(prompt: Any, name: str = "prompt") -> list[str]:
    """A prompt, or a list of them, as a list.

    Raises:
        TypeError: it is neither.
        ValueError: the list is empty.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"`{name}` is {prompt!r}; accepted is a str or a list of str.")
    if not prompts:
        raise ValueError(f"`{name}` is an empty list; at least one prompt is needed.")
    return list(prompts)


def check_beautifier(beautifier: Any, prompt: Any) -> None:
    """Raises TypeError where a `prompt_beautifier` cannot be called, ValueError where there is no prompt for it."""
    if beautifier is None:
        return
    if not callable(beautifier):
        raise TypeError(f"`prompt_beautifier` is {beautifier!r}; accepted is a function of a list of str.")
    if prompt is None:
        raise ValueError("`prompt_beautifier` is given without `prompt`; it cannot change `prompt_embeds`.")


def beautified(prompts: list[str], beautifier: Callable[[list[str]], list[str]]) -> list[str]:
    """What a beautifier makes of prompts.

    Raises:
        TypeError: it gives anything else than a list of str.
        ValueError: it gives another number of them.
    """
    better = beautifier(list(prompts))
    if not isinstance(better, (list, tuple)) or not all(isinstance(text, str) for text in better):
        raise TypeError(f"`prompt_beautifier` has returned {better!r}; accepted is a list of str.")
    if len(better) != len(prompts):
        raise ValueError(
            f"`prompt_beautifier` has returned {len(better)} prompts; accepted is one for each of {len(prompts)}."
        )
    return list(better)


def as_negatives(negative: Any, count: int, name: str = "negative_prompt") -> list[str]:
    """One negative prompt for each of `count` prompts; a single one serves all, None is the empty one.

    Raises:
        TypeError: it is no str, list of str, or None.
        ValueError: a list of another length than 1 or `count`.
    """
    negatives = as_prompts("" if negative is None else negative, name)
    if len(negatives) not in (1, count):
        raise ValueError(f"`{name}` has {len(negatives)} items; accepted is 1, or one for each of {count} prompts.")
    return negatives * count if len(negatives) == 1 else negatives


def check_alternatives(name: str, texts: Any, states: dict[str, torch.Tensor | None]) -> None:
    """Raises ValueError where texts and their states are both given, or states without all that belongs to them.

    Args:
        name: of the argument for the texts.
        texts: the texts, or None.
        states: what may be given instead, by the names of the arguments.
    """
    given = [key for key, value in states.items() if value is not None]
    if given and len(given) < len(states):
        missing = ", ".join(f"`{key}`" for key in states if key not in given)
        raise ValueError(f"`{given[0]}` is given without {missing}; they belong together.")
    if given and texts is not None:
        raise ValueError(f"`{name}` and `{given[0]}` are both given; accepted is one of them.")


def as_rows(embeds: Any, width: int, name: str) -> torch.Tensor:
    """Embeddings `[rows, width]` from a tensor or a list of tensors.

    Raises:
        TypeError: it is neither.
        ValueError: there are none, or they have another number of dimensions or another width.
    """
    if embeds is None:
        raise ValueError(f"`{name}` is missing; the prior pipeline makes it, or use the combined pipeline.")
    items: list[Any] = list(embeds) if isinstance(embeds, (list, tuple)) and embeds else [embeds]
    for item in items:
        if not isinstance(item, torch.Tensor):
            raise TypeError(f"`{name}` is or has a {type(item).__name__}; accepted is a tensor or a list of tensors.")
        if item.ndim not in (1, 2) or item.shape[-1] != width:
            raise ValueError(f"`{name}` has the shape {list(item.shape)}; accepted is [rows, {width}].")
    return torch.cat([item if item.ndim == 2 else item[None] for item in items])


def expand(rows: torch.Tensor, prompts: int, images: int, name: str) -> torch.Tensor:
    """Repeat the rows of a tensor to one for each image: from one for all, from one per prompt, or as they are.

    Args:
        rows: `[1 or prompts or images, ...]`.
        prompts: number of prompts.
        images: number of images, a multiple of `prompts`; those of one prompt follow each other.
        name: of the argument, for the error.

    Raises:
        ValueError: the number of rows is none of these.
    """
    if len(rows) not in (1, prompts, images):
        accepted = " or ".join(map(str, dict.fromkeys((1, prompts, images))))
        raise ValueError(f"`{name}` has {len(rows)} rows; accepted is {accepted} for {images} images.")
    return rows.repeat_interleave(images // len(rows), dim=0)


def as_weights(weights: Any, count: int) -> list[list[float]]:
    """Weights of `count` things to mix: one list of them, or a list of such lists for a series.

    Raises:
        TypeError: it is no list.
        ValueError: there are none, or a list has another length.
    """
    if not isinstance(weights, (list, tuple)) and not hasattr(weights, "tolist"):
        raise TypeError(f"`weights` is {weights!r}; accepted is a list of numbers, or a list of such lists.")
    rows = weights.tolist() if hasattr(weights, "tolist") else list(weights)
    series = [list(row) for row in rows] if rows and isinstance(rows[0], (list, tuple)) else [rows]
    for row in series:
        if len(row) != count or not row:
            raise ValueError(
                f"`weights` has {len(row)} items; accepted is one for each of {count} in `images_and_prompts`, at"
                " least one."
            )
    return series


def count_images(prompts: int, images_per_prompt: int, rows: int) -> int:
    """Number of images for so many prompts and rows of embeddings; one prompt serves any number of rows."""
    if prompts == 1 and rows not in (1, images_per_prompt):
        return rows
    return prompts * images_per_prompt


def check_counts(**counts: int) -> None:
    """Raises TypeError or ValueError where a named number is no positive int."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` is {value!r}; accepted is a positive int.")
        check_at_least(name, value, 1)


def check_at_most(name: str, value: int, limit: int) -> None:
    """Raises ValueError where `value` is above `limit`."""
    if value > limit:
        raise ValueError(f"`{name}` is {value}; accepted is up to {limit}.")


def check_at_least(name: str, value: int, limit: int) -> None:
    """Raises ValueError where `value` is below `limit`."""
    if value < limit:
        raise ValueError(f"`{name}` is {value}; accepted is {limit} or more.")


def check_share(name: str, value: float) -> None:
    """Raises ValueError where `value` is not in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` is {value}; accepted is 0 to 1.")


def check_interval(name: str, value: Any) -> None:
    """Raises TypeError where `value` is no pair of numbers, ValueError where they are not 0 <= start < end <= 1."""
    told = f"`{name}` is {value!r}; accepted are two numbers, start and end, with 0 <= start < end <= 1."
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(isinstance(end, Real) for end in value):
        raise TypeError(told)
    if not 0.0 <= value[0] < value[1] <= 1.0:
        raise ValueError(told)


def check_choice(name: str, value: Any, accepted: Sequence[Any]) -> None:
    """Raises ValueError where `value` is not among the accepted ones."""
    if value not in accepted:
        raise ValueError(f"`{name}` is {value!r}; accepted is {' or '.join(map(repr, accepted))}.")


def check_generators(generator: torch.Generator | list[torch.Generator] | None, images: int) -> None:
    """Raises ValueError where a list of generators has not one for each image."""
    if isinstance(generator, list) and len(generator) != images:
        raise ValueError(f"`generator` is a list of {len(generator)}; accepted is one for each of {images} images.")


def check_shape(tensor: torch.Tensor, shape: Sequence[int], name: str) -> None:
    """Raises ValueError where a tensor has not exactly this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"`{name}` has the shape {list(tensor.shape)}; accepted is {list(shape)}.")


def check_strength(strength: float) -> None:
    """Raises ValueError where `strength` is not in [0, 1]."""
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"`strength` is {strength}; accepted is 0 (keep the picture) to 1 (forget it).")
