"""How many steps each scheduler needs: the share of pictures that show what the prompt asks for, ours beside stock's.

    python -m benchmarks.gauge [--steps 2,4,8,15,30,50] [--seeds 1] [--output FOLDER]

The tiny Kandinsky of `training/` draws every shape in every colour, asked for in English and in Russian, and
`training.reading` tells by simple image analysis what is in the pictures. A picture is right if it shows one shape,
and colour and shape are those of the prompt. Image embeddings are made once, by our prior; then the same decoder draws
from the same seeds: with our pipeline and our scheduler, and with stock's. Stock's pipeline hands a generator to every
scheduler, and those that take none fail; there stock's scheduler runs in our pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.kandinsky import KandinskyPipeline as StockKandinskyPipeline
from rich.console import Console
from rich.table import Table

from kandinsky_diffusers import KandinskyPipeline, KandinskyPriorPipeline
from kandinsky_diffusers.schedulers import (
    KandinskyAncestralScheduler,
    KandinskyDDIMScheduler,
    KandinskyPNDMScheduler,
)
from training.captions import LANGUAGES
from training.evaluation import Wish, seeded, shares, wishes
from training.reading import Reading, read
from training.world import SIZE

from .cases import OURS, STOCK
from .gauge_chart import STOCK_IN_OURS, write_chart
from .measure import machine
from .selection import listed
from .tiny import RELEASE, tiny_repos


PIPELINES: dict[str, Any] = {OURS: KandinskyPipeline, STOCK: StockKandinskyPipeline, STOCK_IN_OURS: KandinskyPipeline}
AT_ONCE = 35  # pictures drawn together
PRIOR_STEPS = 25
GUIDANCE = 4.0

Row = dict[str, Any]


def _as_published(scheduler: Any, repo: Path, folder: str = "scheduler", **settings: Any) -> Any:
    """A scheduler with the settings that a converted repository has for it."""
    return scheduler.from_config(scheduler.load_config(repo, subfolder=folder), **settings)


_stock_pndm = partial(_as_published, PNDMScheduler, skip_prk_steps=True)

# kind -> for each side, what makes its scheduler for a repository
SCHEDULERS: dict[str, dict[str, Callable[[Path], Any]]] = {
    "DDIM": {
        OURS: partial(_as_published, KandinskyDDIMScheduler),
        STOCK: partial(_as_published, DDIMScheduler),
    },
    "PNDM": {
        OURS: partial(_as_published, KandinskyPNDMScheduler),
        STOCK: _stock_pndm,
        STOCK_IN_OURS: _stock_pndm,
    },
    "ancestral": {
        OURS: partial(_as_published, KandinskyAncestralScheduler, folder="ancestral_scheduler"),
        STOCK: partial(_as_published, DDPMScheduler, folder="ddpm_scheduler"),
    },
    # of these we have no classes
    "DPM++ 2M": dict.fromkeys((STOCK_IN_OURS, STOCK), partial(_as_published, DPMSolverMultistepScheduler)),
    "UniPC": dict.fromkeys((STOCK_IN_OURS, STOCK), partial(_as_published, UniPCMultistepScheduler)),
}


@dataclass(frozen=True)
class Order:
    """What is drawn, with the embeddings that are drawn from.

    Args:
        wishes: prompts, and what their pictures have to show.
        image_embeds: `[pictures, width]`.
        negative_image_embeds: likewise.
        seed: of the first picture; each following one has the next.
    """

    wishes: list[Wish]
    image_embeds: torch.Tensor
    negative_image_embeds: torch.Tensor
    seed: int

    def generators(self) -> list[torch.Generator]:
        """One for each picture, anew."""
        return seeded(self.seed, len(self.wishes))


def orders(prior: KandinskyPriorPipeline, seeds: int) -> Iterator[Order]:
    """All shapes in all colours, in all languages, with so many seeds for each."""
    asked = [wish for language in LANGUAGES for wish in wishes(language)] * seeds
    for start in range(0, len(asked), AT_ONCE):
        some = asked[start : start + AT_ONCE]
        embeds = prior(
            [wish.prompt for wish in some],
            num_inference_steps=PRIOR_STEPS,
            generator=seeded(start, len(some)),
        )
        yield Order(some, embeds.image_embeds, embeds.negative_image_embeds, start)


def drawn(pipeline: Any, order: Order, steps: int) -> list[Reading]:
    """What is seen in the pictures."""
    images = pipeline(
        [wish.prompt for wish in order.wishes],
        image_embeds=order.image_embeds,
        negative_image_embeds=order.negative_image_embeds,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        height=SIZE,
        width=SIZE,
        generator=order.generators(),
    ).images
    return [read(image) for image in images]


def measure(pipeline: Any, asked: Sequence[Order], steps: int) -> Row:
    """Figures of a pipeline at a number of steps; what fails is told of."""
    try:
        seen = [reading for order in asked for reading in drawn(pipeline, order, steps)]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return {"steps": steps, "error": f"{type(error).__name__}: {error}"}
    return {
        "steps": steps,
        "timesteps": len(pipeline.scheduler.timesteps),
        "pictures": len(seen),
        "shares": shares([wish for order in asked for wish in order.wishes], seen),
    }


def print_rows(rows: Iterable[Row]) -> None:
    """Print a table: a line for each scheduler of each side, a column for each number of steps."""
    rows = list(rows)
    counts = sorted({row["steps"] for row in rows})
    table = Table("scheduler", "classes", *map(str, counts), title="share of pictures that are right, by steps")
    for kind, side in dict.fromkeys((row["scheduler"], row["classes"]) for row in rows):
        of_line = {row["steps"]: row for row in rows if (row["scheduler"], row["classes"]) == (kind, side)}
        cells = [f"{of_line[n]['shares']['both']:.0%}" if "shares" in of_line[n] else "fails" for n in counts]
        table.add_row(kind, side, *cells)
    Console().print(table)


def main(
    release: Annotated[Path, typer.Option(help="folder of the release that draws coloured shapes")] = RELEASE,
    steps: Annotated[str, typer.Option(help="numbers of steps, separated by commas")] = "2,4,8,15,30,50",
    schedulers: Annotated[str, typer.Option(help="kinds, separated by commas")] = ",".join(SCHEDULERS),
    seeds: Annotated[int, typer.Option(min=1, help="pictures of each prompt")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    output: Annotated[Path, typer.Option(help="folder of gauge.json and gauge.svg")] = Path("benchmark_output"),
) -> None:
    """Draw with every scheduler at every number of steps, ours and stock's, and count what is right."""
    kinds = listed(schedulers)
    if unknown := set(kinds) - set(SCHEDULERS):
        raise typer.BadParameter(f"`schedulers` has {sorted(unknown)}; accepted are {', '.join(SCHEDULERS)}.")
    torch.set_num_threads(threads)
    rows: list[Row] = []
    with tiny_repos(release) as repos:
        prior = KandinskyPriorPipeline.from_pretrained(repos / "kandinsky-2-1-prior").to(device)
        prior.set_progress_bar_config(disable=True)
        asked = list(orders(prior, seeds))
        repo = repos / "kandinsky-2-1"
        for side, cls in PIPELINES.items():
            pipeline = cls.from_pretrained(repo).to(device)
            pipeline.set_progress_bar_config(disable=True)
            for kind in (kind for kind in kinds if side in SCHEDULERS[kind]):
                pipeline.scheduler = SCHEDULERS[kind][side](repo)
                about = {"scheduler": kind, "classes": side, "class": type(pipeline.scheduler).__name__}
                rows += [{**about, **measure(pipeline, asked, int(count))} for count in listed(steps)]
    rows.sort(key=lambda row: (list(SCHEDULERS).index(row["scheduler"]), row["classes"], row["steps"]))
    print_rows(rows)
    output.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine(device),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "device": device,
        "prior_steps": PRIOR_STEPS,
        "guidance_scale": GUIDANCE,
        "rows": rows,
    }
    (output / "gauge.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_chart(rows, output / "gauge.svg")


if __name__ == "__main__":
    typer.run(main)
