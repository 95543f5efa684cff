"""Seconds, bytes, operations and differences."""

from __future__ import annotations

import ctypes
import functools
import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What `run()` returns, and how many seconds the device was busy with it."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


class StepClock:
    """Notes when each step of a sampler ends, as a callback of the pipeline; on CUDA without waiting for the device.

    Its two forms are those in which pipelines call back: `clock` is a `callback`, and `clock.on_step_end` a
    `callback_on_step_end`.
    """

    def __init__(self, device: str):
        self._device = device
        self._marks: list[Any] = []
        self.latents = torch.empty(0)

    def __call__(self, index: int, timestep: Any, latents: torch.Tensor) -> None:
        if self._device == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append(mark)
        self.latents = latents

    def on_step_end(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
        """Note that a step has ended, and change nothing."""
        self(index, timestep, tensors["latents"])
        return {}

    @property
    def step_seconds(self) -> float | None:
        """Mean time from one end of a step to the next; None if there was one step only."""
        steps = len(self._marks) - 1
        if steps < 1:
            return None
        first, last = self._marks[0], self._marks[-1]
        if self._device != "cuda":
            return (last - first) / steps
        last.synchronize()
        return first.elapsed_time(last) / 1000 / steps


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, fastest and slowest of the runs, and how many there were."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "runs": len(seconds)}


# ------------------------------------------------------------------------------------------------ memory
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
    try:
        yield
    finally:
        done.set()
        thread.join()


def free_memory(device: str) -> None:
    """Give back what nobody holds any more, to the system or the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's
        libc.malloc_trim(0)


def held_memory(device: str) -> dict[str, int]:
    """Bytes in use, by how they are known."""
    free_memory(device)
    if device == "cuda":
        return {"reserved": torch.cuda.memory_reserved(), "allocated": torch.cuda.memory_allocated()}
    return {"sampled": anonymous_memory()}


def peak_memory(run: Callable[[], Any], device: str, before: dict[str, int]) -> dict[str, int]:
    """Most bytes while `run()` ran, above those `before`.

    On CUDA `reserved` is `max_memory_reserved`, everything the allocator holds, fragments and the pools of CUDA graphs
    too, and `allocated` is `max_memory_allocated`, tensors alone; on the CPU `sampled` is the anonymous memory of the
    process.
    """
    free_memory(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
    else:
        samples = [anonymous_memory()]
        with sampled_peak(samples):
            run()
        peak = {"sampled": max(samples)}
    return {name: peak[name] - before[name] for name in peak}


# ------------------------------------------------------------------------------------------------ operations
PEAK_SIDES = {"cpu": 1024, "cuda": 8192}  # of matrices that keep the device busy


@functools.cache
def matmul_peak(device: str, dtype: torch.dtype, side: int) -> float:
    """Operations per second of square matrix products, the most of 5 measurements of 5 products each."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(5):
            torch.mm(a, b)

    multiply()
    seconds = min(timed(multiply, device)[1] for _ in range(5))
    return 5 * 2 * side**3 / seconds


# ------------------------------------------------------------------------------------------------ differences
def largest_difference(output: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest absolute difference, relative to the largest absolute value of the reference."""
    output, reference = output.float(), reference.float()
    return float((output - reference).abs().max() / reference.abs().max())


def rms(difference: torch.Tensor) -> float:
    """Root of the mean square."""
    return float(difference.double().square().mean().sqrt())


def machine(device: str) -> dict[str, Any]:
    """What figures are measured on, and with."""
    import kandinsky_diffusers  # here: the process that converts must not have it before its memory is first read

    gpu = {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    packages = ("torch", "diffusers", "transformers", "accelerate")
    return {
        **gpu,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "kandinsky_diffusers": kandinsky_diffusers.__version__,
    }


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
