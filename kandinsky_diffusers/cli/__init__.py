"""The command line: ``kandinsky-diffusers convert | inspect | verify | push | generate | demo``.

Each command is a function of the library behind a few lines that read arguments and show results.
"""

from __future__ import annotations

import typer

from .conversion import convert, inspect
from .drawing import demo
from .generate import generate
from .push import push
from .verify import verify


app = typer.Typer(
    name="kandinsky-diffusers",
    help="Kandinsky in diffusers: from original checkpoints to the Hub, and to pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (convert, inspect, verify, push, generate, demo):
    app.command()(command)
