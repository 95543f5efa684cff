"""The weights of a repository in the Hub's format: which files of a folder belong together."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import ConversionError
from .reader import is_index, open_weights
from .sources import WEIGHT_ENDINGS
from .tensors import Tensors


_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+")
_VARIANT_OF_INDEX = re.compile(r"\.index\.(\w+)\.json$")


def weight_sets(folder: Path) -> list[Path]:
    """The sets of weights in a folder, each a file or the index of several, the best first.

    Full precision goes before variants, safetensors before pickles, one file before several.
    """
    found = [path for path in folder.iterdir() if is_of_weights(path) and path.is_file()]
    return sorted((path for path in found if not _SHARD.search(path.name)), key=_rank)


def _rank(path: Path) -> tuple[bool, bool, bool, str]:
    return variant_of(path) is not None, ".safetensors" not in path.name, is_index(path), path.name


def variant_of(path: Path) -> str | None:
    """The variant that a set of weights is by its name, such as ``fp16``; None if it is none."""
    if is_index(path):
        found = _VARIANT_OF_INDEX.search(path.name)
        return found and found[1]
    return ".".join(path.name.split(".")[1:-1]) or None


def is_of_weights(path: Path) -> bool:
    """Whether a path is named like weights, or like an index of some."""
    return path.suffix in WEIGHT_ENDINGS or is_index(path)


def models_of(folder: Path) -> dict[str, Path]:
    """The folders with weights by their names: those in ``folder``, and with an empty name ``folder`` itself.

    Raises:
        ConversionError: there is none.
    """
    places = {"": folder} | {place.name: place for place in sorted(folder.iterdir()) if place.is_dir()}
    found = {name: place for name, place in places.items() if any(map(is_of_weights, place.iterdir()))}
    if not found:
        raise ConversionError(f"{folder} holds no weights ({', '.join(WEIGHT_ENDINGS)}), nor does a folder in it.")
    return found


def open_model(folder: Path) -> Tensors:
    """The weights in a folder; of several sets the first, see :func:`weight_sets`.

    Raises:
        ConversionError: there are none, or they cannot be read.
    """
    sets = weight_sets(folder) if folder.is_dir() else []
    if not sets:
        raise ConversionError(f"{folder} holds no weights, or only parts of some without their index.")
    return Tensors([open_weights(sets[0])])
