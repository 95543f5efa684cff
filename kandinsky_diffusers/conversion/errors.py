"""The one exception of the conversion package."""

from __future__ import annotations


class ConversionError(ValueError):
    """A release, an option or the machine does not allow the conversion; the message says what to do about it."""
