"""Reading JSON of unknown origin: it is of a sensible size, and it is an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ConversionError


_LARGEST = 64 * 2**20  # bytes; the largest published, a tokenizer of 250,000 words, has 17 MB
_DEEPEST = 64  # objects and lists inside each other, which readers and writers follow by recursion


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConversionError: there is no such file, it is larger than 64 MiB, or it is not a JSON object with up to 64
            levels.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ConversionError(f"{path} is larger than {_LARGEST} bytes, which no JSON file of a model is.")
        return parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error


def parse_object(text: str | bytes, title: str) -> dict[str, Any]:
    """The JSON object that ``text`` is.

    Args:
        text: JSON; bytes are UTF-8.
        title: what messages call it.

    Raises:
        ConversionError: it is none, or has more than 64 levels.
    """
    try:
        content = json.loads(text if isinstance(text, str) else text.decode())
    except ValueError as error:
        raise ConversionError(f"{title} cannot be read as JSON: {error}") from error
    except RecursionError as error:
        raise _too_deep(title) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{title} holds a {type(content).__name__}; an object is expected.")
    if not _is_within(content, _DEEPEST):
        raise _too_deep(title)
    _check_characters(content, title)
    return content


def _check_characters(content: Any, title: str) -> None:
    """JSON can have halves of characters, such as ``"\\ud800"``, which cannot be written to a file again."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConversionError(f"{title} cannot be read as JSON: it has text that is no Unicode.") from error


def _is_within(content: Any, levels: int) -> bool:
    if not isinstance(content, (dict, list)):
        return True
    parts = content.values() if isinstance(content, dict) else content
    return levels > 0 and all(_is_within(part, levels - 1) for part in parts)


def _too_deep(title: str) -> ConversionError:
    return ConversionError(f"{title} cannot be read as JSON: more than {_DEEPEST} levels lie inside each other.")
