"""The text side of Kandinsky 2.0: M-CLIP and mT5 read the same prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from .. import mclip
from ..mclip import TEXT_LENGTH
from ..text import tokenize


class TextStates(mclip.TextStates, total=False):
    """What the pipelines take instead of prompts, see their `encode_prompt`; and what they take with them."""

    prompt_embeds_2: Annotated[torch.Tensor | None, None]
    negative_prompt_embeds_2: Annotated[torch.Tensor | None, None]


@dataclass(frozen=True)
class TextInputs(mclip.TextInputs):
    """As for M-CLIP alone, see [`mclip.TextInputs`], and:

    Args:
        prompt_embeds_2: hidden states `[prompts, 77, width]` of mT5.
        negative_prompt_embeds_2: hidden states `[1 or prompts, 77, width]` of mT5.
    """

    STATES: ClassVar[tuple[str, ...]] = (*mclip.TextInputs.STATES, "prompt_embeds_2")

    prompt_embeds_2: torch.Tensor | None = None
    negative_prompt_embeds_2: torch.Tensor | None = None


def encode_with_mt5(text_encoder: Any, tokenizer: Any, texts: list[str], device: torch.device) -> torch.Tensor:
    """Hidden states `[texts, 77, width]` of mT5; those of padding are kept, and the UNet sees them."""
    ids, mask = tokenize(tokenizer, texts, TEXT_LENGTH)
    return text_encoder(ids.to(device), attention_mask=mask.to(device)).last_hidden_state
