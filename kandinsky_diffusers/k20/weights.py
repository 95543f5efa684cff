"""Where every tensor of the Kandinsky 2.0 release goes: rules, and configurations read from tensor shapes.

Original code: ai-forever/Kandinsky-2, folder ``kandinsky2``.
"""

from __future__ import annotations

from typing import Any

from ..conversion.matching import Shapes
from ..conversion.recipe import Config, Inputs
from ..conversion.rules import RuleTable, rename
from ..conversion.shapes import shape_of
from ..t5_weights import is_t5
from ..unet_weights import torso_config, torso_rules


MT5_WIDTH = 512  # as published, and as the original's UNet has it written into its code


def is_unet(shapes: Shapes, in_channels: int) -> bool:
    """Whether these are the keys of a 2.0 UNet with that many input channels (4: text to image, 9: inpainting)."""
    return "to_model_dim2.weight" in shapes and shapes.get("input_blocks.0.0.weight", ())[1:2] == (in_channels,)


def is_mt5(shapes: Shapes) -> bool:
    """Whether these are the keys of mT5; Flan-UL2 has the same, and is wider."""
    return is_t5(shapes) and shapes["shared.weight"][1:] == (MT5_WIDTH,)


def unet_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """Configuration of the ``KandinskyV20UNet``."""
    context_dim, text_dim = shape_of(shapes, "to_model_dim.weight")
    return {
        **torso_config(shapes, inputs),
        "cross_attention_dim": context_dim,
        "text_dim": text_dim,
        "text_dim_2": shape_of(shapes, "to_model_dim2.weight")[1],
        "pooled_text_dim": shape_of(shapes, "proj.weight")[1],
    }


def unet_rules(config: Config) -> RuleTable:
    """Rules of the UNet."""
    conditions = RuleTable(
        rules=(
            rename("to_model_dim.{p}", "encoder_hid_proj.text_proj.{p}"),
            rename("to_model_dim2.{p}", "encoder_hid_proj.text_proj_2.{p}"),
            rename("ln_model1.{p}", "encoder_hid_proj.norm.{p}"),
            rename("proj.{p}", "add_embedding.text_proj.{p}"),
            rename("ln_model2.{p}", "add_embedding.text_norm.{p}"),
            *(rename(f"proj2.{n}_linear.{{p}}", f"add_embedding.pool_2.to_{n}.{{p}}") for n in "qkv"),
            rename("proj2.out.{p}", "add_embedding.pool_2.to_out.{p}"),
            rename("ln_model3.{p}", "add_embedding.text_norm_2.{p}"),
        )
    )
    return torso_rules(config) + conditions
