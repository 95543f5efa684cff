"""Where every tensor of a T5 or mT5 goes, of which 2.0 and 3.x use the encoder."""

from __future__ import annotations

from .conversion.matching import Shapes
from .conversion.recipe import Config
from .conversion.rules import Drop, RuleTable, rename


def is_t5(shapes: Shapes) -> bool:
    """Whether these are the keys of a T5, or of its encoder."""
    return "shared.weight" in shapes and "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes


def t5_encoder_rules(config: Config) -> RuleTable:
    """Rules of the encoder half of T5."""
    return RuleTable(
        rules=(
            rename("shared.weight", "shared.weight"),
            rename("encoder.block.{rest}", "encoder.block.{rest}"),
            rename("encoder.final_layer_norm.weight", "encoder.final_layer_norm.weight"),
        ),
        drops=(
            Drop("encoder.embed_tokens.weight", "the same tensor as shared.weight"),
            Drop("decoder.{rest}", "the decoder of T5, which Kandinsky does not use"),
            Drop("lm_head.weight", "belongs to the decoder of T5"),
        ),
    )
