"""Time of the prior with cached keys and values against stock diffusers', at full size, and their difference.

    python benchmarks/prior.py --steps 25 --repeats 3 --dtype float32

Both run the same 1 billion random weights, with guidance (a batch of two), through the whole UnCLIP sampler: ours
computes the prefix once and then the remaining tokens at each step, stock all tokens at each step. In float32 this
needs 5 GB of memory.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _common import alternate, machine, print_times, summary, write_report
from diffusers import PriorTransformer, UnCLIPScheduler

from kandinsky_diffusers.components import adopt


GUIDANCE_SCALE = 4.0


class Dtype(StrEnum):
    """Precision of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def random_prior(dtype: torch.dtype) -> PriorTransformer:
    """The prior of 2.1 and 2.2 at full size, with random weights."""
    torch.manual_seed(0)
    prior = PriorTransformer().eval()
    for name in ("positional_embedding", "prd_embedding"):
        torch.nn.init.normal_(prior.get_parameter(name), std=0.02)
    return prior.to(dtype=dtype)


def random_conditions(prior: PriorTransformer) -> dict[str, torch.Tensor]:
    """Conditions of an unconditional row, with two text tokens, and of one with a prompt of 20."""
    config, dtype = prior.config, prior.dtype
    lengths = torch.tensor([[2], [20]])
    return {
        "proj_embedding": torch.randn(2, config.embedding_dim, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, config.num_embeddings, config.embedding_dim, dtype=dtype),
        "attention_mask": torch.arange(config.num_embeddings) < lengths,
    }


@torch.no_grad()
def sample(prior: PriorTransformer, conditions: dict[str, torch.Tensor], steps: int, cached: bool) -> torch.Tensor:
    """The image embedding after `steps` guided steps from the same noise."""
    scheduler = UnCLIPScheduler(
        variance_type="fixed_small_log",
        prediction_type="sample",
        num_train_timesteps=1000,
        clip_sample_range=5.0,
        beta_schedule="squaredcos_cap_v2",
    )
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, prior.config.embedding_dim, generator=generator).to(prior.dtype)
    inputs: dict[str, Any] = {"prefix": prior(prefill=True, **conditions)} if cached else conditions
    timesteps = scheduler.timesteps
    for i, t in enumerate(timesteps):
        prediction = prior(latents.expand(2, -1), t, **inputs).predicted_image_embedding
        unconditional, conditional = prediction.chunk(2)
        guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        previous = int(timesteps[i + 1]) if i + 1 < steps else None
        latents = scheduler.step(guided, int(t), latents, generator=generator, prev_timestep=previous).prev_sample
    return latents


def main(
    steps: Annotated[int, typer.Option(min=1, help="steps of the sampler")] = 25,
    repeats: Annotated[int, typer.Option(min=1, help="measurements of each, taken alternately")] = 3,
    dtype: Annotated[Dtype, typer.Option(help="precision of the weights")] = Dtype.float32,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    output: Annotated[Path, typer.Option(help="where the figures go, as JSON")] = Path("benchmark_prior.json"),
) -> None:
    """Measure the prior, ours against stock."""
    torch.set_num_threads(threads)
    stock = random_prior(getattr(torch, dtype))
    conditions = random_conditions(stock)
    reference = sample(stock, conditions, steps, cached=False)  # before adopting, which exchanges the processors
    cached = adopt(stock)
    ours = sample(cached, conditions, steps, cached=True)
    difference = ((ours - reference).abs().max() / reference.abs().max()).item()

    seconds = alternate(
        {
            "stock": lambda: sample(stock, conditions, steps, cached=False),
            "cached": lambda: sample(cached, conditions, steps, cached=True),
        },
        repeats,
    )
    times = {name: summary(runs) for name, runs in seconds.items()}
    print_times(f"prior, {steps} guided steps, {dtype}, {threads} threads", seconds, "stock")
    print(f"largest difference of the embedding, relative to its largest value: {difference:.1e}")
    report = {
        "machine": machine(),
        "steps": steps,
        "dtype": str(dtype),
        "seconds": times,
        "times_faster": times["stock"]["median"] / times["cached"]["median"],
        "relative_difference": difference,
    }
    write_report(output, report)


if __name__ == "__main__":
    typer.run(main)
