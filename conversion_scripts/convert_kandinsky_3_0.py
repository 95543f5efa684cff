"""Convert the original Kandinsky 3.0 release; the same as ``kandinsky-diffusers convert --version 3.0``.

python conversion_scripts/convert_kandinsky_3_0.py RELEASE_FOLDER OUTPUT_FOLDER --text-encoder FLAN_UL2_FOLDER [--plan]
"""

from __future__ import annotations

import sys

from kandinsky_diffusers.cli import app


if __name__ == "__main__":
    app(["convert", "--version", "3.0", *sys.argv[1:]])
