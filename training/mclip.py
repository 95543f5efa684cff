"""M-CLIP, the text encoder of the UNets: taught by CLIP's, as the published one was."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.pipelines.kandinsky import MultilingualCLIP

from . import clip
from .corpus import EMPTY, load_tokenizer
from .models import SPECIAL_TOKENS, make_mclip
from .stage import Context, Task, frozen


def make(work: Path) -> MultilingualCLIP:
    """An M-CLIP for the tokenizer in the work folder."""
    return make_mclip(len(load_tokenizer(work, "mclip")))


def mask_of(ids: torch.Tensor) -> torch.Tensor:
    """1 at the tokens of a text, 0 at its padding."""
    return (ids != SPECIAL_TOKENS["pad_token_id"]).long()


def build(model: MultilingualCLIP, context: Context) -> Task:
    """Distillation: for a caption in any language the embedding that CLIP has for the English one."""
    corpus = context.corpus
    teacher = clip.text_half(context.result("clip")["model"], context)
    targets, _ = clip.text_states(teacher, corpus.clip_ids[corpus.english])
    spread = targets.var(dim=0).mean()

    def loss(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        captions = corpus.random_captions(rows, generator)
        captions[0] = EMPTY
        ids = corpus.mclip_ids[captions].long()
        pooled, _ = model(ids, mask_of(ids))
        return {"loss": (pooled - targets[captions]).square().mean() / spread}

    return Task(loss)


def text_states(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """What the M-CLIP that its stage left says of all captions: pooled states `[captions, width]`, and the states
    `[captions, 77, width]`, in half precision as there are many.
    """
    model = frozen(make(context.work), context.result("mclip")["model"], context.device)
    pooled, states = [], []
    with torch.no_grad():
        for some in context.corpus.mclip_ids.split(512):
            one, all_of_them = model(some.long(), mask_of(some))
            pooled.append(one)
            states.append(all_of_them.half())
    return torch.cat(pooled), torch.cat(states)
