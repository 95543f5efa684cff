"""How far half precision is from float32, ours against stock.

Over 32 samples of small pictures, with the full-size models: the root mean square of the distance from what stock
computes in float32 with the same (rounded) weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler

from kandinsky_diffusers.components import adopt

from .cases import OURS, STOCK, Case, Subject
from .drawing import BETAS_2, FAMILIES, assemble
from .measure import rms
from .models import own_copy, twin
from .parts import prior_conditions
from .runner import Plan, Row


SAMPLES = 32
STEPS = 2
TIMESTEPS = (980, 500, 20)  # of the prior, whose sampler draws noise

Outputs = dict[str, torch.Tensor]


def measure_accuracy(
    subject: Subject, case: Case, plan: Plan, outputs: Callable[[Case, Iterable[str]], Outputs]
) -> list[Row]:
    """One row for each candidate but stock: both distances, and their ratio."""
    names = [STOCK, *(name for name in plan.against if name != STOCK)]
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    try:
        made = outputs(case, names)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    reference = made.pop("reference")
    distances = {name: rms(output.float() - reference.float()) for name, output in made.items()}
    return [
        {
            "candidate": name,
            "status": "measured",
            "note": f"{SAMPLES} samples; distances from stock in float32 with the same weights.",
            "distance": {"samples": SAMPLES, name: distances[name], STOCK: distances[STOCK]},
            "ratio": distances[name] / distances[STOCK],
        }
        for name in names[1:]
    ]


def decoder_outputs(case: Case, names: Iterable[str], family: str) -> Outputs:
    """Latents after two guided steps without noise."""
    parts = FAMILIES[family]
    settings = BETAS_2 if family.startswith("2") else {"beta_schedule": "squaredcos_cap_v2"}
    scheduler = partial(DDIMScheduler, **settings, clip_sample=False)
    models = [case.model(parts.unet), case.model("no-movq")]
    case = replace(case, batch=SAMPLES)
    exact = replace(case, dtype="float32")

    def run(case: Case, name: str, unet: Any, movq: Any) -> torch.Tensor:
        workload = assemble(case, parts, (unet, unet, movq), True, scheduler)
        return workload.ways[name]()(STEPS).output.cpu()

    made = {name: run(case, name, *models) for name in names}
    made["reference"] = run(exact, STOCK, *(own_copy(model, torch.float32) for model in models))
    return made


@torch.no_grad()
def movq_outputs(case: Case, names: Iterable[str], model: str) -> Outputs:
    """Pixels."""
    movq = case.model(model)
    latents = replace(case, batch=SAMPLES).randn(SAMPLES, 4, case.size // 8, case.size // 8)

    def decode(movq: Any) -> torch.Tensor:
        parts = latents.to(movq.dtype).split(4)
        return torch.cat([movq.decode(part, force_not_quantize=True).sample.cpu() for part in parts])

    return {
        STOCK: decode(movq),
        OURS: decode(adopt(twin(movq))),
        "reference": decode(own_copy(movq, torch.float32)),
    }


@torch.no_grad()
def prior_outputs(case: Case, names: Iterable[str]) -> Outputs:
    """Predictions at some timesteps."""
    prior = case.model("prior")
    case = replace(case, batch=SAMPLES // 2)  # half of the rows are unconditional
    noisy = case.randn(SAMPLES, prior.config.embedding_dim)

    def predict(model: Any, prefix: bool) -> torch.Tensor:
        noise, pooled, states = (part.to(model.dtype) for part in (noisy, *prior_conditions(case, prior)[:2]))
        known = {
            "proj_embedding": pooled,
            "encoder_hidden_states": states,
            "attention_mask": prior_conditions(case, prior)[2],
        }
        known = {"prefix": model(prefill=True, **known)} if prefix else known
        return torch.stack([model(noise, t, **known).predicted_image_embedding.cpu() for t in TIMESTEPS])

    return {
        STOCK: predict(prior, prefix=False),
        OURS: predict(adopt(twin(prior)), prefix=True),
        "reference": predict(own_copy(prior, torch.float32), prefix=False),
    }
