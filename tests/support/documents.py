"""Code blocks of Markdown files, and a small world in which they run as they are.

In that world the names that the documents use (Hub ids, `repos/...`, `cat.png`) are tiny repositories and pictures in
the working directory, large sizes are small, and loops are short. What has no such name cannot be loaded, so
that a block either runs or fails.
"""

from __future__ import annotations

import functools
import inspect
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from kandinsky_diffusers import registry
from kandinsky_diffusers.cli import app
from kandinsky_diffusers.fitting import FittingMixin


COMMAND = "kandinsky-diffusers"
MODULE = "-m kandinsky_diffusers.cli"  # the same
PICTURES = (
    *("cat.png", "starry_night.jpeg", "painting.png", "small.png"),
    *("depth.png", "edges.png", "mask.png", "left.png", "right.png"),
)
SMALL = {"1024": "64", "1000": "72", "768": "64", "512": "64", "384": "32", "256": "32"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line on which it begins."""

    language: str
    code: str
    line: int

    @property
    def lines(self) -> list[str]:
        """Those of a shell block, continued ones joined, without comments."""
        joined = self.code.replace("\\\n", " ").replace(MODULE, COMMAND).splitlines()
        return [line for text in joined if (line := text.partition(" #")[0].strip()) and not line.startswith("#")]


def blocks(text: str) -> list[Block]:
    """All fenced blocks.

    Raises:
        ValueError: there are fences that do not pair, or are indented, so that a block would be missed.
    """
    found = [
        Block(match[1], match[2], text.count("\n", 0, match.start()) + 1)
        for match in re.finditer(r"^```([\w-]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    if text.count("```") != 2 * len(found):
        raise ValueError(f"of {text.count('```')} fences only {2 * len(found)} are those of blocks")
    return found


def furnish(folder: Path, places: Mapping[str, Path]) -> None:
    """Fill a working directory.

    Args:
        folder: the working directory.
        places: name, as documents have it -> what lies there.
    """
    for name, place in places.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(place)
    for number, name in enumerate(PICTURES):
        picture = Image.linear_gradient("L").resize((32, 32)).rotate(number)
        ImageDraw.Draw(picture).ellipse((4, 4 + number, 20, 24), fill=255)
        (picture if name in PICTURES[4:] else picture.convert("RGB")).save(folder / name)
    (folder / "furnished").touch()


def run_python(code: str) -> dict[str, Any]:
    """Run a block, with sizes that are small; returns its variables."""
    variables: dict[str, Any] = {}
    exec(made_small(code), variables)
    return variables


def made_small(text: str) -> str:
    """The same with sizes that are small, and without an accelerator."""
    text = text.replace('"cuda"', '"cpu"')
    return re.sub(r"(?<!\d)\d+(?!\d)", lambda size: SMALL.get(size[0], size[0]), text)


def run_shell(line: str, extra: Mapping[str, tuple[str, ...]]) -> Any:
    """Run a line with our command in it.

    Args:
        line: what comes before the command, such as `accelerate launch`, is left out.
        extra: arguments that the command gets besides, by its name.
    """
    arguments = shlex.split(made_small(line.partition(f"{COMMAND} ")[2]))
    return CliRunner().invoke(app, [*arguments, *extra.get(arguments[0], ())])


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Let pipelines take few steps, and stay where they are, for there is no accelerator."""
    patch.setattr(DiffusionPipeline, "enable_model_cpu_offload", lambda *_, **__: None)
    patch.setattr(FittingMixin, "fit", functools.partialmethod(FittingMixin.fit, device="cpu"))
    combined_or_alone = {cls for family in registry.FAMILIES.values() for pair in family.values() for cls in pair}
    for cls in (*combined_or_alone, *registry.OTHER_PIPELINES):
        if cls is not None and "__call__" in vars(cls):
            patch.setattr(cls, "__call__", _in_few_steps(vars(cls)["__call__"]))


def _in_few_steps(call: Any) -> Any:
    known = inspect.signature(call).parameters
    sizes = {name: 64 for name in ("height", "width") if name in known}
    steps = {"num_inference_steps": 1 if sizes else 2, "prior_num_inference_steps": 2}  # a prior needs two
    steps = {name: number for name, number in steps.items() if name in known}

    @functools.wraps(call)
    def quick(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        return call(pipe, *args, **{**sizes, **kwargs, **steps})

    return quick
