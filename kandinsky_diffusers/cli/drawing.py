"""Commands that draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Bar, bars_on_stderr, plain_errors


def demo(
    release: Annotated[Path, typer.Argument(help="Folder of a (small) Kandinsky 2.1 release.")],
    output: Annotated[Path, typer.Argument(help="Where to leave repositories and pictures.")] = Path("demo_output"),
) -> None:
    """Convert a release, load it with AutoPipeline, and draw."""
    from ..demo import run_demo

    with plain_errors(), bars_on_stderr() as bars:
        grid = run_demo(release, output, progress=lambda **options: Bar(bars, **options))
    typer.echo(f"drawn: {grid}")
