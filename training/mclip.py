"""M-CLIP, the text encoder of the UNets: taught by CLIP's, as the published one was."""

from __future__ import annotations

import torch
from diffusers.pipelines.kandinsky import MultilingualCLIP

from . import clip
from .captions import LANGUAGES
from .corpus import load_tokenizer
from .models import SPECIAL_TOKENS, make_mclip
from .stage import Context, Task, frozen, in_batches


def new_mclip(context: Context) -> MultilingualCLIP:
    """An M-CLIP for the tokenizer of the corpus."""
    return make_mclip(len(load_tokenizer(context.work, "mclip")))


def mask_of(ids: torch.Tensor) -> torch.Tensor:
    """1 at the tokens of a text, 0 at its padding."""
    return (ids != SPECIAL_TOKENS["pad_token_id"]).long()


def build(context: Context) -> Task:
    """Distillation: for a caption in any language the embedding that CLIP has for the English one."""
    model, corpus = new_mclip(context).to(context.device), context.corpus
    teacher = clip.text_half(context.result("clip")["model"], context)
    english = corpus.clip_ids[:, :, LANGUAGES.index("en")].flatten(0, 1)
    targets = in_batches(lambda ids: teacher(ids.long()).text_embeds, english)
    spread = targets.var(dim=0).mean()
    targets = targets.view(*corpus.clip_ids.shape[:2], -1)
    with torch.no_grad():
        empty = teacher(corpus.clip_empty[None].long()).text_embeds

    def loss(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        which, language = (
            torch.randint(count, rows.shape, generator=generator, device=rows.device)
            for count in corpus.mclip_ids.shape[1:3]
        )
        ids = torch.cat([corpus.mclip_ids[rows, which, language], corpus.mclip_empty[None]]).long()
        pooled, _ = model(ids, mask_of(ids))
        error = (pooled - torch.cat([targets[rows, which], empty])).square().mean() / spread
        return {"loss": error}

    return Task(model, loss)


def trained(context: Context) -> MultilingualCLIP:
    """The M-CLIP that its stage left."""
    return frozen(new_mclip(context), context.result("mclip")["model"], context.device)
