"""Time and memory of converting a full-size decoder, against copying the file and computing its SHA-256.

    python benchmarks/conversion.py [--rounds 3] [--folder FOLDER]

Builds a release with a ``decoder_fp16.ckpt`` of the published size (2.5 GB, random numbers) and tiny other parts, then
runs both jobs in turn, each in a process of its own, and prints medians.  Needs about 8 GB of disk; imports are not
counted, and of the memory only what is above the interpreter with torch imported.
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
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
INVENTORY = ROOT / "tests/data/inventory/k21_decoder_fp16.ckpt.json.gz"
FAMILY = ROOT / "tests/data/goldens/kandinsky-2.1"


def build_release(folder: Path) -> Path:
    """A release with a decoder of full size."""
    from tests.support.release import build_release

    build_release(FAMILY, folder)
    for name in ("prior_fp16.ckpt", "inpainting_fp16.ckpt"):
        (folder / name).unlink()
    shapes = json.loads(gzip.decompress(INVENTORY.read_bytes()))["tensors"]
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}
    torch.save(tensors, folder / "decoder_fp16.ckpt")
    return folder


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


def run_convert(release: Path, output: Path) -> dict[str, float]:
    """Convert, and tell seconds and peak memory."""
    floor = anonymous_memory()
    from kandinsky_diffusers.conversion import convert, plan_source

    plan_source(release)  # imports the classes of the models
    samples = [floor]
    with sampled_peak(samples):
        start = time.perf_counter()
        convert(release, output, version="2.1")
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_megabytes": (max(samples) - floor) / 1e6}


def run_copy(release: Path, output: Path) -> dict[str, float]:
    """Copy the decoder with fsync and compute its SHA-256, one after the other."""
    from kandinsky_diffusers.conversion.reader import file_sha256

    source = release / "decoder_fp16.ckpt"
    output.mkdir()
    start = time.perf_counter()
    shutil.copyfile(source, output / source.name)
    with (output / source.name).open("rb+") as file:
        os.fsync(file.fileno())
    file_sha256(source)
    return {"seconds": time.perf_counter() - start}


JOBS = {"convert": run_convert, "copy": run_copy}


def in_new_process(job: str, release: Path, output: Path) -> dict[str, float]:
    """Run a job in a fresh interpreter."""
    command = [sys.executable, __file__, "--job", job, "--folder", str(release), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    shutil.rmtree(output)
    return json.loads(answer.splitlines()[-1])


def main() -> None:
    """Parse arguments and print figures."""
    parser = argparse.ArgumentParser(description="Time and memory of converting a full-size decoder.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(JOBS[arguments.job](arguments.folder, arguments.output)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        release = build_release(Path(folder) / "release")
        results: dict[str, list[dict[str, float]]] = {job: [] for job in JOBS}
        for _ in range(arguments.rounds):
            for job in JOBS:
                results[job].append(in_new_process(job, release, Path(folder) / "output"))
        size = (release / "decoder_fp16.ckpt").stat().st_size
    convert, copy = (statistics.median(result["seconds"] for result in results[job]) for job in ("convert", "copy"))
    peak = max(result["peak_megabytes"] for result in results["convert"])
    print(f"decoder_fp16.ckpt: {size / 1e9:.2f} GB, {arguments.rounds} rounds")
    print(f"copy + fsync + SHA-256: {copy:.1f} s")
    print(f"convert:                {convert:.1f} s, {convert / copy:.2f} times as long")
    print(f"peak anonymous memory:  {peak:.0f} MB above the interpreter with torch")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
