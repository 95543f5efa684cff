"""Time and memory of decoding large pictures with MoVQ whole and in tiles, and how far the two are apart.

    python benchmarks/movq.py [--size 1536x1024] [--repeats 1] [--dtype float32]

The MoVQ of 3.x at full size (270 million parameters, random weights).  Each decoding runs in a process of its own, the
two in turn; of the memory only what is above the loaded model is counted.  With random weights a picture has no
structure, so the difference says less about seams than about the arithmetic.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _common import anonymous_memory, machine, sampled_peak, summary, write_report
from rich.console import Console
from rich.table import Table

from kandinsky_diffusers import MoVQ


ROOT = Path(__file__).resolve().parents[1]
PIXELS_PER_LATENT = 8


def random_movq(dtype: torch.dtype) -> MoVQ:
    """MoVQ as published with 3.0 and 3.1, with random weights."""
    torch.manual_seed(0)
    movq = MoVQ(
        block_out_channels=(256, 512, 512, 1024),
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=1,
        norm_type="spatial",
    )
    return movq.eval().requires_grad_(False).to(dtype=dtype)


def decode(way: str, height: int, width: int, dtype: str, threads: int, picture: Path) -> dict[str, float]:
    """Decode once, store the picture, and tell seconds and peak memory."""
    torch.set_num_threads(threads)
    movq = random_movq(getattr(torch, dtype))
    if way == "tiled":
        movq.enable_tiling()
    latents = torch.randn(1, 4, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT, dtype=movq.dtype)
    samples = [floor := anonymous_memory()]
    with sampled_peak(samples):
        start = time.perf_counter()
        pixels = movq.decode(latents, force_not_quantize=True).sample
        seconds = time.perf_counter() - start
    torch.save(pixels, picture)
    return {"seconds": seconds, "peak_gigabytes": (max(samples) - floor) / 1e9}


def in_new_process(way: str, picture: Path, *arguments: str) -> dict[str, float]:
    """Run `decode` in a fresh interpreter."""
    command = [sys.executable, __file__, *arguments, "--way", way, "--picture", str(picture)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def main(
    size: Annotated[str, typer.Option(help="width x height in pixels, multiples of 8")] = "1536x1024",
    repeats: Annotated[int, typer.Option(min=1, help="measurements of each, taken alternately")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    output: Annotated[Path, typer.Option(help="where the figures go, as JSON")] = Path("benchmark_movq.json"),
    way: Annotated[str, typer.Option(hidden=True)] = "",
    picture: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Measure MoVQ's decoder, tiled against whole."""
    width, height = map(int, size.split("x"))
    if way:
        print(json.dumps(decode(way, height, width, dtype, threads, picture)))
        return
    runs: dict[str, list[dict[str, float]]] = {"whole": [], "tiled": []}
    with tempfile.TemporaryDirectory() as folder:
        pictures = {name: Path(folder) / f"{name}.pt" for name in runs}
        for _ in range(repeats):
            for name in runs:
                arguments = ("--size", size, "--dtype", dtype, "--threads", str(threads))
                runs[name].append(in_new_process(name, pictures[name], *arguments))
        whole, tiled = (torch.load(pictures[name], weights_only=True).float() for name in runs)
    difference = float((whole - tiled).abs().mean() / whole.abs().mean())
    table = Table("", "median [s]", "peak memory [GB]", title=f"MoVQ decodes {size}, {dtype}, {threads} threads")
    report: dict[str, Any] = {"machine": machine(), "size": size, "dtype": dtype, "mean_difference": difference}
    for name, results in runs.items():
        seconds = summary([result["seconds"] for result in results])
        peak = max(result["peak_gigabytes"] for result in results)
        table.add_row(name, f"{seconds['median']:.1f}", f"{peak:.2f}")
        report[name] = {"seconds": seconds, "peak_gigabytes": peak}
    Console().print(table)
    print(f"mean difference of the pixels, relative to their mean absolute value: {difference:.1e}")
    write_report(output, report)


if __name__ == "__main__":
    typer.run(main)
