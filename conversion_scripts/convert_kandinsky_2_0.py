"""Convert the original Kandinsky 2.0 release; the same as ``kandinsky-diffusers convert --version 2.0``.

python conversion_scripts/convert_kandinsky_2_0.py RELEASE_FOLDER OUTPUT_FOLDER [--link-shared] [--plan] [--help]
"""

from __future__ import annotations

import sys

from kandinsky_diffusers.cli import app


if __name__ == "__main__":
    app(["convert", "--version", "2.0", *sys.argv[1:]])
