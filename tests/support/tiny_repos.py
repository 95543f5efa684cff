"""Everything that the examples use, tiny: `python -m tests.support.tiny_repos FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kandinsky_diffusers.conversion import convert
from tests.support.goldens import golden_family
from tests.support.hed import random_weights
from tests.support.language_model import make_language_model
from tests.support.release import build_release
from tests.support.shallow import shallow_3


FAMILIES = (
    "kandinsky-3.1",
    "kandinsky-3-controlnet",
    "kandinsky-3-ip-adapter",
    "kandinsky-3-lora",
    "kandisuperres",
)


def write_tiny_repos(folder: Path) -> Path:
    """Convert the tiny releases of the golden set in use, with few layers, and make a language model."""
    families = {name: golden_family(name) for name in FAMILIES}
    with TemporaryDirectory() as scratch:
        releases = {
            name: build_release(family.path, Path(scratch, name), shallow_3) for name, family in families.items()
        }
        torch.save(random_weights(), releases["kandinsky-3-controlnet"] / "ControlNetHED.pth")
        for name, release in releases.items():
            needed: dict[str, Any] = {"refiner": releases["kandinsky-3.1"]} if name == "kandisuperres" else {}
            config = families["kandinsky-3.1"].hyperparameters | families[name].hyperparameters
            convert(release, folder, original_config=config, **needed)
    make_language_model(folder / "neural-chat-7b-v3-1")
    return folder


if __name__ == "__main__":
    write_tiny_repos(Path(sys.argv[1]))
