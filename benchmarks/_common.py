"""What the benchmarks share: alternating measurements, and their table."""

from __future__ import annotations

import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def alternate(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run. The candidates take turns, so that whatever else the machine does meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def anonymous_memory() -> int:
    """Bytes of this process that are not mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextmanager
def sampled_peak(samples: list[int]) -> Iterator[None]:
    """Sample the anonymous memory every 5 ms."""
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            samples.append(anonymous_memory())

    thread = threading.Thread(target=sample)
    thread.start()
    yield
    done.set()
    thread.join()


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, fastest and slowest of the runs, in seconds."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_times(title: str, seconds: dict[str, list[float]], reference: str) -> None:
    """Print the times as a table, each compared with the median of `reference`."""
    base = statistics.median(seconds[reference])
    table = Table("", "median [s]", "fastest [s]", "slowest [s]", f"times faster than {reference}", title=title)
    for name, runs in seconds.items():
        row = summary(runs)
        table.add_row(name, *(f"{row[key]:.2f}" for key in ("median", "min", "max")), f"{base / row['median']:.2f}")
    Console().print(table)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the figures as JSON."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
