"""The text side of Kandinsky 2.1's decoder: M-CLIP, a multilingual text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypedDict

import torch

from ..inputs import as_negatives, as_prompts, check_alternatives
from ..text import tokenize


TEXT_LENGTH = 77


class TextStates(TypedDict, total=False):
    """What the decoders take instead of prompts, see their `encode_prompt`."""

    prompt_embeds: Annotated[torch.Tensor | None, None]
    negative_prompt_embeds: Annotated[torch.Tensor | None, None]
    pooled_prompt_embeds: Annotated[torch.Tensor | None, None]
    negative_pooled_prompt_embeds: Annotated[torch.Tensor | None, None]


@dataclass(frozen=True)
class TextInputs:
    """Prompts and negative prompts of one call, as text or as states of the text encoder.

    Args:
        prompt: one or several; None with `prompt_embeds`.
        negative_prompt: one for all, or one for each prompt; None is the empty one.
        prompt_embeds: hidden states `[prompts, 77, width]`.
        negative_prompt_embeds: hidden states `[1 or prompts, 77, width]`.
        pooled_prompt_embeds: pooled states `[prompts, image width]`.
        negative_pooled_prompt_embeds: pooled states `[1 or prompts, image width]`.

    Raises:
        TypeError: a text is no str or list of str.
        ValueError: text and states are both given, or for the prompt neither; states without their pooled ones or the
            other way round; or a number of negatives that fits neither one nor all prompts.
    """

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.prompt is None and self.prompt_embeds is None:
            raise ValueError("`prompt` is missing; accepted is a str, a list of str, or `prompt_embeds` instead.")
        for sign in ("", "negative_"):
            states = {name: getattr(self, name) for name in (f"{sign}prompt_embeds", f"{sign}pooled_prompt_embeds")}
            check_alternatives(f"{sign}prompt", getattr(self, f"{sign}prompt"), states)
        as_negatives(self.negative_prompt, self.count)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> TextInputs:
        """Those among the arguments of a call."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(as_prompts(self.prompt)) if self.prompt_embeds is None else len(self.prompt_embeds)

    def positive(self, encode: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden and pooled states of the prompts, made by `encode(list of str)` where they are not given."""
        if self.prompt_embeds is not None and self.pooled_prompt_embeds is not None:
            return self.prompt_embeds, self.pooled_prompt_embeds
        return encode(as_prompts(self.prompt))

    def negative(self, encode: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden and pooled states of the negative prompts."""
        if self.negative_prompt_embeds is not None and self.negative_pooled_prompt_embeds is not None:
            return self.negative_prompt_embeds, self.negative_pooled_prompt_embeds
        return encode(as_negatives(self.negative_prompt, self.count))


def encode_texts(
    text_encoder: Any, tokenizer: Any, texts: list[str], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[texts, 77, width]` and pooled states `[texts, image width]` of M-CLIP.

    The pooled state is a linear map of the mean over real tokens; the hidden states of padding are kept, and the UNet
    sees them (kandinsky2/model/text_encoders.py of the original).
    """
    ids, mask = tokenize(tokenizer, texts, TEXT_LENGTH)
    pooled, hidden = text_encoder(input_ids=ids.to(device), attention_mask=mask.to(device))
    return hidden, pooled
