"""`python -m training`: train all models, and write the release."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from .corpus import prepare
from .crew import RESERVE, Crew, start_imports
from .stages import Plan


logger = logging.getLogger("training")


def main(
    output: Annotated[Path, typer.Option(help="folder of the release; the logs go beside it")],
    work: Annotated[Path, typer.Option(help="folder of pictures, tokenizers and checkpoints, to go on from")],
    scenes: Annotated[int, typer.Option(min=1, help="pictures to train on")] = 20000,
    time_limit: Annotated[float, typer.Option(help="seconds for everything; 0: the steps count")] = 0.0,
    processes: Annotated[int, typer.Option(min=0, help="stages at a time; 0: four on a GPU, else two")] = 0,
    shorter: Annotated[float, typer.Option(min=0.0, help="divides the steps of each stage")] = 1.0,
    seed: Annotated[int, typer.Option(help="of all that is random")] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="leave a GPU alone")] = False,
) -> None:
    """Train a tiny Kandinsky 2.1 and write it as an original release. What is done already is not done again."""
    began = time.time()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    ends = began + max(1.0, time_limit - RESERVE) if time_limit else None
    plan = Plan(work, seed, cpu, shorter, began, ends)
    start_imports()
    prepare(work, scenes, seed)
    logger.info("%d scenes after %.0f s", scenes, time.time() - began)
    on_gpu = torch.cuda.is_available() and not cpu
    missing = Crew(plan, output, processes or (4 if on_gpu else 2)).run()
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6
    logger.info("%s: %.1f MB after %.0f s", output, size, time.time() - began)
    if missing:
        logger.error("not finished: %s", ", ".join(missing))
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
