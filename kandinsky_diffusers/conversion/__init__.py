"""Conversion of original checkpoints: an engine that knows no Kandinsky, and rules that come as data.

``convert`` does everything; ``plan`` tells from keys and shapes alone what would become of a file; ``inspect`` tells
what a file is; ``verify`` tells whether a repository is sound, or the same as another one or as an original.  Each
family describes its release in ``variants.py`` and its tensors in ``weights.py``.
"""

from __future__ import annotations

from .engine import Report, convert
from .errors import ConversionError
from .inspection import FileReport, inspect
from .planning import ModelPlan
from .preview import plan, plan_source
from .reports import Verification
from .verification import verify


__all__ = [
    "ConversionError",
    "FileReport",
    "ModelPlan",
    "Report",
    "Verification",
    "convert",
    "inspect",
    "plan",
    "plan_source",
    "verify",
]
