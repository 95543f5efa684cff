"""Time and memory of converting a full-size checkpoint, against copying the file and computing its SHA-256.

    python -m benchmarks.conversion [--release 2.1] [--rounds 3] [--folder FOLDER]

Builds a release with one main file of the published size (2.1: ``decoder_fp16.ckpt``, 2.5 GB of random numbers; 3.1:
``kandinsky3.pt``, 12 GB of zeros) and tiny other parts, then runs both jobs in turn, each in a process of its own, and
prints medians.  Needs three times the size of the file on the disk; imports are not counted, and of the memory only
what is above the interpreter with torch imported.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .measure import anonymous_memory, sampled_peak


ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"


@dataclass(frozen=True)
class Case:
    """A release and its file of full size.

    Args:
        family: the tiny release in the golden set.
        file: what is replaced by a file of full size.
        inventory: its keys and shapes.
        others: main files that are left out.
    """

    family: str
    file: str
    inventory: str
    others: tuple[str, ...]


CASES = {
    "2.1": Case(
        "kandinsky-2.1",
        "decoder_fp16.ckpt",
        "k21_decoder_fp16.ckpt",
        ("prior_fp16.ckpt", "inpainting_fp16.ckpt"),
    ),
    "3.1": Case(
        "kandinsky-3.1",
        "weights/kandinsky3.pt",
        "k3_unet",
        ("weights/kandinsky3_flash.pt", "weights/kandinsky3_inpainting.pt"),
    ),
}


def build_release(version: str, folder: Path) -> Path:
    """A release whose main file has full size."""
    from tests.support.release import build_release

    case = CASES[version]
    build_release(DATA / "goldens" / case.family, folder)
    for name in case.others:
        (folder / name).unlink()
    inventory = DATA / "inventory" / f"{case.inventory}.json.gz"
    shapes = json.loads(gzip.decompress(inventory.read_bytes()))["tensors"]
    fill = fill_21 if version == "2.1" else fill_31
    fill(shapes, folder)
    return folder


def fill_21(shapes: dict[str, list[int]], folder: Path) -> None:
    """The decoder, of random numbers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}
    torch.save(tensors, folder / "decoder_fp16.ckpt")


def fill_31(shapes: dict[str, list[int]], folder: Path) -> None:
    """The UNet, of zeros: pages that are never written take no memory. The tiny text encoder stays."""
    width = shapes["feature_pooling.attention.to_key.weight"][1]
    unet = {key: torch.from_numpy(np.zeros(shape, np.float32)) for key, shape in shapes.items()}
    torch.save({"unet": unet, "null_embedding": torch.zeros(width)}, folder / "weights/kandinsky3.pt")
    projection = folder / "weights/flan_ul2_encoder/projection.pt"
    text_width = torch.load(projection, weights_only=True)["0.weight"].shape[1]
    linear, norm = torch.zeros(width, text_width), torch.zeros(width)
    torch.save({"0.weight": linear, "1.weight": norm, "1.bias": norm}, projection)


def run_convert(version: str, release: Path, output: Path) -> dict[str, float]:
    """Convert, and tell seconds and peak memory."""
    floor = anonymous_memory()
    from kandinsky_diffusers.conversion import convert, plan_source

    plan_source(release, version=version)  # imports the classes of the models
    samples = [floor]
    with sampled_peak(samples):
        start = time.perf_counter()
        convert(release, output, version=version)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_megabytes": (max(samples) - floor) / 1e6}


def run_copy(version: str, release: Path, output: Path) -> dict[str, float]:
    """Copy the file with fsync and compute its SHA-256, one after the other."""
    from kandinsky_diffusers.conversion.reader import file_sha256

    source = release / CASES[version].file
    output.mkdir()
    start = time.perf_counter()
    shutil.copyfile(source, output / source.name)
    with (output / source.name).open("rb+") as file:
        os.fsync(file.fileno())
    file_sha256(source)
    return {"seconds": time.perf_counter() - start}


JOBS = {"convert": run_convert, "copy": run_copy}


def in_new_process(job: str, version: str, release: Path, output: Path) -> dict[str, float]:
    """Run a job in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.conversion", "--job", job, "--release", version]
    command += ["--folder", str(release), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    shutil.rmtree(output)
    return json.loads(answer.splitlines()[-1])


def measure(version: str, folder: Path, rounds: int) -> tuple[int, dict[str, list[dict[str, float]]]]:
    """Size of the main file in bytes, and of each job what every run of it said."""
    release = build_release(version, folder / "release")
    results: dict[str, list[dict[str, float]]] = {job: [] for job in JOBS}
    for _ in range(rounds):
        for job in JOBS:
            results[job].append(in_new_process(job, version, release, folder / "output"))
    return (release / CASES[version].file).stat().st_size, results


def main() -> None:
    """Parse arguments and print figures."""
    parser = argparse.ArgumentParser(description="Time and memory of converting a full-size checkpoint.")
    parser.add_argument("--release", choices=CASES, default="2.1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(JOBS[arguments.job](arguments.release, arguments.folder, arguments.output)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        size, results = measure(arguments.release, Path(folder), arguments.rounds)
    convert, copy = (statistics.median(result["seconds"] for result in results[job]) for job in ("convert", "copy"))
    peak = max(result["peak_megabytes"] for result in results["convert"])
    print(f"{CASES[arguments.release].file}: {size / 1e9:.2f} GB, {arguments.rounds} rounds")
    print(f"copy + fsync + SHA-256: {copy:.1f} s")
    print(f"convert:                {convert:.1f} s, {convert / copy:.2f} times as long")
    print(f"peak anonymous memory:  {peak:.0f} MB above the interpreter with torch")


if __name__ == "__main__":
    main()
