"""Plans without a conversion: from keys and shapes, or from what lies somewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .planning import ModelPlan, plan_all
from .reader import WeightFile
from .recipe import Inputs
from .releases import releases
from .sources import Found, find_for_planning, read_config


def plan(
    shapes: Mapping[str, Sequence[int]],
    *,
    version: str = "auto",
    original_config: str | Path | Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
) -> list[ModelPlan]:
    """Tell what becomes of every tensor of a file, from its keys and shapes alone.

    Args:
        shapes: key to shape.
        version: ``auto``, or the only version to consider.
        original_config: the original's configuration, as JSON file or read, for what shapes cannot tell.
        drop: glob patterns of keys to leave out.

    Returns:
        One plan for each model that the file makes or has a share in.

    Raises:
        ConversionError: no release has such a file, or something does not add up.
    """
    exact = {key: tuple(shape) for key, shape in shapes.items()}
    for known in releases():
        sources = known.recognise(exact) if version in ("auto", known.version) else []
        if sources:
            file = _Keys(Path(sources[0].paths[0]), exact)
            inputs = Inputs({}, known.parts_of(file, sources[0]), read_config(original_config))
            return plan_all(known, inputs, drop)
    what = "any release" if version == "auto" else f"Kandinsky {version}"
    raise ConversionError(f"These {len(exact)} keys are not those of a file of {what}.")


def plan_source(
    source: str | Path,
    *,
    version: str = "auto",
    original_config: str | Path | Mapping[str, Any] | None = None,
    clip: str | Path | None = None,
    text_encoder: str | Path | None = None,
    refiner: str | Path | None = None,
    drop: Sequence[str] = (),
    layout: str = "split",
) -> tuple[Found, list[ModelPlan]]:
    """Plan what lies at ``source``: a release, a folder of inventories, or a single file of either kind.

    Nothing is read but keys and shapes.  Companions, such as CLIP, are planned if they are local folders.

    Raises:
        ConversionError: nothing is recognised, or something does not add up.
    """
    companions = {"clip": clip, "text_encoder": text_encoder, "refiner": refiner}
    found = find_for_planning(Path(source), version, companions, read_config(original_config), layout)
    return found, plan_all(found.release, found.inputs, drop)


class _Keys(WeightFile):
    """Keys and shapes in the role of a file."""

    has_weights = False

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(path, {})
        self._shapes = shapes

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key to shape."""
        return dict(self._shapes)
