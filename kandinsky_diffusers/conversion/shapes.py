"""What the shapes of tensors tell of a model's sizes."""

from __future__ import annotations

import re

from .errors import ConversionError
from .matching import Shapes


MOST_MODULES = 256  # that are numbered in one place, far more than in any published model


def shape_of(shapes: Shapes, key: str) -> tuple[int, ...]:
    """The shape of a tensor that tells a size.

    Raises:
        ConversionError: there is no such tensor.
    """
    if key not in shapes:
        raise ConversionError(f"The tensor {key}, which tells a size of the model, is missing.")
    return shapes[key]


def count_modules(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules lie below ``prefix``.

    Raises:
        ConversionError: more than any model has.
    """
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    count = len({found[1] for key in shapes if (found := pattern.match(key))})
    if count > MOST_MODULES:
        raise ConversionError(f"There are {count} modules {prefix}; models have up to {MOST_MODULES}.")
    return count
