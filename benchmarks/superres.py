"""Time and memory of one window of KandiSuperRes at full size, which is all that it ever has to hold.

    python benchmarks/superres.py [--size 1024] [--repeats 1] [--dtype float32]

The UNet as published (413 million parameters, random weights) runs once on a window, in a process of its own; of the
memory only what is above the loaded model is counted.  A picture of any size takes as many of these as it has windows,
times the steps.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _common import anonymous_memory, machine, sampled_peak, summary, write_report

from kandinsky_diffusers import KandiSuperResUNet


def random_unet(dtype: torch.dtype) -> Any:
    """The UNet as published, with random weights."""
    torch.manual_seed(0)
    return KandiSuperResUNet().eval().requires_grad_(False).to(dtype=dtype)


def main(
    size: Annotated[int, typer.Option(min=8, help="side of the window in pixels, a multiple of 8")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="measurements")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    output: Annotated[Path, typer.Option(help="where the figures go, as JSON")] = Path("benchmark_superres.json"),
) -> None:
    """Measure one call of the UNet."""
    torch.set_num_threads(threads)
    unet = random_unet(getattr(torch, dtype))
    window = torch.randn(1, 3, size, size, dtype=unet.dtype)
    seconds, samples = [], [floor := anonymous_memory()]
    with sampled_peak(samples):
        for _ in range(repeats):
            start = time.perf_counter()
            unet(window, 999, window)
            seconds.append(time.perf_counter() - start)
    report = {
        "machine": machine(),
        "size": size,
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "model_gigabytes": floor / 1e9,
        "window_gigabytes": (max(samples) - floor) / 1e9,
        "seconds": summary(seconds),
    }
    print(f"one window of {size} x {size}, {dtype}, {threads} threads: {report['seconds']['median']:.1f} s,", end=" ")
    print(f"{report['window_gigabytes']:.2f} GB above the {report['model_gigabytes']:.2f} GB of the process")
    write_report(output, report)


if __name__ == "__main__":
    typer.run(main)
