"""Where every tensor of the Kandinsky 3.0 and 3.1 releases goes: rules, and configurations read from tensor shapes.

Original code: ai-forever/Kandinsky-3, folder ``kandinsky3``; for the ControlNet ai-forever/kandinsky3-diffusers,
models/unet_kandi3.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from ..conversion.errors import ConversionError
from ..conversion.matching import Shapes
from ..conversion.recipe import Config, Inputs
from ..conversion.rules import Rule, RuleTable, rename
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
HINT = "input_hint_block"  # of a ControlNet


# ------------------------------------------------------------------------------------------------ UNet
def is_unet(shapes: Shapes, in_channels: int) -> bool:
    """Whether these are the keys of a UNet with that many input channels (4; 9 for inpainting), and no projection.

    Flash has the same keys.
    """
    nested = any(key.startswith("projections/") for key in shapes)
    pools = "feature_pooling.attention.to_query.weight" in shapes and f"{HINT}.conv1.weight" not in shapes
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
    if NULL_EMBEDDING not in shapes and inputs.files[unet].has_weights:
        raise ConversionError(f"The tensor {NULL_EMBEDDING} is missing.")
    sizes = _down_config(shapes, lambda name, default: inputs.argument(published, name, default))
    out_channels = shape_of(shapes, "out_layer.2.weight")[0]
    return {
        **sizes,
        "out_channels": None if out_channels == sizes["in_channels"] else out_channels,
        "encoder_hid_dim": _text_width(inputs, projection, default=sizes["cross_attention_dim"]),
        "has_null_embedding": NULL_EMBEDDING in shapes,
    }


def _down_config(shapes: Shapes, argument: Callable[[str, int], int]) -> dict[str, Any]:
    """What the way down tells; ``argument`` gives what the original's constructor got, from name and default."""
    channels = [
        shape_of(shapes, f"down_samples.{level}.resnet_attn_blocks.0.0.resnet_blocks.3.projection.weight")[0]
        for level in range(count_modules(shapes, "down_samples"))
    ]
    first, in_channels = shape_of(shapes, "in_layer.weight")[:2]
    if first * 2 != channels[0]:
        raise ConversionError(
            f"The first layer has {first} channels; it has to be half of the first level's {channels[0]}."
        )
    head_dim, groups = argument("head_dim", HEAD_DIM), argument("groups", GROUPS)
    time_width = shape_of(shapes, "to_time_embed.1.weight")[0]
    _check_divides(head_dim, [time_width, *channels], "head_dim")
    _check_divides(groups, [first, *channels], "groups")
    return {
        "in_channels": in_channels,
        "time_embedding_dim": time_width,
        "groups": groups,
        "attention_head_dim": head_dim,
        "layers_per_block": count_modules(shapes, "down_samples.0.resnet_attn_blocks"),
        "block_out_channels": channels,
        "cross_attention_dim": shape_of(shapes, "feature_pooling.attention.to_key.weight")[1],
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
    """Rules of the UNet without its projection."""
    return RuleTable(
        rules=(
            *_block_rules(shortcuts=("projection", "down_sample", "up_sample")),
            rename("out_layer.0.{p}", "conv_norm_out.{p}"),
            rename("out_layer.2.{p}", "conv_out.{p}"),
            rename(NULL_EMBEDDING, NULL_EMBEDDING, Flatten(), optional=True),
        ),
        paths=unet_paths(config),
    )


def unet_paths(config: Config) -> dict[str, dict[str, str]]:
    """Modules of the UNet by kind, `resnet`, `attention` and `to`: their paths in the original and in diffusers."""
    return _block_paths(config, {"down_samples": "down_blocks", "up_samples": "up_blocks"})


def _block_rules(shortcuts: tuple[str, ...]) -> tuple[Rule, ...]:
    """Rules of what comes before the blocks, and of the blocks, below which most names are the same."""
    resnet, attention = "{resnet}", "{attention}"
    same_in_resnet = ("resnet_blocks.{rest}", *(f"shortcut_{name}.{{p}}" for name in shortcuts))
    same_in_attention = ("in_norm.{rest}", "out_norm.{rest}", "feed_forward.{rest}")
    return (
        rename("to_time_embed.1.{p}", "time_embedding.linear_1.{p}"),
        rename("to_time_embed.3.{p}", "time_embedding.linear_2.{p}"),
        rename("feature_pooling.attention.{to}.weight", "add_time_condition.attention.{to}.weight"),
        rename("in_layer.{p}", "conv_in.{p}"),
        *(rename(f"{resnet}.{name}", f"{resnet}.{name}") for name in same_in_resnet),
        # a ControlNet of the first level alone has no attention
        *(rename(f"{attention}.{name}", f"{attention}.{name}", optional=True) for name in same_in_attention),
        rename(f"{attention}.attention.{{to}}.weight", f"{attention}.attention.{{to}}.weight", optional=True),
    )


def _block_paths(config: Config, ways: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Paths of the placeholders of :func:`_block_rules`; ``ways`` names the lists of blocks on both sides."""
    to = {"to_query": "to_q", "to_key": "to_k", "to_value": "to_v", "output_layer": "to_out.0"}
    resnets, attentions = {}, {}
    levels = range(len(config["block_out_channels"]))
    for (source, target), level in itertools.product(ways.items(), levels):
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


# ------------------------------------------------------------------------------------------------ ControlNet
def is_controlnet(shapes: Shapes) -> bool:
    """Whether these are the keys of a ControlNet."""
    return f"{HINT}.conv1.weight" in shapes and "convs.0.weight" in shapes


def controlnet_config(shapes: Shapes, inputs: Inputs, *, folder: str) -> dict[str, Any]:
    """Configuration of the ``Kandinsky3ControlNetModel`` (original: ``UNetKandi3Controlnet``).

    Args:
        shapes: of its file.
        inputs: the release.
        folder: where the file lies, with the original's arguments in a ``config.json`` beside it.
    """
    beside = inputs.json("release", f"{folder}/config.json")
    published = f"{folder}/diffusion_pytorch_model.safetensors"
    sizes = _down_config(shapes, lambda name, default: inputs.argument(published, name, beside.get(name, default)))
    halved = (shape_of(shapes, f"{HINT}.conv{number}.weight")[0] for number in (1, 3, 5, 7))
    return {
        **sizes,
        "conditioning_channels": shape_of(shapes, f"{HINT}.conv1.weight")[1],
        "conditioning_embedding_out_channels": list(halved),
    }


def controlnet_rules(config: Config) -> RuleTable:
    """Rules of the ControlNet."""
    convolutions = range(2, 2 * len(config.get("conditioning_embedding_out_channels", ())))
    hint = {f"{HINT}.conv{number}": f"controlnet_cond_embedding.blocks.{number - 2}" for number in convolutions}
    return RuleTable(
        rules=(
            *_block_rules(shortcuts=("projection", "down_sample")),
            rename(f"{HINT}.conv1.{{p}}", "controlnet_cond_embedding.conv_in.{p}"),
            rename("{hint}.{p}", "{hint}.{p}"),
            rename(f"{HINT}.out.{{p}}", "controlnet_cond_embedding.conv_out.{p}"),
            rename("convs.{level}.{p}", "controlnet_down_blocks.{level}.{p}"),
        ),
        paths={**_block_paths(config, {"down_samples": "down_blocks"}), "hint": hint},
    )
