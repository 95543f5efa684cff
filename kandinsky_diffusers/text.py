"""Tokenising, shared by all text encoders."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import ftfy
import torch
from diffusers.utils import logging


logger = logging.get_logger(__name__)


def tokenize(tokenizer: Any, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 `[len(texts), length]`, padded or cut to `length`.

    What is cut from a long text is named in a warning.
    """
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    for ids in tokenizer(texts, truncation=False, verbose=False).input_ids:
        if len(ids) > length:
            warn_of_cut(
                tokenizer, ids[length - 1 : -1], f"A prompt is longer than the {length} tokens of the text encoder"
            )
    return tokens.input_ids, tokens.attention_mask


def warn_of_cut(tokenizer: Any, ids: Sequence[int], reason: str) -> None:
    """Log the text of token ids that are left out, and why."""
    logger.warning(f"{reason}; cut: {tokenizer.decode(ids)!r}")


def clean_text(text: str) -> str:
    """A prompt as OpenAI's CLIP cleans it before tokenising: mended encoding, HTML entities twice, single spaces.

    (`basic_clean` and `whitespace_clean` in clip/simple_tokenizer.py of the original; the fast tokenizers do neither.)
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
