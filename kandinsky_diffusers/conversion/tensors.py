"""The tensors of a model, whatever files they lie in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .matching import Shape
from .reader import WeightFile


if TYPE_CHECKING:
    import torch


Facts = tuple[Shape | None, str | None]


class Tensors:
    """The tensors of one or several files, of which no two have a key in common.

    Args:
        files: opened; their tensors are read when they are asked for.
    """

    def __init__(self, files: Iterable[WeightFile]) -> None:
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._homes: dict[str, WeightFile] = {}
        for file in files:
            shapes = file.shapes
            self.shapes |= shapes
            self.dtypes |= file.dtypes
            self._homes |= dict.fromkeys(shapes, file)

    def facts(self, key: str) -> Facts:
        """Shape and dtype (such as ``float16``) of the tensor of that name; None where it is missing."""
        return self.shapes.get(key), self.dtypes.get(key)

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor of that name.

        Raises:
            ConversionError: it cannot be read, or is none.
        """
        return self._homes[key].tensor(key)
