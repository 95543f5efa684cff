"""Convert the Kandinsky 2.2 repositories of the community; the same as ``kandinsky-diffusers convert --version 2.2``.

python conversion_scripts/convert_kandinsky_2_2.py FOLDER_OR_HUB_ID OUTPUT_FOLDER [--layout combined] [--plan] [--help]
"""

from __future__ import annotations

import sys

from kandinsky_diffusers.cli import app


if __name__ == "__main__":
    app(["convert", "--version", "2.2", *sys.argv[1:]])
