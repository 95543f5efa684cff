"""Look at what a demo left behind, in an environment that has the wheel and not the source tree."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

import kandinsky_diffusers


package = Path(kandinsky_diffusers.__file__).resolve().parent
output = Path(sys.argv[1])

assert Path(sys.prefix).resolve() in package.parents, f"imported {package}, which is not the installed wheel"
assert (package / "py.typed").is_file(), "the wheel lacks py.typed"
for repo in ("kandinsky-2-1", "kandinsky-2-1-inpaint"):
    assert "kandinsky-2-1-prior" in (output / repo / "README.md").read_text(encoding="utf-8"), f"{repo}: no model card"
assert (output / "index.html").is_file(), "there is no page"
with Image.open(output / "sheet.png") as sheet:
    assert len(set(sheet.convert("L").resize((64, 64)).tobytes())) > 20, "the sheet is blank"
