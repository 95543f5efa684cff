"""Model cards: their templates, filled with the facts of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


CARDS = Path(__file__).parent / "model_cards"


def package_version() -> str:
    """Version of the installed package; ``unknown`` for a source tree that is not installed."""
    try:
        return version("kandinsky-diffusers")
    except PackageNotFoundError:
        return "unknown"


def render_card(name: str, facts: Mapping[str, Any]) -> str:
    """The card of a repository, from ``model_cards/<name>.md`` and the facts of ``conversion.json``.

    Raises:
        FileNotFoundError: there is no card of that name.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if not (CARDS / f"{name}.md").is_file():
        raise FileNotFoundError(f"there is no model card {name}.md in {CARDS}")
    environment = Environment(
        loader=FileSystemLoader(CARDS),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the cards are Markdown
    )
    dropped = {key: reason for model in facts["components"].values() for key, reason in model["dropped"].items()}
    loading = _loading_options(facts["options"]["variant"])
    return environment.get_template(f"{name}.md").render(facts=facts, dropped=by_reason(dropped), loading=loading)


def by_reason(dropped: Mapping[str, str]) -> dict[str, str]:
    """For each reason which keys were left out, in words: up to three by name, of more the number and the first.

    Args:
        dropped: key to reason.
    """
    groups: dict[str, list[str]] = {}
    for key, reason in dropped.items():
        groups.setdefault(reason, []).append(f"`{key}`")
    return {
        reason: ", ".join(keys) if len(keys) <= 3 else f"{len(keys)} tensors such as {keys[0]}"
        for reason, keys in groups.items()
    }


def _loading_options(variant: str | None) -> str:
    """What the examples of a card pass to ``from_pretrained``."""
    dtype = "bfloat16" if variant == "bf16" else "float16"
    return f"torch_dtype=torch.{dtype}" + (f', variant="{variant}"' if variant else "")
