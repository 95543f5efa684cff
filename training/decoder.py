"""The two UNets: from noise to latents, given a text and the embedding of a picture; and with a part known."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from . import mclip
from .corpus import EMPTY
from .diffusion import STEPS, Diffusion, linear_betas
from .models import LATENT_SIZE
from .stage import Context, Task


# shares of conditions that are left out, for guidance
BOTH_DROPPED, TEXT_DROPPED, IMAGE_DROPPED = 0.1, 0.1, 0.1
EMBEDS_NOISE = 0.25  # relative to their deviation, added to embeddings: what the prior makes is not exact
NOTHING_KNOWN = 0.15  # share of masks that keep nothing


def build(unet: UNet2DConditionModel, context: Context) -> Task:
    """Prediction of noise and its variance; one with more input channels is shown a part of the picture."""
    corpus, clip = context.corpus, context.result("clip")
    (pooled, states), latents = mclip.text_states(context), context.result("movq")["latents"]
    embeds, zero_embed = clip["image_embeds"], clip["zero_embed"]
    spread = embeds.std(dim=0) * EMBEDS_NOISE
    diffusion = Diffusion(linear_betas(), context.device)

    def conditions(rows: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
        draw = {"generator": generator, "device": rows.device}
        which = torch.rand(rows.shape, **draw)
        no_text = which < BOTH_DROPPED + TEXT_DROPPED
        no_image = (which < BOTH_DROPPED) | (1 - which < IMAGE_DROPPED)
        captions = torch.where(no_text, EMPTY, corpus.random_captions(rows, generator))
        shaken = embeds[rows] + spread * torch.randn(embeds[rows].shape, **draw)
        image = torch.where(no_image[:, None], zero_embed, shaken)
        added = {"text_embeds": pooled[captions], "image_embeds": image}
        return {"encoder_hidden_states": states[captions].float(), "added_cond_kwargs": added}

    def loss(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        timesteps = torch.randint(STEPS, rows.shape, generator=generator, device=rows.device)
        noisy = shown = diffusion.noised(clean, noise, timesteps)
        if unet.config.in_channels > clean.shape[1]:
            keep = random_keep_masks(len(rows), generator)
            shown = torch.cat([noisy, clean * keep, keep], dim=1)
        predicted = unet(shown, timesteps, **conditions(rows, generator)).sample
        return diffusion.hybrid_loss(predicted, clean, noise, noisy, timesteps)

    return Task(loss)


def random_keep_masks(count: int, generator: torch.Generator) -> torch.Tensor:
    """Masks `[count, 1, 8, 8]`, 1 keeps: a box or an ellipse is to be painted, or all of it."""
    draw = {"generator": generator, "device": generator.device}
    # centre and half size of each, in latents: of rows, then of columns
    middle = torch.rand(2, count, 1, 1, **draw) * LATENT_SIZE
    half = 1 + torch.rand(2, count, 1, 1, **draw) * (LATENT_SIZE / 2)
    places = torch.arange(LATENT_SIZE, device=generator.device) + 0.5
    rows = (places.view(1, -1, 1) - middle[0]) / half[0]
    columns = (places.view(1, 1, -1) - middle[1]) / half[1]
    box, ellipse = torch.maximum(rows.abs(), columns.abs()), torch.hypot(rows, columns)
    round_ones = torch.rand(count, 1, 1, **draw) < 0.5
    painted = torch.where(round_ones, ellipse, box) < 1
    painted |= torch.rand(count, 1, 1, **draw) < NOTHING_KNOWN
    return 1.0 - painted[:, None].float()
