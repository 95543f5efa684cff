"""Runs the stages, as many at a time as make sense, each in a process of its own, and keeps to a time limit."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import time
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from .curves import draw_curves
from .files import read_jsonl
from .loop import LOG
from .release import write_release
from .stages import STAGES, Plan, best_so_far, run_stage


logger = logging.getLogger("training")

RESERVE = 20.0  # seconds of a time limit for writing the release
TRIES = 2  # for each stage; the second goes on from the last checkpoint
NOTE_EVERY = 15.0  # seconds

_PROCESSES = multiprocessing.get_context("forkserver")


def start_imports() -> None:
    """Start the process that all stages are forked from; it imports what they need, which takes long, once."""
    _PROCESSES.set_forkserver_preload(["training.stages"])
    forkserver.ensure_running()


@dataclass
class Crew:
    """Runs stages in processes of their own, each when what it needs is done.

    Args:
        plan: of the run.
        output: the release, which is written anew after each stage.
        processes: how many at a time.
    """

    plan: Plan
    output: Path
    processes: int
    running: dict[str, Any] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)

    def run(self) -> list[str]:
        """Run until nothing is left that can be, or the time is over; returns the names of unfinished stages."""
        if not self._is_over():
            self._start()
        while self.running and not self._is_over():
            sentinels = wait([process.sentinel for process in self.running.values()], NOTE_EVERY)
            ended = [name for name, process in self.running.items() if process.sentinel in sentinels]
            for name in ended:
                self._end(name)
            self._start()
            if ended:
                self.write()
            else:
                self._note()
        for process in self.running.values():
            process.terminate()
        self.write()
        return [name for name in STAGES if not self.plan.is_done(name)]

    def write(self) -> None:
        """Write the release, and what the logs say."""
        write_release(best_so_far(self.plan.work), self.plan.work / "tokenizers", self.output)
        logs = self.output.with_name(f"{self.output.name}_logs")
        logs.mkdir(exist_ok=True)
        for name in STAGES:
            if (self.plan.work / name / LOG).is_file():
                shutil.copyfile(self.plan.work / name / LOG, logs / f"{name}.jsonl")
        draw_curves(self.plan.work, list(STAGES), logs / "curves.png")

    def _start(self) -> None:
        for name, stage in STAGES.items():
            waits = name in self.running or self.plan.is_done(name) or self.tries.get(name, 0) == TRIES
            ready = all(self.plan.is_done(needed) for needed in stage.needs)
            if ready and not waits and len(self.running) < self.processes:
                self.tries[name] = self.tries.get(name, 0) + 1
                process = _PROCESSES.Process(target=_work, args=(name, self.plan, self.processes), name=name)
                process.start()
                self.running[name] = process
                logger.info("%s: begins after %.0f s", name, time.time() - self.plan.began)

    def _end(self, name: str) -> None:
        process = self.running.pop(name)
        process.join()
        done = "is done" if self.plan.is_done(name) else f"has failed (exit code {process.exitcode})"
        logger.info("%s: %s after %.0f s", name, done, time.time() - self.plan.began)

    def _note(self) -> None:
        for name in self.running:
            lines = read_jsonl(self.plan.work / name / LOG)
            logger.info("%s: %s", name, lines[-1] if lines else "starts")

    def _is_over(self) -> bool:
        return self.plan.ends is not None and time.time() > self.plan.ends + RESERVE / 2


def _work(name: str, plan: Plan, processes: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    run_stage(name, plan)
