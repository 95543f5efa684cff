"""Reading original weight files: keys, shapes and dtypes at once, tensors one at a time, code never.

PyTorch files are mapped into memory, so that a tensor costs nothing until its bytes are used; safetensors files are
read tensor by tensor.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConversionError, damaged
from .json_files import parse_object, read_json
from .matching import Shape
from .torch_file import load_torch


if TYPE_CHECKING:
    import torch


Names = Sequence[str]

_HASH_CHUNK = 1 << 20
# more than any published file has
_MOST_TENSORS = 20_000
_LONGEST_KEY = 500
_LARGEST = 2**50  # numbers in a tensor
_LARGEST_HEADER = 32 * 2**20  # bytes, of a safetensors file
_LARGEST_INVENTORY = 64 * 2**20  # bytes


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
        return {key: tuple(tensor.shape) if _is_tensor(tensor) else () for key, tensor in self._tensors.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Key to the dtype's name, such as ``float16``."""
        return {
            key: str(tensor.dtype).rpartition(".")[2] if _is_tensor(tensor) else "object"
            for key, tensor in self._tensors.items()
        }

    @property
    def metadata(self) -> Mapping[str, str]:
        """What stands in the header beside the tensors; only safetensors files have it."""
        return {}

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor called ``key``, as a view of the mapped file where the format allows it.

        Raises:
            ConversionError: it is something else, such as a number.
        """
        tensor = self._tensors[key]
        if not _is_tensor(tensor):
            raise ConversionError(f"{key} of {self.path} is a {type(tensor).__name__}; a tensor is expected.")
        return tensor


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


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

        _check_header(path)
        try:
            self._file = safe_open(path, "pt")
            self._slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, ValueError, OSError) as error:
            raise damaged(path, error) from error
        super().__init__(path, {})

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


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _LARGEST_HEADER:
        raise ConversionError(f"{path} is damaged or no weight file: its header would have {length} bytes.")


def _read_index(path: Path) -> dict[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict):
        raise ConversionError(f'{path} is not an index, a JSON object with a "weight_map".')
    for name in listed.values():
        beside = isinstance(name, str) and Path(name).name == name and name.endswith((".safetensors", ".bin"))
        if not beside or not (path.parent / name).is_file():
            raise ConversionError(f"{path} lists {name!r:.80}, which is not a file beside it.")
    return listed


class InventoryFile(WeightFile):
    """Only the keys and shapes of a file, from JSON: ``{"tensors": {"key": [4, 3], ...}}``, gzipped or not."""

    has_weights = False

    def __init__(self, path: Path) -> None:
        super().__init__(path, {})
        content = parse_object(_unpacked(path), str(path)) if path.suffix == ".gz" else read_json(path)
        tensors = content.get("tensors")
        if not isinstance(tensors, dict) or not all(isinstance(shape, list) for shape in tensors.values()):
            raise ConversionError(f'{path} is not an inventory, a JSON object with "tensors".')
        self._shapes = {_plain_name(key): tuple(shape) for key, shape in tensors.items()}

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


def _unpacked(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            content = file.read(_LARGEST_INVENTORY + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(path, error) from error
    if len(content) > _LARGEST_INVENTORY:
        raise ConversionError(f"{path} unpacks to more than {_LARGEST_INVENTORY} bytes, which no inventory has.")
    return content


def open_weights(path: Path, names: Names = ()) -> WeightFile:
    """Open a weight file (PyTorch or safetensors), the index of a sharded one, or an inventory (``.json[.gz]``).

    Args:
        path: the file.
        names: names for the tensors of a file that holds a sequence of tensors, or one stacked tensor.

    Raises:
        ConversionError: the file is truncated, damaged, no weight file, or holds pickled objects that are not data.
    """
    try:
        file = _open(path, names)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    _check_keys_and_shapes(path, file.shapes)
    return file


def _open(path: Path, names: Names) -> WeightFile:
    if is_index(path):
        return ShardedFile(path)
    if is_inventory(path):
        return InventoryFile(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    content = _with_names(load_torch(path), names)
    named = isinstance(content, dict)
    return WeightFile(path, _flat(path, content) if named else _numbered(content), named)


def _check_keys_and_shapes(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Rules and models are made for some thousand tensors with short names, and sizes that can be multiplied.

    Raises:
        ConversionError: there is another.
    """
    if len(shapes) > _MOST_TENSORS:
        raise ConversionError(f"{path} has {len(shapes)} tensors; accepted are up to {_MOST_TENSORS}.")
    for key, shape in shapes.items():
        if len(key) > _LONGEST_KEY or not key.isprintable():
            what = f"a key of {len(key)} characters, {key!a:.80}"
            raise ConversionError(f"{path} has {what}; accepted are up to {_LONGEST_KEY} printable ones.")
        if any(type(length) is not int or length < 0 for length in shape) or prod(map(_at_least_1, shape)) > _LARGEST:
            raise ConversionError(f"{path} gives {key} the shape {str(list(shape))[:80]}, which no tensor has.")


def _at_least_1(length: int) -> int:
    return max(length, 1)


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


def _with_names(content: Any, names: Names) -> Any:
    import torch

    if not names:
        return content
    if isinstance(content, torch.Tensor) and content.ndim > 0 and len(content) == len(names):
        content = content.unbind()
    if isinstance(content, (tuple, list)) and len(content) == len(names):
        return dict(zip(names, content, strict=True))
    return content


def _flat(path: Path, content: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dicts in dicts become one: Lightning's weights get keys such as ``state_dict/conv.weight``."""
    flat: dict[str, Any] = {}
    # not content.items(): an OrderedDict from a file can have an attribute of that name
    for key, value in dict.items(content):
        if not isinstance(key, (str, int, type)) or len(prefix) > _LONGEST_KEY:
            raise ConversionError(
                f"{path} has a key that is a {type(key).__name__}, or too long; accepted are short names."
            )
        name = f"{prefix}{key}"
        flat |= _flat(path, value, f"{name}/") if isinstance(value, dict) and len(value) else {name: value}
    return flat


def _numbered(content: Any) -> dict[str, Any]:
    parts = content if isinstance(content, (tuple, list)) else [content]
    return {str(number): part for number, part in enumerate(parts)}


def _plain_name(key: str) -> str:
    """``0 (clip_mean)`` is how an inventory writes the element of a sequence that is called clip_mean."""
    found = re.fullmatch(r"\d+ \((\w+)\)", key)
    return found[1] if found else key
