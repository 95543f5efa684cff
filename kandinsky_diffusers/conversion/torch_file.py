"""Reading PyTorch's files without running code, and without using more memory or time than the file has bytes for."""

from __future__ import annotations

import io
import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConversionError, damaged
from .pickles import foreign_names


if TYPE_CHECKING:
    import torch


_ZIP = b"PK\x03\x04"
_PICKLE = "data.pkl"
# the three records at the end of a zip file: of the directory's end with 64 bits, where that lies, and with 32 bits
_ENDS = struct.Struct("<4s36xQQ 4s4xQ4x 4s8xLLH")
_END = 22  # bytes of the last one
_LARGEST_PICKLE = 64 * 2**20  # bytes; those of published files have at most 1 MB
_LEGACY_PICKLES = 5  # magic number, version, system, content, keys of the storages
_MOST_SHARING = 16  # times the bytes of a file that its tensors may have together, for tensors that share theirs
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    ValueError,
    OSError,
    EOFError,
    struct.error,
    pickle.UnpicklingError,
)
_LIGHTNING = ("pytorch_lightning.", "lightning.", "lightning_fabric.")


def load_torch(path: Path) -> Any:
    """What a file of ``torch.save`` holds: tensors that are views of the mapped file, in dicts, tuples and lists.

    Files in the format before PyTorch 1.6, which is no zip file, are read into memory.

    Raises:
        ConversionError: the file is truncated, damaged, no such file, or holds anything but plain tensors, numbers,
            texts and containers of these; see also :mod:`.pickles`.
    """
    import torch

    zipped = _is_zip(path)
    foreign = _foreign_names_zipped(path) if zipped else _foreign_names_legacy(path)
    if not (zipped and all(name.startswith(_LIGHTNING) for name in foreign)):
        _refuse(path, foreign)
    # empty classes in place of those of Lightning, which keys the ``callbacks`` of its checkpoints by class
    placeholders: list[Any] = [(type(name.rpartition(".")[2], (), {}), name) for name in foreign]
    try:
        with torch.serialization.safe_globals(placeholders):
            content = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        _refuse(path, {named[1]} if named else set())
        raise damaged(path, error) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        AttributeError,
        TypeError,
        AssertionError,
        ArithmeticError,
        MemoryError,
        struct.error,
    ) as error:
        raise damaged(path, error) from error
    _check_sizes(path, content)
    return content


def check_zip(path: Path) -> None:
    """Compare the contents of a zip file, which current PyTorch files are, with the checksums stored in it.

    Mapping a file into memory does not check them.

    Raises:
        ConversionError: a checksum differs.
    """
    if not _is_zip(path):
        return
    with _archive(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ConversionError(f"{path} is damaged: {broken} in it does not have the checksum stored with it.")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip file as PyTorch writes it: nothing is compressed, so that nothing is larger than the file."""
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise zipfile.BadZipFile("entries are compressed or encrypted, which PyTorch's are not")
            if len({entry.filename for entry in entries}) < len(entries):
                raise zipfile.BadZipFile("two entries have the same name")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise zipfile.BadZipFile("the entries are larger than the file")
            yield archive
    except _ZIP_ERRORS as error:
        raise damaged(path, error) from error


def _check_directory(path: Path) -> None:
    """Python and PyTorch have to see the same directory of entries: it lies where the end says, and nothing follows.

    Raises:
        zipfile.BadZipFile: it does not.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _ENDS.size))
        *wide, length, offset, comment = _ENDS.unpack(file.read().rjust(_ENDS.size, b"\0"))
    signature, wide_length, wide_offset, locator, wide_place, end = wide
    place = size - _END
    if locator == b"PK\x06\x07":
        place, length, offset = size - _ENDS.size, wide_length, wide_offset
        if signature != b"PK\x06\x06" or wide_place != place:
            raise zipfile.BadZipFile("the end of the directory lies elsewhere")
    if end != b"PK\x05\x06" or comment or offset + length != place:
        raise zipfile.BadZipFile("the directory lies elsewhere, or something follows it")


def _foreign_names_zipped(path: Path) -> set[str]:
    with _archive(path) as archive:
        pickles = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[2] == _PICKLE]
        if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE:
            raise zipfile.BadZipFile(f"it does not have one {_PICKLE} of at most {_LARGEST_PICKLE} bytes")
        with archive.open(pickles[0]) as stream:
            return foreign_names(io.BytesIO(stream.read(_LARGEST_PICKLE)))  # which reads single bytes


def _foreign_names_legacy(path: Path) -> set[str]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            for _ in range(_LEGACY_PICKLES):
                if foreign := foreign_names(stream):  # pyright: ignore[reportArgumentType] (it reads like a file)
                    return foreign
    except (OSError, ValueError, pickle.UnpicklingError) as error:  # an empty file cannot be mapped
        raise damaged(path, error) from error
    return set()


def _refuse(path: Path, foreign: set[str]) -> None:
    if foreign:
        raise ConversionError(
            f"{path} holds the pickled object {sorted(foreign)[0]}, which no plain tensor needs. Reading it could run "
            "foreign code or fill the memory, so it was not read. Get the file from its publisher again."
        )


def _check_sizes(path: Path, content: Any) -> None:
    """A tensor can be a view that repeats its numbers, and be larger than any memory without having bytes of its own.

    Raises:
        ConversionError: one is, or all are together.
    """
    tensors = list(_tensors(content))
    if any(t.numel() * t.itemsize > t.untyped_storage().nbytes() for t in tensors):
        raise ConversionError(f"{path} holds a tensor that is larger than the numbers stored for it.")
    if sum(t.numel() * t.itemsize for t in tensors) > _MOST_SHARING * path.stat().st_size:
        raise ConversionError(f"{path} holds tensors that are {_MOST_SHARING} times as large as the file.")


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in dict.values(content):  # not content.values(), which can be anything in an OrderedDict
            yield from _tensors(value)
    elif isinstance(content, (tuple, list)):
        for value in content:
            yield from _tensors(value)
