"""Where the tensors of the UNets of 2.0 and 2.1 go, all but those that take in texts and pictures.

Original code: ``UNetModel`` in ai-forever/Kandinsky-2 (``kandinsky2/model/unet.py``).
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from .conversion.errors import ConversionError
from .conversion.matching import Shapes
from .conversion.recipe import Config, Inputs
from .conversion.rules import RuleTable, rename, split
from .conversion.shapes import count_modules, shape_of
from .conversion.transforms import SplitHeads, Squeeze


HEAD_DIM = 64  # what shapes cannot tell, as published

ATTENTION_DOWN, PLAIN_DOWN = "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"
ATTENTION_UP, PLAIN_UP = "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"


def torso_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """The part of the configuration that 2.0 and 2.1 share."""
    layers = _layers_per_block(shapes)
    firsts = range(1, 1 + count_modules(shapes, "input_blocks"), layers + 1)
    attention = [f"input_blocks.{first}.1.qkv.weight" in shapes for first in firsts]
    channels = [shape_of(shapes, f"input_blocks.{first}.0.out_layers.3.weight")[0] for first in firsts]
    return {
        "sample_size": inputs.setting("model_config.image_size", 64),
        "in_channels": shape_of(shapes, "input_blocks.0.0.weight")[1],
        "out_channels": shape_of(shapes, "out.2.weight")[0],
        "down_block_types": [ATTENTION_DOWN if level else PLAIN_DOWN for level in attention],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [ATTENTION_UP if level else PLAIN_UP for level in reversed(attention)],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "attention_head_dim": _head_dim([*itertools.compress(channels, attention), channels[-1]], inputs),
        "resnet_time_scale_shift": "scale_shift",
    }


def torso_rules(config: Config) -> RuleTable:
    """The rules that 2.0 and 2.1 share; numbered blocks become levels, whose layout the configuration tells."""
    resnet, attention = "{resnet}", "{attention}"
    heads = SplitHeads(config["attention_head_dim"], parts=3)
    context_heads = SplitHeads(config["attention_head_dim"], parts=2)
    to_qkv = tuple(f"{attention}.to_{name}" for name in "qkv")
    to_context = (f"{attention}.add_k_proj", f"{attention}.add_v_proj")
    return RuleTable(
        rules=(
            rename("time_embed.0.{p}", "time_embedding.linear_1.{p}"),
            rename("time_embed.2.{p}", "time_embedding.linear_2.{p}"),
            rename("input_blocks.0.0.{p}", "conv_in.{p}"),
            rename("out.0.{p}", "conv_norm_out.{p}"),
            rename("out.2.{p}", "conv_out.{p}"),
            rename(f"{resnet}.in_layers.0.{{p}}", f"{resnet}.norm1.{{p}}"),
            rename(f"{resnet}.in_layers.2.{{p}}", f"{resnet}.conv1.{{p}}"),
            rename(f"{resnet}.emb_layers.1.{{p}}", f"{resnet}.time_emb_proj.{{p}}"),
            rename(f"{resnet}.out_layers.0.{{p}}", f"{resnet}.norm2.{{p}}"),
            rename(f"{resnet}.out_layers.3.{{p}}", f"{resnet}.conv2.{{p}}"),
            rename(f"{resnet}.skip_connection.{{p}}", f"{resnet}.conv_shortcut.{{p}}"),
            rename(f"{attention}.norm.{{p}}", f"{attention}.group_norm.{{p}}"),
            split(f"{attention}.qkv.weight", _each(to_qkv, "weight"), Squeeze(), heads),
            split(f"{attention}.qkv.bias", _each(to_qkv, "bias"), heads),
            split(f"{attention}.encoder_kv.weight", _each(to_context, "weight"), Squeeze(), context_heads),
            split(f"{attention}.encoder_kv.bias", _each(to_context, "bias"), context_heads),
            rename(f"{attention}.proj_out.weight", f"{attention}.to_out.0.weight", Squeeze()),
            rename(f"{attention}.proj_out.bias", f"{attention}.to_out.0.bias"),
        ),
        paths=_paths(config),
    )


def _paths(config: Config) -> dict[str, dict[str, str]]:
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    attentions = {"middle_block.1": "mid_block.attentions.0"}
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    for level, block in itertools.product(range(levels), range(layers + 1)):
        down, target = f"input_blocks.{1 + level * (layers + 1) + block}", f"down_blocks.{level}"
        resnets[f"{down}.0"] = f"{target}.resnets.{block}" if block < layers else f"{target}.downsamplers.0"
        if config["down_block_types"][level] == ATTENTION_DOWN and block < layers:
            attentions[f"{down}.1"] = f"{target}.attentions.{block}"
        up, target = f"output_blocks.{level * (layers + 1) + block}", f"up_blocks.{level}"
        resnets[f"{up}.0"] = f"{target}.resnets.{block}"
        with_attention = config["up_block_types"][level] == ATTENTION_UP
        if with_attention:
            attentions[f"{up}.1"] = f"{target}.attentions.{block}"
        if block == layers:
            resnets[f"{up}.{2 if with_attention else 1}"] = f"{target}.upsamplers.0"
    return {"resnet": resnets, "attention": attentions}


def _layers_per_block(shapes: Shapes) -> int:
    """The up path has one residual block more per level than the down path, and an upsampler after the last one."""
    ends = [int(found[1]) for key in shapes if (found := re.match(r"output_blocks\.(\d+)\.[12]\.in_layers\.0", key))]
    return min(ends) if ends else count_modules(shapes, "output_blocks") - 1


def _head_dim(widths: list[int], inputs: Inputs) -> int:
    """Shapes do not tell the width of a head, but each layer with attention, the middle one too, has whole heads."""
    head_dim = inputs.setting("model_config.num_head_channels", HEAD_DIM)
    if head_dim < 1 or any(width % head_dim for width in widths):
        raise ConversionError(
            f"Attention of width {', '.join(map(str, sorted(set(widths))))} does not have heads of width {head_dim}; "
            "it stands as num_head_channels in the original config (original_config, --original-config)."
        )
    return head_dim


def _each(targets: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(f"{target}.{name}" for target in targets)
