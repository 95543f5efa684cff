"""What both training scripts are told, on the command line or as an object."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from diffusers.optimization import SchedulerType

from kandinsky_diffusers.inputs import check_at_least, check_counts


SIZE_MULTIPLE = 64  # pixels: what MoVQ and the UNet can halve as often as they do


class Precision(StrEnum):
    """Of the frozen weights and of the arithmetic; the LoRA itself stays in float32."""

    no = "no"
    fp16 = "fp16"
    bf16 = "bf16"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a LoRA training; each field is an option of the command line.

    Raises:
        TypeError, ValueError: a setting is not as described; it is named.
    """

    data: Annotated[Path, typer.Option(help="Folder of pictures, and captions where they are needed.")]
    output: Annotated[Path, typer.Option(help="Folder that is created, for the LoRA, checkpoints and pictures.")]
    size: Annotated[int, typer.Option(help="Side of the training pictures in pixels, a multiple of 64.")] = 512
    steps: Annotated[int, typer.Option(help="Number of optimizer steps.")] = 1000
    batch_size: Annotated[int, typer.Option(help="Pictures at once, on each device.")] = 1
    gradient_accumulation: Annotated[int, typer.Option(help="Batches for one optimizer step.")] = 1
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice instead of keeping them.")
    ] = False
    mixed_precision: Annotated[
        Precision | None, typer.Option(help="Of the frozen weights; by default what accelerate is configured to.")
    ] = None
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 1e-4
    lr_schedule: Annotated[SchedulerType, typer.Option(help="How it changes.")] = SchedulerType.CONSTANT
    warmup_steps: Annotated[int, typer.Option(help="Steps in which it rises, for the schedules that do.")] = 0
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01
    max_grad_norm: Annotated[float, typer.Option(help="To which gradients are clipped.")] = 1.0
    snr_gamma: Annotated[
        float | None, typer.Option(help="Weigh timesteps by min(SNR, gamma) / SNR (arXiv:2303.09556); 5 is usual.")
    ] = None
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 16
    alpha: Annotated[int | None, typer.Option(help="The LoRA is scaled by alpha / rank; by default by 1.")] = None
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that get a LoRA, by the end of their names; repeatable. By default all of attention."
        ),
    ] = None
    condition_dropout: Annotated[
        float, typer.Option(help="Share of pictures shown without caption or embedding, for guidance.")
    ] = 0.1
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0
    checkpoint_every: Annotated[int, typer.Option(help="Optimizer steps between checkpoints.")] = 500
    checkpoint_limit: Annotated[int | None, typer.Option(help="Checkpoints to keep; by default all.")] = None
    resume: Annotated[str | None, typer.Option(help="latest, or the folder of a checkpoint.")] = None
    validation_prompt: Annotated[list[str] | None, typer.Option(help="What to draw now and then; repeatable.")] = None
    validation_every: Annotated[int, typer.Option(help="Optimizer steps between validation pictures.")] = 500
    validation_steps: Annotated[int, typer.Option(help="Sampling steps of a validation picture.")] = 50
    report_to: Annotated[
        str | None, typer.Option(help="A tracker of accelerate's, such as tensorboard or wandb, which gets the loss.")
    ] = None

    def __post_init__(self) -> None:
        counts = ("size", "steps", "batch_size", "gradient_accumulation", "rank", "checkpoint_every")
        check_counts(**{name: getattr(self, name) for name in (*counts, "validation_every", "validation_steps")})
        if self.checkpoint_limit is not None:
            check_counts(checkpoint_limit=self.checkpoint_limit)
        check_at_least("warmup_steps", self.warmup_steps, 0)
        check_at_least("seed", self.seed, 0)
        if self.size % SIZE_MULTIPLE:
            raise ValueError(f"`size` is {self.size}; accepted are multiples of {SIZE_MULTIPLE}.")
        if not 0.0 <= self.condition_dropout <= 1.0:
            raise ValueError(f"`condition_dropout` is {self.condition_dropout}; accepted is 0 to 1.")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"`weight_decay` is {self.weight_decay}; accepted is 0 or more.")
        for name in ("learning_rate", "max_grad_norm", "alpha", "snr_gamma"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}; accepted is a positive number.")


S = TypeVar("S", bound=Settings)


def run(train: Callable[[S], Any], settings: type[S]) -> None:
    """Call `train` with the settings from the command line; what is wrong with them is said there, without a trace."""

    def command(**options: Any) -> None:
        try:
            chosen = settings(**options)
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
        train(chosen)

    types = get_type_hints(settings, include_extras=True)
    options = [
        option.replace(annotation=types[name]) for name, option in inspect.signature(settings).parameters.items()
    ]
    command.__doc__ = train.__doc__
    command.__annotations__ = types
    command.__signature__ = inspect.Signature(options)  # pyright: ignore[reportFunctionMemberAccess]
    typer.run(command)
