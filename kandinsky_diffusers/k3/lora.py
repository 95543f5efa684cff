"""LoRAs of ai-forever/kandinsky3-diffusers (the fork): rules for their keys, and conversion to diffusers' format."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from ..conversion.errors import ConversionError
from ..conversion.matching import Shapes
from ..conversion.recipe import Config, Inputs, Part, Release, Repo, SourceFile, WeightsComponent
from ..conversion.rules import RuleTable, rename
from ..conversion.shapes import shape_of
from ..lora_files import LoraFile, layer_of, read_lora
from .weights import unet_paths


PROCESSOR_LAYERS = {"to_query": "to_q", "to_key": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
SIDES = {"down": "lora_A", "up": "lora_B"}

_ATTENTION = re.compile(r"(.+)\.attention\.processor\.")
_BLOCK = re.compile(r"(?:down|up)_samples\.(\d\d?)\.(?:resnet_attn_blocks\.(\d\d?)\.)?")  # up to 99, as in no model


def is_lora(shapes: Shapes) -> bool:
    """Whether these are the keys of a LoRA in the fork's format."""
    table = lora_rules(shapes)
    return bool(shapes) and all(table.target_of(key) for key in shapes)


def lora_rules(keys: Iterable[str], prefix: str = "") -> RuleTable:
    """Rules for as many blocks as the keys have.

    The processor adds the LoRA of the output, computed from what the output layer is given, to that layer's result; so
    it is a LoRA of this layer.

    Args:
        keys: names of tensors or attentions, as in the file.
        prefix: before peft's names, on the other side.
    """
    numbers = [(int(found[1]), int(found[2] or 0)) for key in keys if (found := _BLOCK.match(key))]
    levels, layers = (max(column) + 1 for column in zip(*numbers, (0, 0), strict=True))
    attentions = unet_paths({"block_out_channels": range(levels), "layers_per_block": layers})["attention"]
    processor, layer = "{block}.attention.processor.{layer}_lora", prefix + "{block}.attention.{layer}"
    return RuleTable(
        rules=tuple(rename(f"{processor}.{side}.weight", f"{layer}.{to}.weight") for side, to in SIDES.items()),
        paths={"block": {"feature_pooling": "add_time_condition", **attentions}, "layer": PROCESSOR_LAYERS},
    )


# ------------------------------------------------------------------------------------------------ conversion
def lora_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """The rank, and of each attention the widths of its query, its keys and itself."""
    attentions = dict.fromkeys(found[1] for key in shapes if (found := _ATTENTION.match(key)))
    down, up = "{}.attention.processor.to_{}_lora.down.weight", "{}.attention.processor.to_{}_lora.up.weight"
    ranks = {shape_of(shapes, down.format(name, "query"))[0] for name in attentions}
    if len(ranks) != 1:
        raise ConversionError(f"The LoRA has the ranks {sorted(ranks)}; the fork trains one with the same everywhere.")
    return {
        "rank": ranks.pop(),
        "attentions": {
            name: (
                shape_of(shapes, down.format(name, "query"))[1],
                shape_of(shapes, down.format(name, "key"))[1],
                shape_of(shapes, up.format(name, "query"))[0],
            )
            for name in attentions
        },
    }


def lora_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """What the written file holds."""
    rank, attentions = config["rank"], config["attentions"]
    table = _written_rules(config)
    shapes = {}
    for name, (query, key, width) in attentions.items():
        inputs = {"to_query": query, "to_key": key, "to_v": key, "to_out": width}
        for layer, inside in inputs.items():
            for side, shape in (("down", (rank, inside)), ("up", (width, rank))):
                shapes[str(table.target_of(f"{name}.attention.processor.{layer}_lora.{side}.weight"))] = shape
    return shapes


def _written_rules(config: Config) -> RuleTable:
    return lora_rules((f"{name}." for name in config.get("attentions", ())), prefix="unet.")


def _act(lora: LoraFile) -> list[torch.Tensor]:
    """What each layer adds for an input of ones."""
    tensors = lora.tensors["unet"]
    layers = dict.fromkeys(map(layer_of, tensors))
    pairs = ((tensors[f"{name}.lora_A.weight"].float(), tensors[f"{name}.lora_B.weight"].float()) for name in layers)
    return [up @ down.sum(dim=1) for down, up in pairs]


def _load(folder: Path, variant: str | None) -> LoraFile:
    return read_lora(folder / LORA_WEIGHT_NAME_SAFE)


RELEASE_LORA = Release(
    "3-lora",
    "Kandinsky 3 LoRA",
    files=(SourceFile("lora", ("pytorch_model.bin", "model.safetensors"), is_lora),),
    repos=(
        Repo(
            "kandinsky-3-lora",
            None,
            main="lora",
            components=(
                WeightsComponent(
                    "",
                    "kandinsky_diffusers",
                    "LoRA",
                    parts=(Part("lora", _written_rules),),
                    configure=lora_config,
                    stem=LORA_WEIGHT_NAME_SAFE.removesuffix(".safetensors"),
                    shapes=lora_shapes,
                ),
            ),
            smoke=_act,
            load=_load,
        ),
    ),
)
