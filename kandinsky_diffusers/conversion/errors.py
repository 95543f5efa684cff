"""The one exception of the conversion package, and what it often says."""

from __future__ import annotations

from pathlib import Path


class ConversionError(ValueError):
    """A release, an option or the machine does not allow the conversion; the message says what to do about it."""


def damaged(path: Path, error: Exception) -> ConversionError:
    """What is said of a weight file that ``error`` keeps from being read."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ConversionError(
        f"{path} ({path.stat().st_size} bytes) is truncated, damaged or not a weight file: {reason}"
    )
