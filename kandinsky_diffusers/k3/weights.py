"""Where every tensor of the Kandinsky 3.0 and 3.1 releases goes: rules, and configurations read from tensor shapes.

Original code: ai-forever/Kandinsky-3, folder ``kandinsky3``.
"""

from __future__ import annotations

import itertools
from typing import Any

from ..conversion.errors import ConversionError
from ..conversion.matching import Shapes
from ..conversion.recipe import Config, Inputs
from ..conversion.rules import RuleTable, rename
from ..conversion.shapes import count_modules, shape_of
from ..conversion.transforms import Flatten


# What shapes cannot tell, as published.
HEAD_DIM = 64
GROUPS = 32

PROJECTION = {
    "0.weight": "encoder_hid_proj.projection_linear.weight",
    "1.weight": "encoder_hid_proj.projection_norm.weight",
    "1.bias": "encoder_hid_proj.projection_norm.bias",
}
NULL_EMBEDDING = "null_embedding"


# ------------------------------------------------------------------------------------------------ UNet
def is_unet(shapes: Shapes, in_channels: int) -> bool:
    """Whether these are the keys of a UNet with that many input channels (4; 9 for inpainting), and no projection.

    Flash has the same keys.
    """
    nested = any(key.startswith("projections/") for key in shapes)
    pools = "feature_pooling.attention.to_query.weight" in shapes
    return pools and not nested and shapes.get("in_layer.weight", ())[1:2] == (in_channels,)


def unet_config(shapes: Shapes, inputs: Inputs, *, unet: str, projection: str, published: str) -> dict[str, Any]:
    """Configuration of the ``Kandinsky3UNet`` (original: ``UNet``).

    Args:
        shapes: of the UNet's file.
        inputs: the release.
        unet: name of the UNet's file.
        projection: name of the file with the projection.
        published: name under which the original config has the UNet's arguments.
    """
    channels = [
        shape_of(shapes, f"down_samples.{level}.resnet_attn_blocks.0.0.resnet_blocks.3.projection.weight")[0]
        for level in range(count_modules(shapes, "down_samples"))
    ]
    first, in_channels = shape_of(shapes, "in_layer.weight")[:2]
    if first * 2 != channels[0]:
        raise ConversionError(
            f"The first layer has {first} channels; it has to be half of the first level's {channels[0]}."
        )
    if NULL_EMBEDDING not in shapes and inputs.files[unet].has_weights:
        raise ConversionError(f"The tensor {NULL_EMBEDDING} is missing.")
    out_channels = shape_of(shapes, "out_layer.2.weight")[0]
    context = shape_of(shapes, "feature_pooling.attention.to_key.weight")[1]
    head_dim, groups = inputs.argument(published, "head_dim", HEAD_DIM), inputs.argument(published, "groups", GROUPS)
    time_width = shape_of(shapes, "to_time_embed.1.weight")[0]
    _check_divides(head_dim, [time_width, *channels], "head_dim")
    _check_divides(groups, [first, *channels], "groups")
    return {
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "time_embedding_dim": time_width,
        "groups": groups,
        "attention_head_dim": head_dim,
        "layers_per_block": count_modules(shapes, "down_samples.0.resnet_attn_blocks"),
        "block_out_channels": channels,
        "cross_attention_dim": context,
        "encoder_hid_dim": _text_width(inputs, projection, default=context),
        "has_null_embedding": NULL_EMBEDDING in shapes,
    }


def _check_divides(number: int, widths: list[int], name: str) -> None:
    if number < 1 or any(width % number for width in widths):
        raise ConversionError(
            f"{name} is {number}, which does not divide each of {', '.join(map(str, sorted(set(widths))))}; it stands "
            "in the original config (original_config, --original-config)."
        )


def _text_width(inputs: Inputs, projection: str, default: int) -> int:
    shapes = inputs.files[projection].shapes if projection in inputs.files else {}
    return next((shape[1] for key, shape in shapes.items() if key.endswith("0.weight")), default)


def unet_rules(config: Config) -> RuleTable:
    """Rules of the UNet without its projection; below its blocks most names are the same."""
    resnet, attention = "{resnet}", "{attention}"
    same_in_resnet = (
        "resnet_blocks.{rest}",
        *(f"shortcut_{n}.{{p}}" for n in ("projection", "up_sample", "down_sample")),
    )
    same_in_attention = ("in_norm.{rest}", "out_norm.{rest}", "feed_forward.{rest}")
    return RuleTable(
        rules=(
            rename("to_time_embed.1.{p}", "time_embedding.linear_1.{p}"),
            rename("to_time_embed.3.{p}", "time_embedding.linear_2.{p}"),
            rename("feature_pooling.attention.{to}.weight", "add_time_condition.attention.{to}.weight"),
            rename("in_layer.{p}", "conv_in.{p}"),
            rename("out_layer.0.{p}", "conv_norm_out.{p}"),
            rename("out_layer.2.{p}", "conv_out.{p}"),
            *(rename(f"{resnet}.{name}", f"{resnet}.{name}") for name in same_in_resnet),
            *(rename(f"{attention}.{name}", f"{attention}.{name}") for name in same_in_attention),
            rename(f"{attention}.attention.{{to}}.weight", f"{attention}.attention.{{to}}.weight"),
            rename(NULL_EMBEDDING, NULL_EMBEDDING, Flatten(), optional=True),
        ),
        paths=unet_paths(config),
    )


def unet_paths(config: Config) -> dict[str, dict[str, str]]:
    """Modules of the UNet by kind, `resnet`, `attention` and `to`: their paths in the original and in diffusers."""
    to = {"to_query": "to_q", "to_key": "to_k", "to_value": "to_v", "output_layer": "to_out.0"}
    resnets, attentions = {}, {}
    levels = range(len(config["block_out_channels"]))
    for (source, target), level in itertools.product(
        (("down_samples", "down_blocks"), ("up_samples", "up_blocks")), levels
    ):
        attentions[f"{source}.{level}.self_attention_block"] = f"{target}.{level}.attentions.0"
        for layer in range(config["layers_per_block"]):
            block = f"{source}.{level}.resnet_attn_blocks.{layer}"
            resnets[f"{block}.0"] = f"{target}.{level}.resnets_in.{layer}"
            attentions[f"{block}.1"] = f"{target}.{level}.attentions.{layer + 1}"
            resnets[f"{block}.2"] = f"{target}.{level}.resnets_out.{layer}"
    return {"resnet": resnets, "attention": attentions, "to": to}


# ------------------------------------------------------------------------------------------------ projection
def is_projection(shapes: Shapes, prefix: str = "") -> bool:
    """Whether these are the keys of the projection between text encoder and UNet."""
    return set(shapes) == {f"{prefix}{key}" for key in PROJECTION}


def projection_rules(config: Config, prefix: str = "") -> RuleTable:
    """Rules of the projection, which diffusers has in the UNet."""
    return RuleTable(rules=tuple(rename(f"{prefix}{source}", target) for source, target in PROJECTION.items()))
