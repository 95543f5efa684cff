"""The six stages: what each needs, how long it learns, and how it is run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from . import clip, decoder, mclip, movq, prior
from .corpus import Corpus
from .files import write_torch
from .loop import Schedule, Trainer
from .stage import WEIGHTS, Context, Task


@dataclass(frozen=True)
class Stage:
    """One model to train.

    Args:
        build: makes model and loss.
        steps: how many without a time limit.
        batch_size: on a CPU.
        learning_rate: the highest one.
        needs: stages that must be finished before.
        until: share of a time limit after which it has to be done.
    """

    build: Callable[[Context], Task]
    steps: int
    batch_size: int
    learning_rate: float
    needs: tuple[str, ...] = ()
    until: float = 1.0


STAGES = {
    "clip": Stage(clip.build, 4000, 256, 1e-3, until=0.22),
    "movq": Stage(movq.build, 3000, 32, 1e-3, until=0.3),
    "mclip": Stage(mclip.build, 4000, 128, 1e-3, ("clip",), until=0.36),
    "prior": Stage(prior.build, 6000, 128, 1e-3, ("clip",)),
    "decoder": Stage(decoder.build_decoder, 12000, 64, 1e-3, ("clip", "movq", "mclip")),
    "inpainting": Stage(decoder.build_inpainting, 12000, 64, 1e-3, ("clip", "movq", "mclip")),
}
ON_A_GPU = 8  # times as many scenes in a step


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
    task = stage.build(context)
    schedule = Schedule(
        steps=max(1, round(stage.steps / plan.shorter)),
        batch_size=stage.batch_size * (ON_A_GPU if device.type == "cuda" else 1),
        learning_rate=stage.learning_rate,
        seconds=None if end is None else max(1.0, end - time.time()),
        seed=plan.seed,
    )
    folder = plan.work / name
    Trainer(task.model, task.loss, len(context.corpus), schedule, folder, accelerator).run()
    handed_on = task.finish()
    write_torch(folder / WEIGHTS, {"model": task.model.state_dict(), **handed_on})
