"""Convert the original KandiSuperRes; the same as ``kandinsky-diffusers convert --version superres``.

python conversion_scripts/convert_kandisuperres.py RELEASE_FOLDER OUTPUT_FOLDER [--refiner RELEASE_3_1] [--help]
"""

from __future__ import annotations

import sys

from kandinsky_diffusers.cli import app


if __name__ == "__main__":
    app(["convert", "--version", "superres", *sys.argv[1:]])
