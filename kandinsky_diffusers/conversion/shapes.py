"""What the shapes of tensors tell of a model's sizes."""

from __future__ import annotations

import re

from .errors import ConversionError
from .matching import Shapes


def shape_of(shapes: Shapes, key: str) -> tuple[int, ...]:
    """The shape of a tensor that tells a size.

    Raises:
        ConversionError: there is no such tensor.
    """
    if key not in shapes:
        raise ConversionError(f"The tensor {key}, which tells a size of the model, is missing.")
    return shapes[key]


def count_modules(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules lie below ``prefix``."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return len({found[1] for key in shapes if (found := pattern.match(key))})
