"""Golden sets: tiny releases as manifests, and results recorded from the original implementation.

A set is a folder with one sub-folder per family (``kandinsky-2.1``, ...), each with ``hyperparameters.json``,
``manifest/``, ``files/`` (see `tests.support.release`) and ``cases/``, where every case is a JSON that describes it
and a safetensors file with its inputs, random draws and outputs. The environment variable ``KANDINSKY_GOLDENS`` names
another set than the one in ``tests/data/goldens``.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


DEFAULT_SET = Path(__file__).resolve().parents[1] / "data" / "goldens"


def golden_root() -> Path:
    """The folder of the golden set in use."""
    return Path(os.environ.get("KANDINSKY_GOLDENS", DEFAULT_SET)).resolve()


@dataclass(frozen=True)
class GoldenCase:
    """One recorded case: `info` is its JSON, `tensors` its inputs, random draws and reference outputs by name."""

    name: str
    info: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def parameters(self) -> dict[str, Any]:
        """The arguments that the original was called with."""
        return self.info["parameters"]

    @property
    def timesteps(self) -> list[int]:
        """Training timesteps in the order in which the network was called."""
        return self.info["timesteps"]

    def random(self) -> dict[str, torch.Tensor]:
        """The recorded random draws."""
        return {name: t for name, t in self.tensors.items() if self.info["tensors"][name]["role"] == "random"}


@dataclass(frozen=True)
class GoldenFamily:
    """One family of a golden set, at `path`."""

    path: Path

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Sizes and settings, under the names of the original's configuration."""
        return json.loads((self.path / "hyperparameters.json").read_text(encoding="utf-8"))

    @property
    def schedules(self) -> dict[str, Any]:
        """Timesteps of the original's samplers for several numbers of steps."""
        return json.loads((self.path / "cases" / "schedules.json").read_text(encoding="utf-8"))

    def case_names(self, prefix: str = "") -> list[str]:
        """Names of the cases with tensors, sorted."""
        return sorted(path.stem for path in (self.path / "cases").glob(f"{prefix}*.safetensors"))

    def case(self, name: str) -> GoldenCase:
        """Read one case."""
        stem = self.path / "cases" / name
        info = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        return GoldenCase(name, info, load_file(stem.with_suffix(".safetensors")))


def golden_family(name: str) -> GoldenFamily:
    """The family called `name` (``"kandinsky-2.1"``) of the golden set in use."""
    path = golden_root() / name
    if not path.is_dir():
        raise FileNotFoundError(f"the golden set {golden_root()} has no family {name!r}")
    return GoldenFamily(path)
