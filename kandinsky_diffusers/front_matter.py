"""Reading model cards of unknown origin, and their front matter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard


_LARGEST = 2**16  # characters; those of published cards have some hundreds
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


class _Loader(yaml.BaseLoader):
    """Scalars stay texts; there are no aliases, with which a few lines become more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, which cards have no use for")
        return super().compose_node(parent, index)


def load_card(path: Path) -> ModelCard:
    """A model card of unknown origin.

    Raises:
        ValueError: its front matter is none that [`read_front_matter`] reads.
    """
    read_front_matter(path)
    return ModelCard.load(path, ignore_metadata_errors=True)


def read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a card, as texts, lists and dicts; empty where there is none.

    Tags and merge keys are not acted on.

    Raises:
        ValueError: it is longer than 65536 characters, has aliases, or is no mapping in YAML.
    """
    with card.open(encoding="utf-8", errors="replace", newline="") as file:
        text = file.read(_LARGEST)
    found = _FRONT_MATTER.match(text)
    if found is None:
        if text.lstrip().startswith("---") and len(text) == _LARGEST:
            raise ValueError(f"the front matter of {card} is longer than {_LARGEST} characters")
        return {}
    try:
        content = yaml.load(found[1], Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"the front matter of {card} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"the front matter of {card} is a {type(content).__name__}; a mapping is expected")
    return content
