"""``python -m kandinsky_diffusers.cli``, for where scripts are not on the path."""

from __future__ import annotations

from . import app


app()
