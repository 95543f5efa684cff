"""Half precision must cost no more than it costs stock: distances from float32, over 32 samples on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.kandinsky2_2 import KandinskyV22Pipeline as StockKandinskyV22Pipeline

from kandinsky_diffusers import KandinskyV22Pipeline
from kandinsky_diffusers.components import adopt
from kandinsky_diffusers.prior import without_padding
from tests.support import tiny22


SAMPLES = 32
ALLOWED = 1.1  # times stock's distance
Predict = Callable[[torch.dtype], torch.Tensor]


def distance(predict: Predict, dtype: torch.dtype, exact: torch.Tensor) -> float:
    return (predict(dtype).double() - exact.double()).square().mean().sqrt().item()


def check(stock: Predict, ours: Predict, dtype: torch.dtype) -> None:
    exact = stock(torch.float32)
    of_stock, of_ours = (distance(predict, dtype, exact) for predict in (stock, ours))
    assert of_stock > 0
    assert of_ours <= ALLOWED * of_stock


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@torch.no_grad()
def test_the_prior_with_its_prefix(dtype: torch.dtype) -> None:
    model = tiny22.prior_components()["prior"]
    width, tokens = model.config.embedding_dim, model.config.num_embeddings
    conditions = {
        "proj_embedding": torch.randn(SAMPLES, width),
        "encoder_hidden_states": torch.randn(SAMPLES, tokens, width),
        "attention_mask": torch.arange(tokens) < torch.randint(1, tokens, (SAMPLES, 1)),
    }
    noisy = torch.randn(SAMPLES, width)

    def predict(dtype: torch.dtype, with_prefix: bool) -> torch.Tensor:
        prior: Any = deepcopy(model).to(dtype)
        known: Any = {name: rows.to(dtype) if rows.is_floating_point() else rows for name, rows in conditions.items()}
        if with_prefix:
            prior = adopt(prior)
            known = {"prefix": prior(prefill=True, **without_padding(known))}
        return torch.stack([prior(noisy.to(dtype), t, **known)[0] for t in (980, 500, 20)])

    check(lambda dtype: predict(dtype, False), lambda dtype: predict(dtype, True), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_drawing_and_decoding(dtype: torch.dtype) -> None:
    parts = tiny22.decoder_components()
    width = parts["unet"].config.encoder_hid_dim
    embeds = torch.randn(2, SAMPLES, width)
    latents = torch.randn(SAMPLES, 4, 8, 8)

    def draw(dtype: torch.dtype, cls: type) -> torch.Tensor:
        models = {name: deepcopy(parts[name]).to(dtype) for name in ("unet", "movq")}
        pipe = cls(scheduler=DDIMScheduler.from_config(parts["scheduler"].config, clip_sample=False), **models)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            image_embeds=embeds[0].to(dtype),
            negative_image_embeds=embeds[1].to(dtype),
            latents=latents.to(dtype),
            num_inference_steps=2,
            height=64,
            width=64,
            output_type="np",
        ).images
        return torch.from_numpy(images)

    check(lambda dtype: draw(dtype, StockKandinskyV22Pipeline), lambda dtype: draw(dtype, KandinskyV22Pipeline), dtype)
