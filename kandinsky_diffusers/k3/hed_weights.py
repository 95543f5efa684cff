"""Where every tensor of `ControlNetHED.pth` goes, and the repository that is made of it.

Published by lllyasviel (ControlNet, Annotators); original code: lllyasviel/ControlNet, folder ``annotator/hed``.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from ..conversion.matching import Shapes
from ..conversion.recipe import Config, Inputs, ModelComponent, Part, Repo, SourceFile
from ..conversion.rules import RuleTable, rename
from ..conversion.shapes import MOST_MODULES, count_modules, shape_of


def is_hed(shapes: Shapes) -> bool:
    """Whether these are the keys of the edge detector."""
    return "norm" in shapes and "block1.projection.weight" in shapes


def hed_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """Configuration of the ``KandinskyHEDDetector`` (original: ``ControlNetHED_Apache2``)."""
    numbered = (f"block{n}" for n in range(1, MOST_MODULES + 1))
    blocks = list(takewhile(lambda block: count_modules(shapes, f"{block}.convs"), numbered))
    return {
        "block_out_channels": [shape_of(shapes, f"{block}.projection.weight")[1] for block in blocks],
        "layers_per_block": [count_modules(shapes, f"{block}.convs") for block in blocks],
    }


def hed_rules(config: Config) -> RuleTable:
    """Rules of the edge detector."""
    levels = range(len(config["block_out_channels"]))
    return RuleTable(
        rules=(
            rename("norm", "mean"),
            rename("{block}.convs.{layer}.{p}", "{block}.convs.{layer}.{p}"),
            rename("{block}.projection.{p}", "{block}.side.{p}"),
        ),
        paths={"block": {f"block{level + 1}": f"blocks.{level}" for level in levels}},
    )


def _load(folder: Path, variant: str | None) -> Any:
    from .hed import KandinskyHEDDetector

    return KandinskyHEDDetector.from_pretrained(folder, variant=variant)


def _detect(detector: Any) -> list[Any]:
    import numpy as np
    from PIL import Image

    return [np.array(detector(Image.new("RGB", (64, 64), "gray")))]


HED_FILE = SourceFile("hed_detector", ("ControlNetHED.pth",), is_hed)

HED_REPO = Repo(
    "kandinsky-hed-detector",
    None,
    main="hed_detector",
    components=(
        ModelComponent(
            "",
            "kandinsky_diffusers",
            "KandinskyHEDDetector",
            parts=(Part("hed_detector", hed_rules),),
            configure=hed_config,
            module="kandinsky_diffusers.k3.hed",
        ),
    ),
    smoke=_detect,
    load=_load,
)
