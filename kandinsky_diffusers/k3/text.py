"""The text side of Kandinsky 3.x: prompts, the states of T5's encoder, and the context that the UNet attends to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from ..inputs import as_negatives, as_prompts, check_alternatives, check_shape
from ..options import PromptOptions
from ..text import tokenize, warn_of_cut


logger = logging.get_logger(__name__)

TEXT_LENGTH = 128


class TextStates(PromptOptions, total=False):
    """What the pipelines take instead of prompts, see their `encode_prompt`; and what they take with them."""

    prompt_embeds: Annotated[torch.Tensor | None, None]
    negative_prompt_embeds: Annotated[torch.Tensor | None, None]
    attention_mask: Annotated[torch.Tensor | None, None]
    negative_attention_mask: Annotated[torch.Tensor | None, None]


@dataclass(frozen=True)
class TextInputs:
    """Prompts and negative prompts of one call, as text or as states of the text encoder.

    Args:
        prompt: one or several; None with `prompt_embeds`.
        negative_prompt: one for all, or one for each prompt; None is not the empty one, but no text at all.
        prompt_embeds: states `[prompts, tokens, width]`, before the projection.
        negative_prompt_embeds: the same.
        attention_mask: `[prompts, tokens]`, 1 at tokens.
        negative_attention_mask: the same.

    Raises:
        TypeError: a text is no str or list of str.
        ValueError: text and states are both given, or for the prompt neither; states without their mask or the other
            way round; shapes or numbers do not fit.
    """

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    negative_attention_mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.prompt is None and self.prompt_embeds is None:
            raise ValueError("`prompt` is missing; accepted is a str, a list of str, or `prompt_embeds` instead.")
        for sign in ("", "negative_"):
            states, mask = (getattr(self, f"{sign}{name}") for name in ("prompt_embeds", "attention_mask"))
            named = {f"{sign}prompt_embeds": states, f"{sign}attention_mask": mask}
            check_alternatives(f"{sign}prompt", getattr(self, f"{sign}prompt"), named)
            if states is not None:
                check_shape(mask, states.shape[:2], f"{sign}attention_mask")
        if self.prompt_embeds is not None and self.negative_prompt_embeds is not None:
            rows = len(self.negative_prompt_embeds)
            wanted = (rows if rows == 1 else self.count, *self.prompt_embeds.shape[1:])
            check_shape(self.negative_prompt_embeds, wanted, "negative_prompt_embeds")
        as_negatives(self.negative_prompt, self.count)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> TextInputs:
        """Those among the arguments of a call."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(as_prompts(self.prompt)) if self.prompt_embeds is None else len(self.prompt_embeds)

    @property
    def prompts(self) -> list[str]:
        """The prompts."""
        return as_prompts(self.prompt)

    @property
    def negatives(self) -> list[str]:
        """The negative prompts, one for each prompt."""
        return as_negatives(self.negative_prompt, self.count)

    @property
    def needs_encoder(self) -> bool:
        """Whether there is any text to encode."""
        return self.prompt is not None or self.negative_prompt is not None


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizer and T5 encoder of a pipeline, and whether they are used as the original uses them, or as stock does.

    The original leaves the states of padding as they are, and repeats for a negative prompt the mask of the prompt;
    stock sets the states of padding to zero, and gives a negative prompt a mask of its own.

    Args:
        tokenizer: of T5.
        model: T5's encoder.
        device: where it runs.
        as_original: as the original, or as stock.
    """

    tokenizer: Any
    model: Any
    device: torch.device
    as_original: bool

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States `[texts, tokens, width]` and mask of prompts, cut to one token of padding after the longest."""
        ids, mask = tokenize(self.tokenizer, texts, TEXT_LENGTH)
        states, mask = self._run(ids, mask.to(self.device))
        kept = int(mask.sum(dim=1).max()) + 1
        states, mask = states[:, :kept], mask[:, :kept]
        return (states if self.as_original else states * mask.unsqueeze(2)), mask

    def encode_negative(self, texts: list[str], mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States and mask of negative prompts, which have as many tokens as the states of the prompts.

        Args:
            texts: one for each prompt.
            mask: of the prompts, `[texts, tokens]`.
        """
        if self.as_original:
            ids = self._negative_ids(texts, mask.sum(dim=1).tolist())
            own_mask = fitted(mask, TEXT_LENGTH)
        else:
            ids, own_mask = tokenize(self.tokenizer, texts, TEXT_LENGTH)
        states, own_mask = self._run(ids, own_mask.to(self.device))
        states, own_mask = fitted(states, mask.shape[1]), fitted(own_mask, mask.shape[1])
        return (states if self.as_original else states * own_mask.unsqueeze(2)), own_mask

    def _run(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.model(ids.to(self.device), attention_mask=mask).last_hidden_state
        finite = states.isfinite().all(dim=2).all(dim=1)
        if bool(finite.all()):
            return states, mask
        # as in kandinsky3/condition_encoders.py of the original of 3.0
        logger.warning("The text encoder has overflowed on a prompt, which is taken for no text; use float32.")
        return states.masked_fill(~finite[:, None, None], 0.0), mask.masked_fill(~finite[:, None], 0)

    def _negative_ids(self, texts: list[str], counts: list[int]) -> torch.Tensor:
        """Cut to the number of tokens of the prompt, the last one becoming the end of the text.

        (`T5TextConditionProcessor` in kandinsky3/condition_processors.py of the original.)
        """
        ids, mask = tokenize(self.tokenizer, texts, TEXT_LENGTH)
        for row, own, count in zip(ids, mask.sum(dim=1).tolist(), counts, strict=True):
            if own > count:
                warn_of_cut(
                    self.tokenizer, row[count - 1 : own - 1].tolist(), "A negative prompt is longer than its prompt"
                )
                row[count - 1] = self.tokenizer.eos_token_id
                row[count:] = self.tokenizer.pad_token_id
        return ids


def no_text(states: torch.Tensor, mask: torch.Tensor, has_null_embedding: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """States and mask that stand for no text beside given ones.

    Zeros, with nothing to attend to; or, for a UNet with a null embedding, with one token to attend to, whose place
    this embedding takes (see [`context_of`]).
    """
    empty = torch.zeros_like(mask)
    empty[:, :1] = int(has_null_embedding)
    return torch.zeros_like(states), empty


def context_of(unet: Any, states: torch.Tensor, mask: torch.Tensor, images: int) -> dict[str, torch.Tensor]:
    """What a UNet with a null embedding attends to: `context`, `context_mask` and `context_lengths`.

    The states of the text encoder are projected, and what is padding is zero then (`T5TextConditionEncoder` in
    kandinsky3/condition_encoders.py of the original). States that are zero, which a text encoder does not give, mean
    something else: where they are attended to, the null embedding; as padding, that they are projected like the rest,
    as stock's pipelines do with the zeros that they put there. Where nothing is attended to, the context is zero.

    Args:
        unet: projects the states.
        states: `[images or 2 * images, tokens, width]`, the unconditional half first.
        mask: `[images or 2 * images, tokens]`, 1 at tokens.
        images: how many are drawn.
    """
    blank, attended = (states == 0).all(dim=2), mask != 0
    null = blank & attended
    zero = (~attended & ~blank) | ~attended.any(dim=1, keepdim=True) | (null.any(dim=1, keepdim=True) & ~null)
    context = unet(project=True, encoder_hidden_states=states).masked_fill(zero[..., None], 0.0)
    context = torch.where(null[..., None], unet(project=True), context)
    lengths = pooled_lengths(mask, images, uncut=blank[-images:, -1])
    return {"context": context, "context_mask": mask, "context_lengths": lengths}


def stock_context_of(states: torch.Tensor, mask: torch.Tensor, images: int) -> dict[str, torch.Tensor]:
    """The same for a UNet without a null embedding, which projects the states itself, all of them, as in stock.

    `context_lengths` are left out where each sample is as long as all.
    """
    uncut = torch.full((images,), True, device=mask.device)
    lengths = pooled_lengths(mask, images, uncut)
    parts = {"context": states, "context_mask": mask, "context_lengths": lengths}
    if bool((lengths == states.shape[1]).all()):
        del parts["context_lengths"]
    return parts


def pooled_lengths(mask: torch.Tensor, images: int, uncut: torch.Tensor) -> torch.Tensor:
    """How many rows of each sample are pooled, `[images or 2 * images]`: its tokens and one of padding.

    So a sample does not depend on how long its neighbours are. An unconditional sample pools over as many rows as the
    conditional one. All rows count where states were given with more padding than this and it is `uncut`.

    Args:
        mask: `[images or 2 * images, tokens]`, 1 at tokens.
        images: how many are drawn.
        uncut: `[images]`, whether padding counts.
    """
    rows, tokens = mask.shape[1], (mask[-images:] != 0).sum(dim=1)
    uncut = uncut & (rows > tokens.max() + 1)
    lengths = torch.where(uncut, rows, (tokens + 1).clamp(max=rows))
    return lengths.repeat(len(mask) // images)


def fitted(rows: torch.Tensor, length: int) -> torch.Tensor:
    """`rows` `[batch, tokens, ...]` cut, or filled up with zeros, to `length` tokens."""
    missing = max(length - rows.shape[1], 0)
    return F.pad(rows[:, :length], (*(0, 0) * (rows.ndim - 2), 0, missing))
