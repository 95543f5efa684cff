"""What works on files: loading a repository, and converting a release."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import KandinskyV22Pipeline as StockKandinskyV22Pipeline

from kandinsky_diffusers import KandinskyV22Pipeline

from . import conversion
from .cases import OURS, STOCK, Case, Outcome, Run, Subject, Workload
from .drawing import ddpm_22
from .measure import summary
from .runner import Plan, Row, measure_workload


COPY = "copy and SHA-256"


def measure_loading(subject: Subject, case: Case, plan: Plan, make: Callable[[Case, Path], Workload]) -> list[Row]:
    """Rows of loading a repository that is written before; no memory is measured."""
    with tempfile.TemporaryDirectory() as folder:
        times_only = replace(plan, memory=False)
        return measure_workload(subject, case, times_only, lambda case: make(case, Path(folder)))


def loading_workload(case: Case, folder: Path) -> Workload:
    """`from_pretrained` of a decoder of 2.2, and moving it to its device."""
    StockKandinskyV22Pipeline(case.model("unet-2.2"), ddpm_22(), case.model("movq-2")).save_pretrained(folder)

    def make(cls: Any) -> Run:
        def run(steps: int | None) -> Outcome:
            pipe = cls.from_pretrained(folder, torch_dtype=case.torch_dtype).to(case.device)
            return Outcome(pipe.unet.conv_in.weight.flatten()[:1])

        return run

    ways = {STOCK: partial(make, StockKandinskyV22Pipeline), OURS: partial(make, KandinskyV22Pipeline)}
    return Workload(ways, note="Decoder of 2.2, from files that the system has just written and still has in memory.")


def measure_conversion(subject: Subject, case: Case, plan: Plan, version: str) -> list[Row]:
    """Rows of converting a release, and of copying its main file and computing its SHA-256."""
    if case.tiny:
        return [{"candidate": name, "status": "failed", "error": "there is no tiny one"} for name in plan.against]
    with tempfile.TemporaryDirectory() as folder:
        size, runs = conversion.measure(version, Path(folder), plan.repeats)
    seconds = {name: [run["seconds"] for run in results] for name, results in runs.items()}
    peak = max(run["peak_megabytes"] for run in runs["convert"])
    note = f"{conversion.CASES[version].file}, {size / 1e9:.2f} GB; each in a process of its own."
    rows: list[Row] = [
        {"candidate": COPY, "seconds": summary(seconds["copy"]), "times_faster": {}},
        {
            "candidate": OURS,
            "seconds": summary(seconds["convert"]),
            "times_faster": {COPY: statistics.median(seconds["copy"]) / statistics.median(seconds["convert"])},
            "peak_bytes": {"sampled": int(peak * 1e6)},
        },
    ]
    return [
        {"status": "measured", "note": note, "steps": None, **row} for row in rows if row["candidate"] in plan.against
    ]
