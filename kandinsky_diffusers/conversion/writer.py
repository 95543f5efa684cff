"""Writing safetensors files of known layout, tensor by tensor, in shards with the index that diffusers expects."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import ConversionError
from .matching import Shape
from .pieces import extremes, pieces


if TYPE_CHECKING:
    import torch


_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
WRITTEN_DTYPES = tuple(_CODES)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Entry:
    """Name, dtype (as in ``float16``) and shape of a tensor to write."""

    key: str
    dtype: str
    shape: Shape

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        import torch

        return getattr(torch, self.dtype).itemsize


def parse_size(text: str | int) -> int:
    """``"5GB"`` or ``"200MiB"`` or a number, in bytes.

    Raises:
        ConversionError: it is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ConversionError(f"max_shard_size is {text!r}; a size such as 5GB, 500MB or 2GiB is accepted.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


class ShardedWriter:
    """Writes the tensors ``entries`` to ``folder``, each file with its header first.

    Args:
        folder: where to; must exist.
        stem: file name without ending, such as ``diffusion_pytorch_model``.
        entries: all tensors to come.
        max_shard_size: bytes of tensors per file; a larger tensor gets a file of its own.
        variant: part of the file names, such as ``fp16``.
        advance: told the number of bytes after each piece.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        entries: Iterable[Entry],
        max_shard_size: int,
        variant: str | None = None,
        advance: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._advance = advance
        groups = _distribute(entries, max_shard_size)
        full_stem = f"{stem}.{variant}" if variant else stem
        self._shards = [
            _Shard(folder / _shard_name(full_stem, number, len(groups)), group) for number, group in enumerate(groups)
        ]
        self._home = {entry.key: shard for shard in self._shards for entry in shard.entries}
        if len(self._shards) > 1:
            infix = f".{variant}" if variant else ""
            self._write_index(folder / f"{stem}.safetensors.index{infix}.json")

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return [shard.path for shard in self._shards]

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Cast ``tensor`` to its dtype and write it.

        Raises:
            ConversionError: it holds NaN or infinite values, or values that its dtype cannot hold.
        """
        self._home[key].write(key, tensor, self._advance)

    def check_complete(self) -> None:
        """Raises:
        ConversionError: a tensor was never written.
        """
        for shard in self._shards:
            shard.check_complete()

    def close(self) -> None:
        """Close the files; what is incomplete stays so."""
        for shard in self._shards:
            shard.close()

    def _write_index(self, path: Path) -> None:
        total = sum(entry.size for shard in self._shards for entry in shard.entries)
        names = {key: shard.path.name for key, shard in self._home.items()}
        write_json(path, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})


class _Shard:
    def __init__(self, path: Path, entries: list[Entry]) -> None:
        self.path = path
        # wide numbers first keep every tensor aligned to its own width
        self.entries = sorted(entries, key=lambda entry: -entry.itemsize)
        self._waiting = {entry.key: entry for entry in entries}
        self._offsets: dict[str, int] = {}
        self._file: BinaryIO | None = None

    def write(self, key: str, tensor: torch.Tensor, advance: Callable[[int], None]) -> None:
        file = self._file or self._open()
        entry = self._waiting.pop(key)
        if tuple(tensor.shape) != entry.shape:
            raise ConversionError(f"{key} has the shape {list(tensor.shape)}, but {list(entry.shape)} was planned.")
        file.seek(self._offsets[key])
        for piece in pieces(tensor):
            advance(file.write(_bytes_of(key, piece, entry.dtype)))
        if not self._waiting:
            self.close()

    def _open(self) -> BinaryIO:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in self.entries:
            end = offset + entry.size
            header[entry.key] = {
                "dtype": _CODES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, end],
            }
            self._offsets[entry.key] = offset
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {key: 8 + len(text) + start for key, start in self._offsets.items()}
        self._file = self.path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        return self._file

    def check_complete(self) -> None:
        if self._waiting:
            raise ConversionError(f"{next(iter(self._waiting))} was planned for {self.path.name}, but never written.")

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _bytes_of(key: str, piece: torch.Tensor, dtype: str) -> memoryview:
    import torch

    wanted = getattr(torch, dtype)
    if piece.is_floating_point() and piece.numel():
        found = extremes(piece)
        if not found.isfinite().all():
            raise ConversionError(f"{key} holds NaN or infinite values. The file is damaged; nothing was written.")
        if not found.to(wanted).isfinite().all():
            raise ConversionError(f"{key} holds values too large for {dtype}. Choose another dtype.")
    return piece.to(wanted).contiguous().view(torch.uint8).numpy().data


def _distribute(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    groups: list[list[Entry]] = [[]]
    room = limit
    for entry in entries:
        if groups[-1] and entry.size > room:
            groups.append([])
            room = limit
        groups[-1].append(entry)
        room -= entry.size
    return groups


def _shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
