"""Reading original weight files: keys, shapes and dtypes at once, tensors one at a time, code never.

PyTorch files are mapped into memory, so that a tensor costs nothing until its bytes are used; safetensors files are
read tensor by tensor.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConversionError
from .matching import Shape


if TYPE_CHECKING:
    import torch


Names = Sequence[str]

_ZIP = b"PK\x03\x04"
_HASH_CHUNK = 1 << 20
_LIGHTNING = ("pytorch_lightning.", "lightning.", "lightning_fabric.")


class WeightFile:
    """Named tensors of one file.

    Args:
        path: the file.
        tensors: its tensors; entries that are not tensors are kept, so that they are accounted for as well.
        named: whether the keys come from the file; else they are numbers.
    """

    has_weights = True

    def __init__(self, path: Path, tensors: Mapping[str, Any], named: bool = True) -> None:
        self.path = path
        self.named = named
        self._tensors = tensors

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that it consists of."""
        return (self.path,)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Key to shape; what is not a tensor counts as a scalar."""
        return {key: tuple(getattr(value, "shape", ())) for key, value in self._tensors.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Key to the dtype's name, such as ``float16``."""
        return {key: str(getattr(value, "dtype", "object")).rpartition(".")[2] for key, value in self._tensors.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """What stands in the header beside the tensors; only safetensors files have it."""
        return {}

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor called ``key``, as a view of the mapped file where the format allows it."""
        return self._tensors[key]


class RenamedFile(WeightFile):
    """Some of the tensors of a file, under other names.

    Args:
        file: the file.
        keys: new name to the name in the file.
    """

    def __init__(self, file: WeightFile, keys: Mapping[str, str]) -> None:
        super().__init__(file.path, {}, file.named)
        self.has_weights = file.has_weights
        self._file, self._keys = file, keys

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that it consists of."""
        return self._file.paths

    @property
    def shapes(self) -> dict[str, Shape]:
        """Key to shape."""
        shapes = self._file.shapes
        return {key: shapes[own] for key, own in self._keys.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Key to the dtype's name, such as ``float16``."""
        dtypes = self._file.dtypes
        return {key: dtypes[own] for key, own in self._keys.items() if own in dtypes}

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor called ``key``."""
        return self._file.tensor(self._keys[key])


class SafetensorsFile(WeightFile):
    """Named tensors of a safetensors file."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, "pt")
        except (SafetensorError, ValueError) as error:
            raise _damaged(path, error) from error
        super().__init__(path, {})
        self._slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118 (not a mapping)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Key to shape."""
        return {key: tuple(part.get_shape()) for key, part in self._slices.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Key to the dtype's name, such as ``float16``."""
        return {key: dtype_name(part.get_dtype()) for key, part in self._slices.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """What stands in the header beside the tensors."""
        return self._file.metadata() or {}

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor called ``key``."""
        return self._file.get_tensor(key)


class ShardedFile(WeightFile):
    """Named tensors of several files, which an index (``model.safetensors.index.json`` and the like) lists.

    Those that it does not list are there as well; ``unlisted`` names them.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, {})
        listed = _read_index(path)
        self._shards = [open_weights(path.parent / name) for name in sorted(set(listed.values()))]
        self._homes: dict[str, WeightFile] = {}
        for shard in self._shards:
            if twice := self._homes.keys() & shard.shapes.keys():
                raise ConversionError(f"{sorted(twice)[0]} is in several of the files that {path} lists.")
            self._homes |= dict.fromkeys(shard.shapes, shard)
        for key, name in listed.items():
            if key not in self._homes or self._homes[key].path.name != name:
                raise ConversionError(f"{path} says that {key} is in {name}, which it is not.")
        self.unlisted = [key for key in self._homes if key not in listed]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The index and the files that it lists."""
        return (self.path, *(path for shard in self._shards for path in shard.paths))

    @property
    def shapes(self) -> dict[str, Shape]:
        """Key to shape."""
        return {key: shape for shard in self._shards for key, shape in shard.shapes.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Key to the dtype's name, such as ``float16``."""
        return {key: dtype for shard in self._shards for key, dtype in shard.dtypes.items()}

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor called ``key``."""
        return self._homes[key].tensor(key)


def _read_index(path: Path) -> dict[str, str]:
    try:
        listed = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        shards = {name: path.parent / name for name in listed.values() if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(f'{path} is not an index, a JSON object with a "weight_map": {error!r}') from error
    for name in listed.values():
        if name not in shards or not shards[name].is_file():
            raise ConversionError(f"{path} lists {name!r}, which is not a file beside it.")
    return listed


class InventoryFile(WeightFile):
    """Only the keys and shapes of a file, from JSON: ``{"tensors": {"key": [4, 3], ...}}``, gzipped or not."""

    has_weights = False

    def __init__(self, path: Path) -> None:
        super().__init__(path, {})
        try:
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            content = json.loads(text)
            self._shapes = {_plain_name(key): tuple(shape) for key, shape in content["tensors"].items()}
        except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConversionError(f'{path} is not an inventory, a JSON object with "tensors": {error!r}') from error

    @property
    def shapes(self) -> dict[str, Shape]:
        """Key to shape."""
        return self._shapes

    @property
    def dtypes(self) -> dict[str, str]:
        """Nothing, inventories do not say."""
        return {}

    def tensor(self, key: str) -> torch.Tensor:
        """Always raises: there are no weights.

        Raises:
            ConversionError: always.
        """
        raise ConversionError(f"{self.path} is an inventory without weights; it can be planned, but not converted.")


def open_weights(path: Path, names: Names = ()) -> WeightFile:
    """Open a weight file (PyTorch or safetensors), the index of a sharded one, or an inventory (``.json[.gz]``).

    Args:
        path: the file.
        names: names for the tensors of a file that holds a sequence of tensors, or one stacked tensor.

    Raises:
        ConversionError: the file is truncated, damaged, no weight file, or holds pickled objects that are not data.
    """
    if is_index(path):
        return ShardedFile(path)
    if is_inventory(path):
        return InventoryFile(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    content = _with_names(_load_torch(path), names)
    named = isinstance(content, Mapping)
    return WeightFile(path, _flat(content) if named else _numbered(content), named)


def is_inventory(path: Path) -> bool:
    """Whether ``path`` is named like an inventory."""
    return path.name.endswith((".json", ".json.gz")) and not is_index(path)


def is_index(path: Path) -> bool:
    """Whether ``path`` is named like the index of a sharded file."""
    return re.search(r"\.(safetensors|bin)\.index(\.\w+)?\.json$", path.name) is not None


def dtype_name(code: str) -> str:
    """The name of a safetensors dtype code: ``F16`` is ``float16``."""
    if code == "BF16":
        return "bfloat16"
    return code.replace("BOOL", "bool").replace("F", "float").replace("U", "uint").replace("I", "int")


def file_sha256(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """SHA-256 of a file in hexadecimal; ``advance`` is told the number of bytes after each piece."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_HASH_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            advance(size)
    return digest.hexdigest()


def check_zip(path: Path) -> None:
    """Compare the contents of a zip file, which current PyTorch files are, with the checksums stored in it.

    Mapping a file into memory does not check them.

    Raises:
        ConversionError: a checksum differs.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        try:
            broken = archive.testzip()
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise _damaged(path, error) from error
    if broken is not None:
        raise ConversionError(f"{path} is damaged: {broken} in it does not have the checksum stored with it.")


def _load_torch(path: Path) -> Any:
    import torch

    with path.open("rb") as file:
        zipped = file.read(len(_ZIP)) == _ZIP
    try:
        with torch.serialization.safe_globals(_placeholders(path) if zipped else []):
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_only_data(path, error) from error
    except (RuntimeError, EOFError, OSError, KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from error


def _placeholders(path: Path) -> list[Any]:
    """Empty classes in place of those of Lightning, which keys the ``callbacks`` of its checkpoints by class."""
    import torch

    found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if not all(name.startswith(_LIGHTNING) for name in found):
        return []
    return [(type(name.rpartition(".")[2], (), {}), name) for name in found]


def _not_only_data(path: Path, error: pickle.UnpicklingError) -> ConversionError:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named is None:
        return _damaged(path, error)
    return ConversionError(
        f"{path} holds the pickled object {named[1]}, which is not data. Reading it could run foreign code, so "
        "it was not read. Get the file from its publisher again."
    )


def _damaged(path: Path, error: Exception) -> ConversionError:
    reason = str(error).strip().partition("\n")[0]
    return ConversionError(
        f"{path} ({path.stat().st_size} bytes) is truncated, damaged or not a weight file: {reason}"
    )


def _with_names(content: Any, names: Names) -> Any:
    import torch

    if not names:
        return content
    if isinstance(content, torch.Tensor) and content.ndim > 0 and len(content) == len(names):
        content = content.unbind()
    if isinstance(content, (tuple, list)) and len(content) == len(names):
        return dict(zip(names, content, strict=True))
    return content


def _flat(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dicts in dicts become one: Lightning's weights get keys such as ``state_dict/conv.weight``."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _numbered(content: Any) -> dict[str, Any]:
    parts = content if isinstance(content, (tuple, list)) else [content]
    return {str(number): part for number, part in enumerate(parts)}


def _plain_name(key: str) -> str:
    """``0 (clip_mean)`` is how an inventory writes the element of a sequence that is called clip_mean."""
    found = re.fullmatch(r"\d+ \((\w+)\)", key)
    return found[1] if found else key
