"""The command line: ``kandinsky-diffusers convert | inspect | demo | generate``.

Each command is a function of the library behind a few lines that read arguments and show results.
"""

from __future__ import annotations

import typer

from .conversion import convert, inspect
from .drawing import demo
from .generate import generate


app = typer.Typer(
    name="kandinsky-diffusers",
    help="Kandinsky in diffusers: conversion of original checkpoints, many pictures in one go, and a demonstration.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (convert, inspect, demo, generate):
    app.command()(command)
