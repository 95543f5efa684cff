"""Convert the original Kandinsky 3.1 release; the same as ``kandinsky-diffusers convert --version 3.1``.

python conversion_scripts/convert_kandinsky_3_1.py RELEASE_FOLDER OUTPUT_FOLDER [--link-shared] [--plan] [--help]
"""

from __future__ import annotations

import sys

from kandinsky_diffusers.cli import app


if __name__ == "__main__":
    app(["convert", "--version", "3.1", *sys.argv[1:]])
