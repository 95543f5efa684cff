"""Time, memory and difference, ours against stock diffusers, at published sizes: `python -m benchmarks --help`."""

from __future__ import annotations
