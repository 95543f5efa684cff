"""What is this file: version, part, dtype, parameters, SHA-256."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .errors import ConversionError
from .reader import file_sha256, is_inventory
from .releases import other_kind
from .sources import WEIGHT_ENDINGS, identify, open_any


@dataclass(frozen=True)
class FileReport:
    """What a weight file is.

    Args:
        path: the file.
        version: the release it belongs to, such as ``2.1``; None if it is not known.
        part: what it is of that release, such as ``movq``; None if it is not known.
        tensors: number of tensors.
        parameters: number of numbers.
        dtypes: name of each dtype and how many numbers have it; empty for inventories.
        size: bytes.
        sha256: in hexadecimal.
        problem: why the file could not be read; None if it could.
    """

    path: Path
    version: str | None
    part: str | None
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    size: int
    sha256: str
    problem: str | None = None


def inspect(place: str | Path, advance: Callable[[int], None] = lambda size: None) -> list[FileReport]:
    """Describe a weight file, an inventory, or every weight file below a folder.

    Args:
        place: file or folder.
        advance: told the number of bytes read after each piece.

    Returns:
        One report per file; in a folder, an unreadable file has a report that says so.

    Raises:
        ConversionError: the file cannot be read, or there is none.
    """
    if Path(place).is_file():
        return [_describe(Path(place), advance)]
    return [_describe_or_blame(path, advance) for path in weight_files(Path(place))]


def weight_files(place: Path) -> list[Path]:
    """``place`` itself, or the weight files below it.

    Raises:
        ConversionError: there is none.
    """
    if place.is_file():
        return [place]
    found = sorted(path for path in place.rglob("*") if path.suffix in WEIGHT_ENDINGS and path.is_file())
    if not found:
        raise ConversionError(
            f"{place} is neither a file nor a folder with weight files ({', '.join(WEIGHT_ENDINGS)})."
        )
    return found


def _describe_or_blame(path: Path, advance: Callable[[int], None]) -> FileReport:
    try:
        return _describe(path, advance)
    except ConversionError as error:
        size, digest = path.stat().st_size, file_sha256(path, advance)
        return FileReport(path, None, None, 0, 0, {}, size, digest, str(error))


def _describe(path: Path, advance: Callable[[int], None]) -> FileReport:
    file = open_any(path)
    version, part = other_kind(file.shapes) or identify(file) or (None, None)
    numbers = {key: prod(shape) for key, shape in file.shapes.items()}
    dtypes: Counter[str] = Counter()
    for key, dtype in ({} if is_inventory(path) else file.dtypes).items():
        dtypes[dtype] += numbers[key]
    size = path.stat().st_size
    return FileReport(
        path, version, part, len(numbers), sum(numbers.values()), dict(dtypes), size, file_sha256(path, advance)
    )
