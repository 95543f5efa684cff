"""The prior: which embedding a picture of a text may have."""

from __future__ import annotations

import torch

from . import clip
from .diffusion import STEPS, Diffusion, cosine_betas
from .models import make_prior
from .stage import Context, Task


TEXT_DROPPED = 0.1  # share of texts that are left out, for guidance


def build(context: Context) -> Task:
    """Prediction of the clean embedding, https://arxiv.org/abs/2204.06125, section 2.2."""
    corpus, results = context.corpus, context.result("clip")
    text_encoder = clip.text_half(results["model"], context)
    embeds = results["image_embeds"]
    mean, std = embeds.mean(dim=0, keepdim=True), embeds.std(dim=0, keepdim=True)
    prior = make_prior().to(context.device)
    prior.clip_mean.copy_(mean)
    prior.clip_std.copy_(std)
    normalised = (embeds - mean) / std
    diffusion = Diffusion(cosine_betas(), context.device)
    last = text_encoder.config.eos_token_id

    def loss(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = corpus.texts(corpus.clip_ids, rows, generator)
        dropped = torch.rand(rows.shape, generator=generator, device=rows.device) < TEXT_DROPPED
        ids = torch.where(dropped[:, None], corpus.clip_empty.long(), ids)
        with torch.no_grad():
            text = text_encoder(ids)
        before_end = (ids == last).cumsum(dim=1) <= 1  # the padding is of the same token as the end
        mask = before_end.logical_and((ids != last).logical_or((ids == last).cumsum(dim=1) == 1))
        timesteps = torch.randint(STEPS, rows.shape, generator=generator, device=rows.device)
        clean = normalised[rows]
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        predicted = prior(
            diffusion.noised(clean, noise, timesteps), timesteps, text.text_embeds, text.last_hidden_state, mask
        ).predicted_image_embedding
        return {"loss": (predicted - clean).square().mean()}

    return Task(prior, loss)
