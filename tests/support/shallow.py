"""Models with fewer layers than those of the tiny releases, for what takes long with each layer, as most things do."""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch

from kandinsky_diffusers import Kandinsky3UNet
from kandinsky_diffusers.conversion.matching import match
from kandinsky_diffusers.k3.weights import unet_rules


Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, list[Any]]  # name -> [shape, dtype, init, ...], as in a manifest

BLOCKS = re.compile(r"(down_samples|up_samples|convs)\.")
ADAPTER = re.compile(r".*\.processor\.(to_(?P<to>query|key|v|out)_(?P<kind>ip|lora\.down|lora\.up)\.\w+)")
ADAPTED = {"query": "to_query", "key": "to_key", "v": "to_value", "out": "output_layer"}


def shallow(unet: Any) -> Any:
    """A UNet of 2.x like `unet`, with random weights, of its first and its last level, with one layer each."""
    config = unet.config
    ends = {"down_block_types": config.down_block_types, "up_block_types": config.up_block_types}
    changed: dict[str, Any] = {name: [blocks[0], blocks[-1]] for name, blocks in ends.items()}
    changed |= {"block_out_channels": [config.block_out_channels[0], config.block_out_channels[-1]]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = type(unet).from_config({**config, **changed, "layers_per_block": 1})
    return model.to(unet.dtype).eval()


def shallow_3(tensors: Tensors) -> Tensors:
    """What a manifest of 3.x lists, of a UNet, a ControlNet, an IP-Adapter or a LoRA, for a UNet of two levels.

    Its levels have two layers each, the fewest that stock can build. Manifests of anything else stay as they are.
    """
    prefix = "unet/" if "unet/in_layer.weight" in tensors else ""
    recorded: Shapes = {name.removeprefix(prefix): tuple(shape) for name, (shape, *_) in tensors.items()}
    if not any(name.startswith("feature_pooling.") for name in recorded):
        return tensors
    unet = _unet_of_two_levels(recorded)
    made = _adapters(recorded, unet)
    if "convs.0.weight" in recorded:
        made |= _controlnet(recorded, unet)
    elif "in_layer.weight" in recorded:
        made |= unet
    others = {name: entry for name, entry in tensors.items() if not BLOCKS.match(name.removeprefix(prefix))}
    for name, shape in made.items():
        _, *how = others.get(f"{prefix}{name}", [(), "float32", "bias" if len(shape) == 1 else "linear"])
        others[f"{prefix}{name}"] = [list(shape), *how]
    return others


def _unet_of_two_levels(recorded: Shapes) -> Shapes:
    """Names and shapes of the original's UNet to which a file with these tensors would belong."""

    def width(attention: str, to: str) -> int:
        whole, adapter = f"{attention}.{to}.weight", f"{attention}.processor.{to}_lora.down.weight"
        return recorded[whole if whole in recorded else adapter][1]

    first_level = width("down_samples.1.self_attention_block.attention", "to_query")
    config = {
        "in_channels": recorded.get("in_layer.weight", (0, 4))[1],
        "out_channels": recorded.get("out_layer.2.bias", (4,))[0],
        "time_embedding_dim": width("feature_pooling.attention", "to_query"),
        "groups": 1,
        "attention_head_dim": 1,
        "layers_per_block": 2,
        # the last attention has half of it, and so is as wide as one of those recorded: heads and groups fit
        "block_out_channels": (2 * first_level, 2 * first_level),
        "cross_attention_dim": width("feature_pooling.attention", "to_key"),
    }
    with torch.device("meta"):
        model = Kandinsky3UNet(**config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    own = {key: shape for key, shape in shapes.items() if not key.startswith("encoder_hid_proj.")}
    return match(unet_rules(config).inverse, own).target_shapes


def _controlnet(recorded: Shapes, unet: Shapes) -> Shapes:
    """It has what the UNet has on the way down but the lowest level, a convolution for each level, and the hint's."""
    missing = ("down_samples.1.", "up_samples.", "out_layer.")
    made = {name: shape for name, shape in unet.items() if not name.startswith(missing)}
    first, level = unet["in_layer.bias"][0], unet["down_samples.1.self_attention_block.attention.to_query.weight"][0]
    hint = {name: (first, *recorded[name][1:]) for name in recorded if name.startswith("input_hint_block.out.")}
    return made | hint | {"convs.0.weight": (level, level, 1, 1), "convs.0.bias": (level,)}


def _adapters(recorded: Shapes, unet: Shapes) -> Shapes:
    """IP-Adapters are in every cross-attention of the blocks, LoRAs in every attention."""
    parts = {match[1]: (match, recorded[name]) for name in recorded if (match := ADAPTER.fullmatch(name))}
    attentions = [name.removesuffix(".to_query.weight") for name in unet if name.endswith(".to_query.weight")]
    made: Shapes = {}
    for attention, (part, (match, shape)) in itertools.product(attentions, parts.items()):
        outputs, inputs = unet[f"{attention}.{ADAPTED[match['to']]}.weight"]
        shapes = {
            "ip": (outputs, inputs)[: len(shape)],
            "lora.down": (shape[0], inputs),
            "lora.up": (outputs, shape[-1]),
        }
        if match["kind"] != "ip" or "resnet_attn_blocks" in attention:
            made[f"{attention}.processor.{part}"] = shapes[match["kind"]]
    return made
