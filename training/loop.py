"""The training loop of every stage: AdamW, a cosine schedule, an average of the weights, checkpoints and a log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from .files import read_jsonl, write_torch


Losses = Mapping[str, torch.Tensor]  # "loss" is what is minimised, the others are logged
LossFunction = Callable[[torch.Tensor, torch.Generator], Losses]

LOG, CHECKPOINT = "log.jsonl", "checkpoint.pt"
WARM_UP = 100  # steps
DECAY = 0.999  # of the average of the weights


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage learns.

    Args:
        steps: number of steps.
        batch_size: scenes in a step.
        learning_rate: the highest one.
        log_every: steps of which a line of the log is the mean.
        seconds: if given, the time from now on that counts instead of `steps`.
        save_every: seconds between checkpoints.
        seed: of all that is random.
    """

    steps: int
    batch_size: int
    learning_rate: float
    log_every: int
    seconds: float | None = None
    save_every: float = 30.0
    seed: int = 0

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is done, from 0 to 1."""
        return min(1.0, step / self.steps if self.seconds is None else seconds / self.seconds)

    def rate(self, step: int, progress: float) -> float:
        """The learning rate: a linear start, then a cosine down to a hundredth."""
        falling = 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * min(1.0, (step + 1) / WARM_UP) * falling


def load_average(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """The averaged weights of a checkpoint, into a model like that which was trained."""
    model.load_state_dict(checkpoint["model"])
    average = EMAModel(trainable(model))
    average.load_state_dict(checkpoint["average"])
    average.copy_to(trainable(model))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Trainer:
    """Trains one model; what it has written to its folder it goes on from.

    Args:
        model: on any device.
        loss: `(rows, generator) -> losses` of the model, for numbers of scenes.
        scenes: how many there are.
        schedule: how long and how fast.
        folder: of log and checkpoint.
        accelerator: has the device.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        scenes: int,
        schedule: Schedule,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self.loss, self.scenes, self.folder, self.accelerator = loss, scenes, folder, accelerator
        self.parameters = trainable(model)
        optimizer = torch.optim.AdamW(self.parameters, schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = EMAModel(self.parameters, decay=DECAY, use_ema_warmup=True, power=0.75, foreach=True)
        self.generator = torch.Generator(accelerator.device).manual_seed(schedule.seed)
        self.step, self.seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT).is_file():
            self._go_on()
        limit = schedule.seconds
        self.schedule = schedule if limit is None else replace(schedule, seconds=self.seconds + limit)

    def run(self) -> None:
        """Train to the end of the schedule, and leave the averaged weights in the model."""
        self.model.train()
        began = saved = time.monotonic()
        earlier, sums = self.seconds, {}
        while (progress := self.schedule.progress(self.step, self.seconds)) < 1.0:
            for name, value in self._step(self.schedule.rate(self.step, progress)).items():
                sums[name] = sums.get(name, 0.0) + value.detach()
            self.step += 1
            if self.step % self.schedule.log_every == 0:
                self._log(sums)  # waits for the device
                sums = {}
            now = time.monotonic()
            self.seconds = earlier + now - began
            if now - saved > self.schedule.save_every:
                self.save()
                saved = now
        self.save()
        self.average.copy_to(self.parameters)
        self.model.eval()

    def _step(self, rate: float) -> Losses:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        size = (self.schedule.batch_size,)
        rows = torch.randint(self.scenes, size, generator=self.generator, device=self.accelerator.device)
        losses = self.loss(rows, self.generator)
        self.accelerator.backward(losses["loss"])
        self.accelerator.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.parameters)
        return losses

    def _log(self, sums: Mapping[str, torch.Tensor]) -> None:
        means = {name: round(float(total) / self.schedule.log_every, 6) for name, total in sums.items()}
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"{self.folder.name}: the loss is {means['loss']} at step {self.step}")
        line = json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **means})
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")

    def save(self) -> None:
        """Write a checkpoint."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        write_torch(self.folder / CHECKPOINT, content)

    def _go_on(self) -> None:
        saved: dict[str, Any] = torch.load(self.folder / CHECKPOINT, map_location="cpu", weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average.load_state_dict(saved["average"])
        self.average.to(self.accelerator.device)
        self.generator.set_state(saved["generator"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        lines = [json.dumps(line) for line in read_jsonl(self.folder / LOG) if line["step"] <= self.step]
        (self.folder / LOG).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
