"""The main job from end to end: an original release becomes Hub repositories, and these draw a page of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..conversion import ConversionError, convert
from ..conversion.repository import Progress
from ..conversion.verification import RECORD
from .artist import Settings, draw
from .motifs import COLOURED_SHAPES, Motifs
from .page import write_page
from .sheet import make_sheet


__all__ = ["COLOURED_SHAPES", "Motifs", "Settings", "convert_release", "run_demo"]

MARKER = "demo.txt"
SHEET = "sheet.png"


def run_demo(
    release: str | Path,
    output: str | Path = "demo_output",
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Convert a Kandinsky 2.1 release, and draw with the result all that it can do.

    Args:
        release: folder with the files named as originally published. If there, its folder `clip` is used as CLIP
            ViT-L/14, and `hyperparameters.json` as the original's configuration (needed for models of unusual size).
            Without a checkpoint for inpainting all else is drawn.
        output: where the repositories, the sheet `sheet.png` with all pictures, the page `index.html` and its
            pictures go. An earlier demo's folder is brought up to date.
        settings: what is drawn, and how; coloured shapes, for the release in `training/`, by default.
        progress: makes progress bars for bytes and for pictures; called with tqdm's arguments.

    Returns:
        The path of the page.

    Raises:
        ConversionError: `release` cannot be converted, or `output` is there and no demo made it.
    """
    release, output = Path(release), Path(output)
    if not release.is_dir():
        raise ConversionError(f"release: {str(release)!r} is not a folder with a Kandinsky 2.1 release")
    _check_free(output)
    repos = convert_release(release, output, progress)
    (output / MARKER).write_text("Made by `kandinsky-diffusers demo`, which may replace what is here.\n")
    settings = settings or Settings()
    rows = draw(repos, settings, progress)
    make_sheet(rows, f"Kandinsky 2.1, drawn from the release {release}").save(output / SHEET, optimize=True)
    manner = f"{settings.steps} steps, {settings.prior_steps} of the prior"
    return write_page(rows, output, release=str(release), sources=_sources(repos), manner=manner, sheet=SHEET)


def _check_free(output: Path) -> None:
    """A folder that no demo made may hold repositories that somebody wants to keep."""
    if (output / MARKER).is_file() or not output.exists():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise ConversionError(f"output: {str(output)!r} is there already, and no demo made it; name another folder")


def convert_release(release: Path, output: Path, progress: Progress | None = None) -> dict[str, Path]:
    """Convert a Kandinsky 2.1 release with what lies beside it, see [`run_demo`]; repositories there are replaced.

    Args:
        release: as for [`run_demo`].
        output: folder of the repositories.
        progress: makes progress bars for bytes; called with tqdm's arguments.

    Returns:
        The repositories by their names.

    Raises:
        ConversionError: `release` cannot be converted.
    """
    options: dict[str, Any] = {"clip": release / "clip", "original_config": release / "hyperparameters.json"}
    present = {name: path for name, path in options.items() if path.exists()}
    report = convert(release, output, version="2.1", overwrite=True, progress=progress, **present)
    return {repo.name: repo for repo in report.repos}


def _sources(repos: dict[str, Path]) -> dict[str, str]:
    """The SHA-256 of each file of the release that was read."""
    records = [json.loads((repo / RECORD).read_text(encoding="utf-8")) for repo in repos.values()]
    files = [source for record in records for source in record["sources"].values()]
    return {file["file"]: file["sha256"] for file in files}
