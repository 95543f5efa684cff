"""The weights of a repository in the Hub's format: which files of a folder belong together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ConversionError
from .reader import is_index, open_weights
from .sources import WEIGHT_ENDINGS
from .tensors import Tensors


_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+")
_VARIANT_OF_INDEX = re.compile(r"\.index\.(\w+)\.json$")


@dataclass(frozen=True)
class WeightSet:
    """All tensors of a model, in one file or in those that an index lists.

    Args:
        path: the file, or the index.
    """

    path: Path

    @property
    def variant(self) -> str | None:
        """Such as ``fp16``; None for weights that are not a variant."""
        if is_index(self.path):
            found = _VARIANT_OF_INDEX.search(self.path.name)
            return found and found[1]
        return ".".join(self.path.name.split(".")[1:-1]) or None

    @property
    def _rank(self) -> tuple[bool, bool, bool, str]:
        return self.variant is not None, ".safetensors" not in self.path.name, is_index(self.path), self.path.name


def weight_sets(folder: Path) -> list[WeightSet]:
    """What lies in a folder: no variant before variants, safetensors before pickles, one file before several."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    whole = [path for path in files if path.suffix in WEIGHT_ENDINGS and not is_shard(path)]
    return sorted((WeightSet(path) for path in (*whole, *filter(is_index, files))), key=lambda found: found._rank)


def is_shard(path: Path) -> bool:
    """Whether a file is named like one of several, such as ``model-00001-of-00002.safetensors``."""
    return path.suffix in WEIGHT_ENDINGS and _SHARD.search(path.name) is not None


def models_of(folder: Path) -> dict[str, Path]:
    """The folders with weights by their names: those in ``folder``, and with an empty name ``folder`` itself.

    Raises:
        ConversionError: there is none.
    """
    places = {"": folder} | {place.name: place for place in sorted(folder.iterdir()) if place.is_dir()}
    found = {name: place for name, place in places.items() if any(map(_is_of_weights, place.iterdir()))}
    if not found:
        raise ConversionError(f"{folder} holds no weights ({', '.join(WEIGHT_ENDINGS)}), nor does a folder in it.")
    return found


def _is_of_weights(path: Path) -> bool:
    return path.suffix in WEIGHT_ENDINGS or is_index(path)


def open_model(folder: Path) -> Tensors:
    """The weights in a folder; of several sets the first, see :func:`weight_sets`.

    Raises:
        ConversionError: there are none, or they cannot be read.
    """
    sets = weight_sets(folder) if folder.is_dir() else []
    if not sets:
        raise ConversionError(f"{folder} holds no weights, or only parts of some without their index.")
    return Tensors([open_weights(sets[0].path)])
