"""A half of CLIP in the form of transformers: rules of its weights."""

from __future__ import annotations

from .conversion.matching import Shapes
from .conversion.recipe import Config
from .conversion.rules import REST, Drop, RuleTable, rename
from .mclip_weights import POSITION_IDS


def is_half(projection: str, other: str, shapes: Shapes) -> bool:
    """Whether these are the keys of the half that ends in ``projection``, without those of ``other``."""
    return projection in shapes and other not in shapes


def is_image_encoder(shapes: Shapes) -> bool:
    """Whether these are the keys of the half for pictures."""
    return is_half("visual_projection.weight", "text_projection.weight", shapes)


def half_rules(config: Config) -> RuleTable:
    """Rules of either half."""
    models = ("text_model", "vision_model")
    drops = tuple(Drop(f"{model}.embeddings.position_ids", POSITION_IDS) for model in models)
    return RuleTable(rules=(rename(REST, REST),), drops=drops)
