"""Where every tensor of the KandiSuperRes releases goes: rules, and configurations read from tensor shapes.

Original code: ai-forever/KandiSuperRes, folder ``KandiSuperRes``.
"""

from __future__ import annotations

from typing import Any

from ..conversion.errors import ConversionError
from ..conversion.matching import Shapes
from ..conversion.recipe import Config, Inputs
from ..conversion.rules import LIGHTNING_DROPS, Drop, RuleTable, rename
from ..conversion.shapes import count_modules, shape_of


GROUPS = 32  # what shapes cannot tell, as published


# ------------------------------------------------------------------------------------------------ UNet
def is_unet(shapes: Shapes) -> bool:
    """Whether these are the keys of the UNet; those of x4, x2 and Flash are the same."""
    return {"init_conv.weight", "down_samples.0.resnet_attn_blocks.0.0.in_block.projection.weight"} <= shapes.keys()


def unet_config(shapes: Shapes, inputs: Inputs, *, published: str) -> dict[str, Any]:
    """Configuration of the ``KandiSuperResUNet`` (original: ``UNet`` of ``unet_sr.py``).

    Args:
        shapes: of its file.
        inputs: the release.
        published: name under which the original config has the UNet's arguments.
    """
    levels = range(count_modules(shapes, "down_samples"))
    first, in_channels = shape_of(shapes, "init_conv.weight")[:2]
    channels = [
        shape_of(shapes, f"down_samples.{level}.resnet_attn_blocks.0.0.in_block.projection.weight")[0]
        for level in levels
    ]
    sample_channels = shape_of(shapes, "out_conv.weight")[0]
    if in_channels != 2 * sample_channels:
        raise ConversionError(
            f"The first layer has {in_channels} channels; it has to have {2 * sample_channels}, half of them for the "
            "picture of low resolution."
        )
    groups = inputs.argument(published, "groups", GROUPS)
    if groups < 1 or any(width % groups for width in (first, *channels)):
        raise ConversionError(
            f"groups is {groups}, which does not divide each of {', '.join(map(str, sorted({first, *channels})))}; it "
            "stands in the original config (original_config, --original-config)."
        )
    return {
        "sample_channels": sample_channels,
        "init_channels": first,
        "block_out_channels": channels,
        "layers_per_block": [count_modules(shapes, f"down_samples.{level}.resnet_attn_blocks") for level in levels],
        "time_embedding_dim": shape_of(shapes, "to_time_embed.1.weight")[0],
        "groups": groups,
    }


IN_BLOCK = {
    "time_mlp.1": "time_emb_proj",
    "in_block.group_norm": "norm1",
    "in_block.projection": "conv1",
    "out_block.group_norm": "norm2",
    "out_block.projection": "conv2",
    "res_block": "conv_shortcut",
    "in_block.change_resolution.change_resolution": "sampler",
    "change_resolution.change_resolution": "shortcut_sampler",
}


def unet_rules(config: Config) -> RuleTable:
    """Rules of the UNet; a checkpoint of the training holds it twice, and what Lightning needs."""
    blocks = [
        (f"{source}.{{level}}.resnet_attn_blocks.{{layer}}.0", f"{target}.{{level}}.resnets.{{layer}}")
        for source, target in (("down_samples", "down_blocks"), ("up_samples", "up_blocks"))
    ]
    return RuleTable(
        rules=(
            rename("to_time_embed.1.{p}", "time_embedding.linear_1.{p}"),
            rename("to_time_embed.3.{p}", "time_embedding.linear_2.{p}"),
            rename("init_conv.{p}", "conv_in.{p}"),
            rename("norm.{p}", "conv_norm_out.{p}"),
            rename("out_conv.{p}", "conv_out.{p}"),
            *(
                rename(f"{source}.{old}.{{p}}", f"{target}.{new}.{{p}}")
                for source, target in blocks
                for old, new in IN_BLOCK.items()
            ),
        ),
        drops=(*LIGHTNING_DROPS, Drop("state_dict/{rest}", "the weights without the moving average")),
    )


# ------------------------------------------------------------------------------------------------ context
def is_context(shapes: Shapes) -> bool:
    """Whether this is the stored context of the empty prompt."""
    return shapes.keys() == {"context"} and len(shapes["context"]) == 2


def is_context_mask(shapes: Shapes) -> bool:
    """Whether this is the mask of that context."""
    return shapes.keys() == {"context_mask"} and len(shapes["context_mask"]) == 1


def context_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """Configuration of the ``KandiSuperResContext``."""
    return dict(zip(("tokens", "width"), shape_of(shapes, "context"), strict=True))


def context_rules(config: Config) -> RuleTable:
    """Rules of the context."""
    return RuleTable(rules=(rename("context", "states"),))


def context_mask_rules(config: Config) -> RuleTable:
    """Rules of its mask."""
    return RuleTable(rules=(rename("context_mask", "mask"),))
