"""`python -m benchmarks`: measure, store, and show."""

from __future__ import annotations

import logging
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .measure import machine
from .models import build
from .report import print_lines, print_tables, write_html
from .runner import Plan, measure_case
from .selection import listed, select
from .store import NOT_MEASURED, Row, Store, rows_of
from .subjects import SUBJECTS


console = Console(width=None if sys.stdout.isatty() else 200)


def main(
    only: Annotated[
        str, typer.Option(help="NAME[:SIZES[:BATCHES[:DTYPES[:CANDIDATES]]]],..., or how names begin")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; the accelerator if there is one")] = "",
    sizes: Annotated[str, typer.Option(help="sides in pixels, separated by commas")] = "",
    batches: Annotated[str, typer.Option(help="pictures at once, separated by commas")] = "",
    dtypes: Annotated[str, typer.Option(help="float32, float16, bfloat16, separated by commas")] = "",
    against: Annotated[str, typer.Option(help="candidates, separated by commas, such as 'stock,ours'")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of each candidate, taken in turns")] = 5,
    memory: Annotated[bool, typer.Option(help="whether memory and operations are measured, too")] = True,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    time_limit: Annotated[float, typer.Option(help="seconds after which no other case is begun; 0: none")] = 0.0,
    output: Annotated[Path, typer.Option(help="folder of benchmarks.json and benchmarks.html")] = Path(
        "benchmark_output"
    ),
    render: Annotated[bool, typer.Option("--render", help="show what is stored, and measure nothing")] = False,
    listing: Annotated[bool, typer.Option("--list", help="name subjects and candidates, and measure nothing")] = False,
    tiny: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Time, peak memory and difference, ours against stock diffusers, at the published sizes with random weights."""
    began = time.perf_counter()
    if listing:
        for subject in SUBJECTS.values():
            console.print(f"{subject.name:18} {subject.title} ({', '.join(subject.candidates)})", markup=False)
        return
    store = Store(output / "benchmarks.json")
    options = {"sizes": sizes, "batches": batches, "dtypes": dtypes, "against": against}
    try:
        selections = select(only, {name: listed(text) for name, text in options.items()})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    about = {"machine": machine(device), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    done: list[Row] = []
    for selection in [] if render else selections:
        build.cache_clear()
        names = selection.candidates(device)
        plan = Plan(names, repeats, memory)
        for case in selection.cases(device, tiny) if names else []:
            if time_limit and time.perf_counter() - began > time_limit:
                rows = rows_of(case, names, status=NOT_MEASURED, command=case.command)
            else:
                rows = measure_case(selection.subject, case, plan, about)
            store.add(rows)
            print_lines(rows, console)
            done += rows
    store.add_missing(SUBJECTS.values())
    write_html(store.rows, SUBJECTS, output / "benchmarks.html")
    print_tables(store.rows if render else done, SUBJECTS, console)
    console.print(f"{output / 'benchmarks.json'}, {output / 'benchmarks.html'}; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    typer.run(main)
