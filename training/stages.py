"""The six stages: what each needs, how long it learns, and how it is run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from . import clip, decoder, mclip, movq, prior
from .corpus import Corpus
from .files import write_torch
from .loop import CHECKPOINT, Schedule, Trainer, load_average
from .models import make_movq, make_prior, make_unet
from .stage import WEIGHTS, Context, Task


@dataclass(frozen=True)
class Stage:
    """One model to train.

    Args:
        make: makes the model, for the tokenizers in a work folder.
        build: makes its loss.
        steps: how many without a time limit.
        batch_sizes: scenes in a step on a CPU, and on a GPU, which has little to do with few.
        learning_rate: the highest one.
        needs: stages that must be finished before.
        until: share of a time limit after which it has to be done.
    """

    make: Callable[[Path], Any]
    build: Callable[[Any, Context], Task]
    steps: int
    batch_sizes: tuple[int, int]
    learning_rate: float
    needs: tuple[str, ...] = ()
    until: float = 1.0


LOG_EVERY = 20  # steps
BEFORE_UNETS = ("clip", "movq", "mclip")
STAGES = {
    "clip": Stage(clip.make, clip.build, 3000, (256, 1024), 1e-3, until=0.22),
    "movq": Stage(lambda work: make_movq(), movq.build, 2500, (32, 128), 1e-3, until=0.36),
    "mclip": Stage(mclip.make, mclip.build, 2500, (128, 512), 1e-3, ("clip",), until=0.36),
    "prior": Stage(lambda work: make_prior(), prior.build, 2000, (128, 1024), 1e-3, ("clip",), until=0.6),
    "decoder": Stage(lambda work: make_unet(), decoder.build, 5000, (64, 512), 1e-3, BEFORE_UNETS),
    "inpainting": Stage(lambda work: make_unet(inpainting=True), decoder.build, 5000, (64, 512), 1e-3, BEFORE_UNETS),
}


@dataclass(frozen=True)
class Plan:
    """What holds for all stages of a run.

    Args:
        work: folder of everything that is not the release.
        seed: of all that is random.
        cpu: whether a GPU is left alone.
        shorter: divides the number of steps.
        ends: when the time limit is over, in seconds since the epoch; None where there is none.
        began: when the time began.
    """

    work: Path
    seed: int = 0
    cpu: bool = False
    shorter: float = 1.0
    began: float = 0.0
    ends: float | None = None

    def is_done(self, name: str) -> bool:
        """Whether a stage need not run again."""
        return (self.work / name / WEIGHTS).is_file()

    def end_of(self, name: str) -> float | None:
        """When a stage has to be done, in seconds since the epoch."""
        return None if self.ends is None else self.began + STAGES[name].until * (self.ends - self.began)


def run_stage(name: str, plan: Plan) -> None:
    """Train one model, from its last checkpoint where there is one, and write its weights."""
    stage, end = STAGES[name], plan.end_of(name)
    accelerator = Accelerator(cpu=plan.cpu)
    device = accelerator.device
    torch.set_float32_matmul_precision("high")
    set_seed(plan.seed)
    context = Context(plan.work, Corpus.load(plan.work, device), device)
    model = stage.make(plan.work).to(device)
    task = stage.build(model, context)
    steps = max(1, round(stage.steps / plan.shorter))
    schedule = Schedule(
        steps=steps,
        log_every=min(steps, LOG_EVERY),
        batch_size=stage.batch_sizes[device.type != "cpu"],
        learning_rate=stage.learning_rate,
        seconds=None if end is None else max(1.0, end - time.time()),
        seed=plan.seed,
    )
    folder = plan.work / name
    Trainer(model, task.loss, len(context.corpus), schedule, folder, accelerator).run()
    handed_on = task.finish()
    write_torch(folder / WEIGHTS, {"model": model.state_dict(), **handed_on})


def best_so_far(work: Path) -> dict[str, Any]:
    """The models as their stages left them; of one that is not done the last average, or else the fresh model."""
    models = {name: stage.make(work) for name, stage in STAGES.items()}
    for name, model in models.items():
        done, begun = work / name / WEIGHTS, work / name / CHECKPOINT
        if done.is_file():
            model.load_state_dict(torch.load(done, map_location="cpu", weights_only=True)["model"])
        elif begun.is_file():
            load_average(model, torch.load(begun, map_location="cpu", weights_only=True))
    return models
