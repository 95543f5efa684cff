"""Convert an original IP-Adapter of Kandinsky 3.1; the same as ``convert --version 3-ip-adapter``.

python conversion_scripts/convert_kandinsky_3_ip_adapter.py ADAPTER_FOLDER OUTPUT_FOLDER [--plan] [--help]
"""

from __future__ import annotations

import sys

from kandinsky_diffusers.cli import app


if __name__ == "__main__":
    app(["convert", "--version", "3-ip-adapter", *sys.argv[1:]])
