"""Commands that draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Bar, bars_on_stderr, plain_errors


def demo(
    release: Annotated[Path, typer.Argument(help="Folder of a (small) Kandinsky 2.1 release.")],
    output: Annotated[Path, typer.Argument(help="Where to leave repositories and pictures.")] = Path("demo_output"),
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to draw, several times; else coloured shapes.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side in pixels. [the one the release knows]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the decoder.")] = 25,
    prior_steps: Annotated[int, typer.Option(min=1, help="Steps of the prior.")] = 10,
) -> None:
    """Convert a release, load it with AutoPipeline, and draw a page of pictures."""
    from ..demo import COLOURED_SHAPES, Motifs, Settings, run_demo

    with plain_errors(ValueError), bars_on_stderr() as bars:
        settings = Settings(Motifs.of(prompts) if prompts else COLOURED_SHAPES, size, steps, prior_steps)
        page = run_demo(release, output, settings, progress=lambda **options: Bar(bars, **options))
    typer.echo(f"drawn: {page}, from the release {release}")
