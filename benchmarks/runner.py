"""Measuring a case: all candidates in one process, taking turns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kandinsky_diffusers.measuring import flops, peak_bytes

from .cases import COMPILED, OPTIMIZED, OURS, STOCK, Case, Run, Subject, Workload
from .measure import PEAK_SIDES, free_memory, held_memory, largest_difference, matmul_peak, peak_memory, summary, timed
from .models import build, own_copy
from .store import Row, rows_of


# the operators of compiled code cannot be counted, but they do the work of others
COUNTED_LIKE = {COMPILED: STOCK, OPTIMIZED: OURS}
COUNTS = ("flops", "step_flops")

logger = logging.getLogger("benchmarks")


@dataclass(frozen=True)
class Plan:
    """How a case is measured.

    Args:
        against: candidates.
        repeats: timed runs of each.
        memory: whether memory and operations are measured, too; it takes up to three more runs of each.
    """

    against: Sequence[str]
    repeats: int = 5
    memory: bool = True


@dataclass
class Measured:
    """What is known of a candidate."""

    run: Run
    seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    output: torch.Tensor | None = None
    figures: Row = field(default_factory=dict)


def measure_case(subject: Subject, case: Case, plan: Plan, about: Row) -> list[Row]:
    """Rows of a case, whatever happens; `about` is what all of them say."""
    free_memory(case.device)
    torch.compiler.reset()
    figures: dict[str, Row] = {}
    failure: Row = {"candidate": f"{subject.name} as a whole"}
    _guarded(failure, lambda: figures.update({row["candidate"]: row for row in subject.measure(subject, case, plan)}))
    if "status" in failure:
        figures = {name: {**failure, "candidate": name} for name in plan.against}
    more = {"reduced": subject.reduced} if case.device == "cpu" and subject.reduced else {}
    rows = rows_of(case, figures, tiny=case.tiny, command=case.command, **about, **more)
    return [{**row, **figures[row["candidate"]]} for row in rows]


def measure_workload(subject: Subject, case: Case, plan: Plan, make: Callable[[Case], Workload]) -> list[Row]:
    """Rows of a case, one for each candidate.

    Each candidate is first made ready, and measured for memory and operations; then all are timed in turns, so that
    whatever else the machine does meets all of them.
    """
    if case.counted:
        return count_only(case, plan, make)
    _matmul_peak(case)  # also lets libraries take their workspaces, which would be counted as the first candidate's
    workload = make(case)
    steps = subject.steps[case.device] if subject.steps else None
    rows: dict[str, Row] = {name: {"candidate": name, "steps": steps, "note": workload.note} for name in plan.against}
    ready: dict[str, Measured] = {}

    def prepare(name: str) -> None:
        ready[name] = _prepare(name, workload, case, steps, plan.memory)

    for name in plan.against:
        _guarded(rows[name], partial(prepare, name))
    for _ in range(plan.repeats):
        for name in [name for name in ready if "status" not in rows[name]]:
            _guarded(rows[name], partial(_time, ready[name], case, steps))
    for name, like in COUNTED_LIKE.items():
        if name in ready and like in ready:
            counts = {count: ready[like].figures[count] for count in COUNTS if count in ready[like].figures}
            ready[name].figures |= counts
    for name in [name for name in ready if "status" not in rows[name]]:
        rows[name] |= _figures(subject, case, ready[name])
    _compare(rows, ready, workload)
    return list(rows.values())


def _guarded(row: Row, work: Callable[[], Any]) -> None:
    """A candidate that fails does not take the others with it."""
    try:
        work()
    except Exception as error:
        logger.exception("%s failed", row["candidate"])
        row.update(status="failed", error=f"{type(error).__name__}: {error}"[:500])


def _prepare(name: str, workload: Workload, case: Case, steps: int | None, memory: bool) -> Measured:
    """Make a candidate ready, and measure what is not time, with as few steps as tell all."""
    copies = [own_copy(model) for model in workload.copied if name == OPTIMIZED]
    before = held_memory(case.device)
    del copies
    measured = Measured(workload.ways[name]())
    few = None if steps is None else min(steps, workload.fewest_steps + 1)
    run = partial(measured.run, few)
    counts = name not in COUNTED_LIKE
    if case.device == "cuda" or not counts:
        measured.figures["warm_up_seconds"] = timed(partial(_warm_up, measured.run, steps, few), case.device)[1]
    if not memory:
        return measured
    peak = peak_memory(run, case.device, before)
    measured.figures["peak_bytes"] = peak
    if counts:
        counted = Counted()
        counted.add(run)
        peak["counted"] = counted.peak
        measured.figures |= _operations(counted.flops, measured.run, steps, few)
    return measured


def _warm_up(run: Run, steps: int | None, few: int | None) -> None:
    """Compile, choose kernels and record graphs, which may take until the third of equal calls."""
    for _ in range(3):
        run(None if steps is None or few is None else min(steps, few + 1))


def _operations(counted: int, run: Run, steps: int | None, few: int | None) -> Row:
    """Floating-point operations of all steps and of one, from those of a few steps and of one less."""
    if steps is None or few is None or few == 1:
        return {"flops": counted}
    step = counted - flops(partial(run, few - 1))
    return {"flops": counted + (steps - few) * step, "step_flops": step}


@dataclass
class Counted:
    """Bytes and operations of a call, by `kandinsky_diffusers.measuring`."""

    peak: int = 0
    flops: int = 0

    def add(self, run: Callable[[], Any]) -> None:
        """Count one call."""

        def counted() -> None:
            self.flops = flops(run)

        self.peak = peak_bytes(counted)


def _time(measured: Measured, case: Case, steps: int | None) -> None:
    outcome, seconds = timed(lambda: measured.run(steps), case.device)
    measured.seconds.append(seconds)
    if outcome.step_seconds is not None:
        measured.step_seconds.append(outcome.step_seconds)
    if measured.output is None:
        measured.output = outcome.output


def _figures(subject: Subject, case: Case, measured: Measured) -> Row:
    """What a row says of a candidate that ran."""
    figures = dict(measured.figures)
    step_flops = figures.pop("step_flops", None)
    if subject.per_step:
        figures |= {"seconds": summary(measured.step_seconds or measured.seconds)}
        if step_flops is not None:
            figures["flops"] = step_flops
    else:
        figures["seconds"] = summary(measured.seconds)
        if measured.step_seconds:
            figures["step_seconds"] = summary(measured.step_seconds)
    if "flops" in figures:
        peak = _matmul_peak(case)
        figures |= {"matmul_peak": peak, "peak_fraction": figures["flops"] / figures["seconds"]["median"] / peak}
    if measured.output is not None and not bool(measured.output.isfinite().all()):
        figures["warning"] = "the output is not finite"
    return {"status": "measured", **figures}


def _matmul_peak(case: Case) -> float:
    return matmul_peak(case.device, case.torch_dtype, 64 if case.tiny else PEAK_SIDES[case.device])


def _compare(rows: Mapping[str, Row], ready: Mapping[str, Measured], workload: Workload) -> None:
    """Times and outputs, against those of the same run."""
    measured = {name: row for name, row in rows.items() if row.get("status") == "measured"}
    for name, row in measured.items():
        others = {other for other in (workload.reference, COMPILED) if other in measured and other != name}
        median = row["seconds"]["median"]
        row["times_faster"] = {other: measured[other]["seconds"]["median"] / median for other in sorted(others)}
        if workload.comparable and workload.reference in measured and name != workload.reference:
            output, reference = ready[name].output, ready[workload.reference].output
            if output is not None and reference is not None:
                row["difference"] = largest_difference(output, reference)


def count_only(case: Case, plan: Plan, make: Callable[[Case], Workload]) -> list[Row]:
    """Rows without a time: bytes and operations of a call, counted on shapes alone."""
    rows = []
    build.cache_clear()
    with FakeTensorMode():
        workload = make(case)
        for name in plan.against:
            row: Row = {"candidate": name, "note": f"Counted, not run. {workload.note}"}
            counted = Counted()
            _guarded(row, partial(_count, counted, workload.ways[name]))
            if "status" not in row:
                row |= {"status": "counted", "peak_bytes": {"counted": counted.peak}, "flops": counted.flops}
            rows.append(row)
    build.cache_clear()
    return rows


def _count(counted: Counted, way: Callable[[], Run]) -> None:
    counted.add(partial(way(), None))
