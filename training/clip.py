"""CLIP, text and vision: captions and pictures that belong together get embeddings that point the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from .corpus import load_tokenizer
from .models import make_clip
from .stage import Context, Task, frozen, in_batches


MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, of red, green and blue in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
MOST_LOGIT_SCALE = 4.6  # the original's limit, a factor of 100


def make(work: Path) -> CLIPModel:
    """A CLIP for the tokenizer in the work folder."""
    tokenizer = load_tokenizer(work, "clip")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return make_clip(len(tokenizer), {name: getattr(tokenizer, name) for name in names})


def build(clip: CLIPModel, context: Context) -> Task:
    """Contrastive learning, https://arxiv.org/abs/2103.00020, with captions in both languages.

    OpenAI's CLIP was shown little Russian, so the prior of the published models does little with a Russian prompt, and
    the M-CLIP has to do it alone. Here both know both.
    """
    corpus = context.corpus

    def loss(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = corpus.clip_ids[corpus.random_captions(rows, generator)].long()
        logits = clip(input_ids=ids, pixel_values=pixel_values(corpus.pictures[rows])).logits_per_image
        numbers = torch.arange(len(rows), device=rows.device)
        contrast = (F.cross_entropy(logits, numbers) + F.cross_entropy(logits.T, numbers)) / 2
        beyond = F.relu(clip.logit_scale - MOST_LOGIT_SCALE).square()
        right = (logits.argmax(dim=1) == numbers).float().mean()
        return {"loss": contrast + beyond, "contrast": contrast, "right": right}

    def finish() -> dict[str, torch.Tensor]:
        encoder = image_half(clip.state_dict(), context)
        embed = lambda rows: encoder(pixel_values(corpus.pictures[rows])).image_embeds  # noqa: E731
        embeds = in_batches(embed, torch.arange(len(corpus), device=context.device))
        nothing = torch.zeros_like(pixel_values(corpus.pictures[:1]))  # as the prior pipeline makes it
        with torch.no_grad():
            return {"image_embeds": embeds, "zero_embed": encoder(nothing).image_embeds}

    return Task(loss, finish)


def pixel_values(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures `[batch, 3, 64, 64]`, uint8, as CLIP's image processor hands them on."""
    mean, std = (torch.tensor(values, device=pictures.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pictures / 255 - mean) / std


def text_half(weights: dict[str, torch.Tensor], context: Context) -> Any:
    """The text encoder of a trained CLIP."""
    config: Any = make(context.work).config
    model = CLIPTextModelWithProjection(config.text_config)
    return frozen(model, _half(weights, "text_"), context.device)


def image_half(weights: dict[str, torch.Tensor], context: Context) -> Any:
    """The image encoder of a trained CLIP."""
    config: Any = make(context.work).config
    model = CLIPVisionModelWithProjection(config.vision_config)
    return frozen(model, _half(weights, "vision_", "visual_"), context.device)


def text_states(encoder: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings `[texts, width]` and states `[texts, 77, width]` of tokens, in half precision as there are many."""
    embeds, states = [], []
    with torch.no_grad():
        for some in ids.split(512):
            text = encoder(some.long())
            embeds.append(text.text_embeds)
            states.append(text.last_hidden_state.half())
    return torch.cat(embeds), torch.cat(states)


def _half(weights: dict[str, torch.Tensor], *starts: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights.items() if key.startswith(starts)}
