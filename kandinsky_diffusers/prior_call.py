"""What a prior pipeline is called with, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image
import torch

from .inputs import as_negatives, beautified


@dataclass(frozen=True)
class PriorCall:
    """One call of a prior pipeline, checked.

    Args:
        arguments: of `__call__`, by their names; `call[name]` is one of them.
        texts: what the prior turns into embeddings: the prompts, and after them the negative prompts if there are any.
        unconditional: the texts of the prior's own unconditional half, one for each of `texts`.
        embeddings: how many embeddings are made, without the negative ones.
        halves: 2 where embeddings of negative prompts are made too.
        scale: of the guidance; a number, or one for each embedding.
        latents: the noise to start from, `[halves * embeddings, width]`, where it is given.
    """

    arguments: Mapping[str, Any]
    texts: list[str]
    unconditional: list[str]
    embeddings: int
    halves: int
    scale: float | torch.Tensor
    latents: torch.Tensor | None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def with_beautified_prompts(self) -> PriorCall:
        """The same call with better prompts, if it has a `prompt_beautifier`."""
        beautifier = self["prompt_beautifier"]
        if beautifier is None:
            return self
        count = len(self.texts) // self.halves
        return replace(self, texts=beautified(self.texts[:count], beautifier) + self.texts[count:])


def texts_of(prompts: list[str], negative: Any, negative_prior: Any) -> tuple[list[str], list[str]]:
    """The texts that the prior turns into embeddings, and those of its unconditional half."""
    unconditional = as_negatives(negative_prior, len(prompts), "negative_prior_prompt")
    if negative is None:
        return prompts, unconditional
    negatives = as_negatives(negative, len(prompts))
    if negative_prior is None:
        unconditional = negatives
    return prompts + negatives, unconditional * 2


def as_scale(guidance_scale: float | Sequence[float], embeddings: int) -> float | torch.Tensor:
    """A number, or one for each of so many embeddings, as `[embeddings]`.

    Raises:
        ValueError: there is another number of them.
    """
    if isinstance(guidance_scale, (int, float)):
        return float(guidance_scale)
    scale = torch.as_tensor(guidance_scale)
    if scale.shape != (embeddings,):
        raise ValueError(
            f"`guidance_scale` has the shape {list(scale.shape)}; accepted is one number or {embeddings}."
        )
    return scale


def check_mixable(items: Sequence[Any], name: str = "images_and_prompts") -> None:
    """Raises TypeError where an item is neither a prompt, nor a PIL picture, nor a tensor."""
    for item in items:
        if not isinstance(item, (str, PIL.Image.Image, torch.Tensor)):
            raise TypeError(f"`{name}` has a {type(item).__name__}; accepted are str, PIL pictures and tensors.")
