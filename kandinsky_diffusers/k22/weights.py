"""The tensors of the Kandinsky 2.2 release: published under the names of diffusers and transformers, so few rules.

What the files are is told by keys and shapes.  Where these are the same in other releases, nobody can tell: MoVQ has
not changed since 2.1, and CLIP and the prior of 2.1 differ in their width alone.
"""

from __future__ import annotations

from itertools import product

from ..clip_weights import is_half
from ..conversion.matching import Shapes
from ..conversion.recipe import Config
from ..conversion.rules import REST, RuleTable, rename


WIDTH_OF_21 = 768  # of the embeddings of CLIP ViT-L/14

# role of a decoder -> input channels of its UNet, and whether it sees a hint
UNETS = {"decoder": (4, False), "decoder-inpaint": (9, False), "controlnet": (8, True)}

# The attention of MoVQ has been called like this before diffusers 0.18.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
ATTENTIONS = (
    "encoder.mid_block.attentions.{a}",
    "decoder.mid_block.attentions.{a}",
    "encoder.down_blocks.{level}.attentions.{a}",
    "decoder.up_blocks.{level}.attentions.{a}",
)


def is_unet(shapes: Shapes, role: str) -> bool:
    """Whether these are the keys of the 2.2 UNet of a role."""
    channels, sees_hint = UNETS[role]
    return (
        "encoder_hid_proj.image_embeds.weight" in shapes
        and shapes.get("conv_in.weight", ())[1:2] == (channels,)
        and ("add_embedding.input_hint_block.0.weight" in shapes) is sees_hint
    )


def is_movq(shapes: Shapes) -> bool:
    """Whether these are the keys of the MoVQ autoencoder."""
    return "decoder.conv_norm_out.conv_y.weight" in shapes and "quantize.embedding.weight" in shapes


def is_prior(shapes: Shapes) -> bool:
    """Whether these are the keys of the prior."""
    return "prd_embedding" in shapes and shapes.get("clip_mean") != (1, WIDTH_OF_21)


def is_text_encoder(shapes: Shapes) -> bool:
    """Whether these are the keys of the text half of CLIP."""
    return _is_half("text_projection.weight", "visual_projection.weight", shapes)


def is_image_encoder(shapes: Shapes) -> bool:
    """Whether these are the keys of the image half of CLIP."""
    return _is_half("visual_projection.weight", "text_projection.weight", shapes)


def _is_half(projection: str, other: str, shapes: Shapes) -> bool:
    return is_half(projection, other, shapes) and shapes[projection][:1] != (WIDTH_OF_21,)


def same_names(config: Config) -> RuleTable:
    """Rules of a model that was published as it is."""
    return RuleTable(rules=(rename(REST, REST),))


def movq_rules(config: Config) -> RuleTable:
    """Rules of MoVQ."""
    old = (
        rename(f"{path}.{source}.{{p}}", f"{path}.{target}.{{p}}", optional=True)
        for path, (source, target) in product(ATTENTIONS, OLD_ATTENTION.items())
    )
    return RuleTable(rules=(rename(REST, REST), *old))
