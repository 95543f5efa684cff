"""Decoders: from embeddings to latents or pictures, with the pipelines of stock and ours.

Text encoders are left out: both pipelines are given embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.pipelines.kandinsky.pipeline_kandinsky import KandinskyPipeline as StockKandinskyPipeline
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import KandinskyV22Pipeline as StockKandinskyV22Pipeline
from diffusers.pipelines.kandinsky3.pipeline_kandinsky3 import Kandinsky3Pipeline as StockKandinsky3Pipeline

from kandinsky_diffusers import Kandinsky3Pipeline, KandinskyPipeline, KandinskyV22Pipeline
from kandinsky_diffusers.k21.variants import BETAS
from kandinsky_diffusers.schedulers import Kandinsky3AncestralScheduler, Kandinsky3FlashScheduler

from .cases import COMPILED, OPTIMIZED, OURS, STOCK, Case, Outcome, Run, Workload
from .measure import StepClock
from .models import own_copy, twin


TEXT_TOKENS = 77  # of 2.1's text encoder
PROMPT_TOKENS = 32  # of the prompt given to 3.x
NO_TEXT_ENCODER = "Embeddings are given, text encoders are left out."
BETAS_2 = {"beta_start": BETAS[0], "beta_end": BETAS[1], "beta_schedule": "linear", "steps_offset": 1}


class StockWithGivenTexts(StockKandinskyPipeline):
    """Stock's 2.1, which does not take embeddings of texts, with those it is given."""

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        return self.given_texts


def ddim_21() -> DDIMScheduler:
    """As published."""
    return DDIMScheduler(**BETAS_2, clip_sample=False, set_alpha_to_one=False)


def ddpm_22() -> DDPMScheduler:
    """As published."""
    return DDPMScheduler(**BETAS_2, clip_sample=True)


def ddpm_30() -> DDPMScheduler:
    """Stock's, on the schedule of 3.x."""
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2")


@dataclass(frozen=True)
class Family:
    """How a decoder is built and called.

    Args:
        unet: its name in `models.MODELS`.
        movq: likewise.
        stock: makes stock's pipeline of UNet, scheduler and MoVQ.
        ours: likewise.
        inputs: embeddings for both, from a case and a UNet.
        scheduler: makes one for ours.
        stock_scheduler: for stock, where it is another one.
        stock_unet: the name of another UNet for stock, where it cannot take ours.
        callback: the argument that both take a callback by.
        call: more arguments for both.
        comparable: whether both compute the same.
        note: what a reader of the figures has to know.
    """

    unet: str
    movq: str
    stock: Callable[..., Any]
    ours: Callable[..., Any]
    inputs: Callable[[Case, Any], tuple[dict[str, Any], dict[str, Any]]]
    scheduler: Callable[[], Any]
    stock_scheduler: Callable[[], Any] | None = None
    stock_unet: str | None = None
    callback: str = "callback_on_step_end"
    call: Mapping[str, Any] | None = None
    comparable: bool = True
    note: str = ""


# ------------------------------------------------------------------------------------------------ building
def _stock_21(unet: Any, scheduler: Any, movq: Any) -> Any:
    return StockWithGivenTexts(None, None, scheduler=scheduler, unet=unet, movq=movq)  # pyright: ignore


def _ours_21(unet: Any, scheduler: Any, movq: Any) -> Any:
    return KandinskyPipeline(None, None, unet, scheduler, movq)  # pyright: ignore


def _stock_3(unet: Any, scheduler: Any, movq: Any) -> Any:
    return StockKandinsky3Pipeline(None, None, unet, scheduler, movq)  # pyright: ignore


def _ours_3(unet: Any, scheduler: Any, movq: Any) -> Any:
    pipe = Kandinsky3Pipeline(None, None, unet, scheduler, None)  # pyright: ignore
    pipe.movq = movq  # in its own dtype; given at first, it would be made float32, and with it stock's
    return pipe


# ------------------------------------------------------------------------------------------------ inputs
def _embeds(case: Case, width: int) -> dict[str, Any]:
    positive, negative = case.randn(2, case.batch, width)
    return {"image_embeds": positive, "negative_image_embeds": negative}


def inputs_22(case: Case, unet: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Image embeddings."""
    given = _embeds(case, unet.config.encoder_hid_dim)
    return given, given


def inputs_21(case: Case, unet: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Image embeddings, and states of the text encoder, which ours takes as arguments."""
    width = unet.config.cross_attention_dim
    states = case.randn(2, case.batch, TEXT_TOKENS, unet.config.encoder_hid_dim)
    pooled = case.randn(2, case.batch, width)
    texts = {"prompt_embeds": states[1], "pooled_prompt_embeds": pooled[1]}
    negative = {"negative_prompt_embeds": states[0], "negative_pooled_prompt_embeds": pooled[0]}
    embeds = _embeds(case, width)
    given = (pooled.flatten(0, 1), states.flatten(0, 1), None)
    return {**embeds, "prompt": [""] * case.batch, "given_texts": given}, {**embeds, **texts, **negative}


def inputs_3(case: Case, unet: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """States of the text encoder, cut one after the last token as the pipelines do."""
    states = case.randn(case.batch, PROMPT_TOKENS + 1, unet.config.encoder_hid_dim)
    mask = torch.ones(case.batch, PROMPT_TOKENS + 1, device=case.device, dtype=torch.int64)
    mask[:, -1] = 0
    given = {"prompt_embeds": states * mask[..., None].to(states), "attention_mask": mask}
    return given, given


_3 = partial(Family, movq="movq-3", stock=_stock_3, ours=_ours_3, inputs=inputs_3)
FAMILIES = {
    "2.1": Family(
        "unet-2.1",
        "movq-2",
        _stock_21,
        _ours_21,
        inputs_21,
        ddim_21,
        callback="callback",
        call={"guidance_scale": 4.0},
    ),
    "2.2": Family(
        "unet-2.2",
        "movq-2",
        StockKandinskyV22Pipeline,
        KandinskyV22Pipeline,
        inputs_22,
        ddpm_22,
        call={"guidance_scale": 4.0},
    ),
    "3.0": _3(
        "unet-3.0",
        scheduler=ddpm_30,
        call={"guidance_scale": 3.0},
        note="Both with stock's DDPM, without a null embedding, and with the MoVQ in the dtype of the UNet.",
    ),
    "3.1": _3(
        "unet-3.1",
        scheduler=Kandinsky3AncestralScheduler,
        stock_scheduler=ddpm_30,
        stock_unet="unet-3.0",
        call={"guidance_scale": 3.0},
        comparable=False,
        note="Stock has no null embedding and not the sampler of 3.1: it runs 3.0, with weights of its own. The MoVQ"
        " is in the dtype of the UNet.",
    ),
    "flash": _3(
        "unet-3.0",
        scheduler=Kandinsky3FlashScheduler,
        call={"guidance_scale": 0.0},
        comparable=False,
        note="Stock has no sampler of Flash: its pipeline of 3.0 is given ours. The MoVQ is in the dtype of the UNet.",
    ),
}


# ------------------------------------------------------------------------------------------------ running
def runner(pipe: Any, case: Case, given: Mapping[str, Any], family: Family, of_steps: bool) -> Run:
    """What draws with a pipeline: a picture, or latents alone where steps are measured."""
    pipe.set_progress_bar_config(disable=True)
    given = dict(given)
    if "given_texts" in given:
        pipe.given_texts = given.pop("given_texts")
    latents = case.randn(case.batch, 4, case.size // 8, case.size // 8)
    given |= {"height": case.size, "width": case.size, "output_type": "np", **(family.call or {})}

    def run(steps: int | None) -> Outcome:
        clock = StepClock(case.device)
        callback = clock if family.callback == "callback" else clock.on_step_end
        images = pipe(
            **given,
            latents=latents.clone(),
            num_inference_steps=steps,
            generator=case.generator(),
            **{family.callback: callback},
        ).images
        return Outcome(clock.latents if of_steps else torch.from_numpy(images), clock.step_seconds)

    return run


def optimized(pipe: Any) -> Any:
    """The pipeline with everything that `optimize` does by default."""
    return pipe.optimize()


def workload(case: Case, family: str, of_steps: bool, scheduler: Callable[[], Any] | None = None) -> Workload:
    """Drawing in all ways.

    Args:
        case: what is drawn.
        family: a key of `FAMILIES`.
        of_steps: whether nothing is decoded.
        scheduler: makes another scheduler than the family's, for all.
    """
    parts = FAMILIES[family]
    unet, movq = case.model(parts.unet), case.model("no-movq" if of_steps else parts.movq)
    stock_unet = case.model(parts.stock_unet) if parts.stock_unet else unet
    return assemble(case, parts, (unet, stock_unet, movq), of_steps, scheduler)


def assemble(
    case: Case, parts: Family, models: tuple[Any, Any, Any], of_steps: bool, scheduler: Callable[[], Any] | None = None
) -> Workload:
    """The same, of given models: UNet, stock's UNet and MoVQ."""
    unet, stock_unet, movq = models
    for_stock, for_ours = parts.inputs(case, unet)
    ours_scheduler = scheduler or parts.scheduler
    stock_scheduler = scheduler or parts.stock_scheduler or parts.scheduler

    def stock(compiled: bool) -> Run:
        pipe = parts.stock(unet=twin(stock_unet), scheduler=stock_scheduler(), movq=twin(movq))
        if compiled:
            pipe.unet.compile()
        return runner(pipe, case, for_stock, parts, of_steps)

    def ours(optimize: bool) -> Run:
        share = own_copy if optimize else twin  # another memory layout of the weights must not reach stock
        pipe = parts.ours(unet=share(unet), scheduler=ours_scheduler(), movq=share(movq))
        return runner(optimized(pipe) if optimize else pipe, case, for_ours, parts, of_steps)

    ways = {
        STOCK: partial(stock, compiled=False),
        COMPILED: partial(stock, compiled=True),
        OURS: partial(ours, optimize=False),
        OPTIMIZED: partial(ours, optimize=True),
    }
    note = f"{NO_TEXT_ENCODER} {parts.note}".strip()
    return Workload(ways, comparable=parts.comparable, note=note, copied=[unet, movq])
