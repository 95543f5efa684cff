"""The prior: which embedding a picture of a text may have."""

from __future__ import annotations

import torch
from diffusers import PriorTransformer

from . import clip
from .corpus import EMPTY
from .diffusion import STEPS, Diffusion, cosine_betas
from .stage import Context, Task


TEXT_DROPPED = 0.1  # share of texts that are left out, for guidance


def build(prior: PriorTransformer, context: Context) -> Task:
    """Prediction of the clean embedding, https://arxiv.org/abs/2204.06125, section 2.2."""
    corpus, results = context.corpus, context.result("clip")
    text_encoder = clip.text_half(results["model"], context)
    embeds = results["image_embeds"]
    mean, std = embeds.mean(dim=0, keepdim=True), embeds.std(dim=0, keepdim=True)
    prior.clip_mean.copy_(mean)
    prior.clip_std.copy_(std)
    normalised = (embeds - mean) / std
    diffusion = Diffusion(cosine_betas(), context.device)
    text_embeds, text_states = clip.text_states(text_encoder, corpus.clip_ids)
    ends = corpus.clip_ids == text_encoder.config.eos_token_id
    masks = ends.cumsum(dim=1) - ends.long() == 0  # the padding is of the same token as the end

    def loss(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        dropped = torch.rand(rows.shape, generator=generator, device=rows.device) < TEXT_DROPPED
        captions = torch.where(dropped, EMPTY, corpus.random_captions(rows, generator))
        timesteps = torch.randint(STEPS, rows.shape, generator=generator, device=rows.device)
        clean = normalised[rows]
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        predicted = prior(
            diffusion.noised(clean, noise, timesteps),
            timesteps,
            text_embeds[captions],
            text_states[captions].float(),
            masks[captions],
        ).predicted_image_embedding
        return {"loss": (predicted - clean).square().mean()}

    return Task(loss)
