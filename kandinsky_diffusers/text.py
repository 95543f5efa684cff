"""Tokenising, shared by all text encoders."""

from __future__ import annotations

import html
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
            cut = tokenizer.decode(ids[length - 1 : -1])
            logger.warning(f"A prompt is longer than the {length} tokens that the text encoder takes; cut: {cut!r}")
    return tokens.input_ids, tokens.attention_mask


def clean_text(text: str) -> str:
    """A prompt as OpenAI's CLIP cleans it before tokenising: mended encoding, HTML entities twice, single spaces.

    (`basic_clean` and `whitespace_clean` in clip/simple_tokenizer.py of the original; the fast tokenizers do neither.)
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
