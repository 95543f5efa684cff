"""Convert a ControlNet of Kandinsky 3.1; the same as ``kandinsky-diffusers convert --version 3-controlnet``.

python conversion_scripts/convert_kandinsky_3_controlnet.py FOLDER OUTPUT_FOLDER [--plan] [--help]
"""

from __future__ import annotations

import sys

from kandinsky_diffusers.cli import app


if __name__ == "__main__":
    app(["convert", "--version", "3-controlnet", *sys.argv[1:]])
