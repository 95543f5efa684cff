"""Convert a LoRA of the Kandinsky 3 fork; the same as ``kandinsky-diffusers convert --version 3-lora``.

python conversion_scripts/convert_kandinsky_3_lora.py FOLDER OUTPUT_FOLDER [--verify] [--plan] [--help]
"""

from __future__ import annotations

import sys

from kandinsky_diffusers.cli import app


if __name__ == "__main__":
    app(["convert", "--version", "3-lora", *sys.argv[1:]])
