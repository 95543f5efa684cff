"""The models around the decoder's UNet: prior, MoVQ and KandiSuperRes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UnCLIPScheduler
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_prior import (
    KandinskyV22PriorPipeline as StockPriorPipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from kandinsky_diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline, KandiSuperResPipeline
from kandinsky_diffusers.superres.windows import Windows

from .cases import COMPILED, OPTIMIZED, OURS, STOCK, Case, Outcome, Run, Workload
from .drawing import NO_TEXT_ENCODER, ddpm_22, optimized
from .models import own_copy, twin


TILED = "ours tiled"
EXACT = "ours exact_reference"
PROMPT_LENGTHS = (2, 20)  # tokens of the empty prompt, and of one


# ------------------------------------------------------------------------------------------------ prior
class _GivenTexts:
    """Mixed in before a prior pipeline: embeddings of texts are given, and that of no picture is zero."""

    given_texts: tuple[torch.Tensor, ...]

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return self.given_texts

    encode_prompt = _encode_prompt

    def get_zero_embed(self, batch_size: int = 1, device: Any = None) -> torch.Tensor:
        return torch.zeros_like(self.given_texts[0][:batch_size])


class StockPrior(_GivenTexts, StockPriorPipeline):
    """Stock's, without its text and image encoder."""


class OursPrior(_GivenTexts, KandinskyV22PriorPipeline):
    """Ours, without its text and image encoder."""


def clip_stand_ins(case: Case) -> dict[str, Any]:
    """A tiny text and image encoder, which are never run; pipelines read their dtype."""
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    text = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=8, **small))
    image = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=28, patch_size=14, **small))
    models = {"text_encoder": text, "image_encoder": image}
    return {name: model.to(case.device, case.torch_dtype) for name, model in models.items()}


def prior_conditions(case: Case, prior: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pooled states, hidden states and mask for a guided batch, the unconditional half first."""
    width, tokens, rows = prior.config.embedding_dim, prior.config.num_embeddings, 2 * case.batch
    lengths = torch.tensor(PROMPT_LENGTHS, device=case.device).repeat_interleave(case.batch)
    mask = torch.arange(tokens, device=case.device) < lengths[:, None]
    return case.randn(rows, width), case.randn(rows, tokens, width), mask


def unclip() -> UnCLIPScheduler:
    """As published."""
    return UnCLIPScheduler(
        variance_type="fixed_small_log", clip_sample=True, clip_sample_range=10.0, prediction_type="sample"
    )


def prior_workload(case: Case) -> Workload:
    """Image embeddings for texts, with guidance."""
    prior = case.model("prior")
    given = prior_conditions(case, prior)
    latents = case.randn(case.batch, prior.config.embedding_dim)

    def make(cls: Any, compiled: bool = False, optimize: bool = False) -> Run:
        model = own_copy(prior) if optimize else twin(prior)
        parts = {"tokenizer": None, "image_processor": None, "scheduler": unclip(), **clip_stand_ins(case)}
        pipe = cls(prior=model, **parts)
        pipe.given_texts = given
        pipe.set_progress_bar_config(disable=True)
        if compiled:
            pipe.prior.compile()
        if optimize:
            optimized(pipe)
        prompts = [""] * case.batch

        def run(steps: int | None) -> Outcome:
            embeds = pipe(
                prompts, num_inference_steps=steps, latents=latents.clone(), generator=case.generator()
            ).image_embeds
            return Outcome(embeds)

        return run

    ways = {
        STOCK: partial(make, StockPrior),
        COMPILED: partial(make, StockPrior, compiled=True),
        OURS: partial(make, OursPrior),
        OPTIMIZED: partial(make, OursPrior, optimize=True),
    }
    note = f"With guidance. {NO_TEXT_ENCODER}"
    return Workload(ways, note=note, fewest_steps=2, copied=[prior])


# ------------------------------------------------------------------------------------------------ MoVQ
def movq_workload(case: Case, name: str) -> Workload:
    """Decoding latents."""
    movq = case.model(name)
    latents = case.randn(case.batch, 4, case.size // 8, case.size // 8)

    def stock(compiled: bool) -> Run:
        model = twin(movq)
        decode: Callable[..., Any] = torch.compile(model.decode) if compiled else model.decode
        return _no_steps(lambda: decode(latents, force_not_quantize=True).sample)

    def ours(tiled: bool = False, optimize: bool = False) -> Run:
        model = own_copy(movq) if optimize else twin(movq)
        pipe = KandinskyV22Pipeline(twin(case.stand_in("unet-2.2")), ddpm_22(), model)
        if tiled:
            pipe.enable_movq_tiling()
        if optimize:
            optimized(pipe)
        return _no_steps(lambda: pipe.decode_latents(latents, case.size, case.size))

    ways = {
        STOCK: partial(stock, compiled=False),
        COMPILED: partial(stock, compiled=True),
        OURS: ours,
        TILED: partial(ours, tiled=True),
        OPTIMIZED: partial(ours, optimize=True),
    }
    note = "Tiles of 1024 pixels, as by default; up to this size tiled is whole."
    return Workload(ways, note=note, copied=[movq])


def _no_steps(decode: Callable[[], torch.Tensor]) -> Run:
    @torch.no_grad()
    def run(steps: int | None) -> Outcome:
        return Outcome(decode())

    return run


# ------------------------------------------------------------------------------------------------ KandiSuperRes
def _superres(case: Case, prepare: Callable[[Any], Run]) -> Workload:
    unet = case.model("unet-superres")

    def make(exact: bool = False, optimize: bool = False) -> Run:
        solver = DPMSolverMultistepScheduler(beta_schedule="linear", prediction_type="sample")
        pipe = KandiSuperResPipeline(own_copy(unet) if optimize else twin(unet), solver)
        pipe.set_progress_bar_config(disable=True)
        pipe.exact_reference(exact)
        return prepare(optimized(pipe) if optimize else pipe)

    ways = {EXACT: partial(make, exact=True), OURS: make, OPTIMIZED: partial(make, optimize=True)}
    note = "Stock has none: ours against itself without savings."
    return Workload(ways, reference=EXACT, note=note, copied=[unet])


def superres_window(case: Case) -> Workload:
    """One window through the UNet."""
    pixels = case.randn(2, 1, 3, case.size, case.size)
    windows = Windows(case.size, case.size, 1)
    timestep = torch.tensor(999, device=case.device)

    def prepare(pipe: Any) -> Run:
        return _no_steps(lambda: pipe.predict_sample(pixels[0], timestep, {"image": pixels[1]}, windows))

    return _superres(case, prepare)


def superres_run(case: Case) -> Workload:
    """A picture of a quarter of `size`, enlarged to it."""
    side = case.size // 4
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)

    def prepare(pipe: Any) -> Run:
        def run(steps: int | None) -> Outcome:
            images = pipe(picture, num_inference_steps=steps, output_type="pt", canvas_device=case.device).images
            return Outcome(images)

        return run

    return _superres(case, prepare)
