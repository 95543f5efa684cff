"""Where every tensor of an original IP-Adapter goes, which lies in one file with the UNet that it was trained with.

Original code: ai-forever/kandinsky3-diffusers, ``UNetKandi3IpAdapter``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..conversion.errors import ConversionError
from ..conversion.matching import Shapes
from ..conversion.recipe import Config, Inputs
from ..conversion.rules import Drop, RuleTable, rename
from ..conversion.shapes import count_modules, shape_of
from .weights import unet_rules


BASE = "of the UNet that the adapter was trained with; it is loaded into the one of a pipeline"

_LEVEL = re.compile(r"down_samples\.(\d+)\.resnet_attn_blocks\.0\.1\.attention\.processor\.to_key_ip\.weight")


def is_ip_adapter(shapes: Shapes) -> bool:
    """Whether these are the keys of an IP-Adapter, with or without the UNet."""
    return {"image_proj.weight", "image_norm.weight"} <= shapes.keys() and any(map(_LEVEL.fullmatch, shapes))


def ip_adapter_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """The sizes of an adapter, and of the UNets that it fits.

    The first level has no cross-attention, so its width does not count; that of the second stands for it.
    """
    count_modules(shapes, "down_samples")  # raises where there are too many
    widths = {int(found[1]): shape for key, shape in shapes.items() if (found := _LEVEL.fullmatch(key))}
    if sorted(widths) != list(range(1, len(widths) + 1)):
        raise ConversionError(f"There are adapters for the levels {sorted(widths)}; levels from 1 on are expected.")
    channels = [widths[level][0] for level in sorted(widths)]
    context = widths[1][1]
    rows, embed_width = shape_of(shapes, "image_proj.weight")
    return {
        "block_out_channels": [channels[0], *channels],
        "layers_per_block": count_modules(shapes, "down_samples.1.resnet_attn_blocks"),
        "cross_attention_dim": context,
        "image_embed_dim": embed_width,
        "num_image_text_embeds": rows // context,
    }


def ip_adapter_shapes(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Key to shape of all that a written adapter has to hold."""
    import torch

    from .ip_adapter_unet import IPAdapter, layer_sizes
    from .unet import Kandinsky3UNet

    names = ("block_out_channels", "layers_per_block", "cross_attention_dim")
    with torch.device("meta"):
        unet = Kandinsky3UNet(**{name: config[name] for name in names}, groups=1, attention_head_dim=1)
    sizes = (config[name] for name in ("cross_attention_dim", "image_embed_dim", "num_image_text_embeds"))
    return IPAdapter.on_meta(layer_sizes(unet), *sizes).shapes


def ip_adapter_rules(config: Config) -> RuleTable:
    """Rules of an adapter; what belongs to the UNet is left out, and nothing else."""
    base = unet_rules(config)
    of_unet = (
        *(source for rule in base.rules for source in rule.sources),
        "projection_lin.weight",
        "projection_ln.{p}",
    )
    layers = {"to_key_ip": "to_k_ip", "to_v_ip": "to_v_ip", "to_out_ip": "to_out_ip"}
    return RuleTable(
        rules=(
            rename("image_proj.{p}", "image_proj.proj.{p}"),
            rename("image_norm.{p}", "image_proj.norm.{p}"),
            *(
                rename(
                    f"{{attention}}.attention.processor.{source}.{{p}}",
                    f"ip_adapter.{{attention}}.attention.{to}.{{p}}",
                )
                for source, to in layers.items()
            ),
        ),
        drops=tuple(Drop(source, BASE) for source in of_unet),
        paths=base.paths,
    )
