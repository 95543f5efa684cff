"""Where every tensor of the Kandinsky 2.1 release goes: rules, and configurations read from tensor shapes.

Original code: ai-forever/Kandinsky-2, folder ``kandinsky2``.  All targets are stock classes of diffusers and
transformers.
"""

from __future__ import annotations

from typing import Any

from ..conversion.errors import ConversionError
from ..conversion.hub_source import model_settings
from ..conversion.matching import Shapes
from ..conversion.recipe import Config, Inputs
from ..conversion.rules import Drop, RuleTable, rename, split
from ..conversion.shapes import count_modules, shape_of
from ..conversion.transforms import AddLeadingAxis, SplitHeads
from ..mclip_weights import POSITION_IDS, is_mclip
from ..unet_weights import torso_config, torso_rules


# What shapes cannot tell, as published.
PRIOR_HEADS = 32


# ------------------------------------------------------------------------------------------------ UNet
def is_unet(shapes: Shapes, in_channels: int) -> bool:
    """Whether these are the keys of a 2.1 UNet with that many input channels (4: text to image, 9: inpainting)."""
    return "clip_to_seq.weight" in shapes and shapes.get("input_blocks.0.0.weight", ())[1:2] == (in_channels,)


def unet_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """Configuration of the ``UNet2DConditionModel`` (original: ``Text2ImUNet`` and ``InpaintText2ImUNet``)."""
    context_dim, text_dim = shape_of(shapes, "to_model_dim_n.weight")
    return {
        **torso_config(shapes, inputs),
        "cross_attention_dim": context_dim,
        "encoder_hid_dim": text_dim,
        "encoder_hid_dim_type": "text_image_proj",
        "addition_embed_type": "text_image",
    }


def unet_rules(config: Config) -> RuleTable:
    """Rules of the UNet."""
    conditions = RuleTable(
        rules=(
            rename("clip_to_seq.{p}", "encoder_hid_proj.image_embeds.{p}"),
            rename("to_model_dim_n.{p}", "encoder_hid_proj.text_proj.{p}"),
            rename("proj_n.{p}", "add_embedding.text_proj.{p}"),
            rename("ln_model_n.{p}", "add_embedding.text_norm.{p}"),
            rename("img_layer.{p}", "add_embedding.image_proj.{p}"),
        )
    )
    return torso_rules(config) + conditions


# ------------------------------------------------------------------------------------------------ prior
def is_prior(shapes: Shapes) -> bool:
    """Whether these are the keys of the prior."""
    return "model.prd_emb" in shapes


def is_stats(shapes: Shapes) -> bool:
    """Whether these are the mean and the standard deviation of CLIP image embeddings."""
    return set(shapes) == {"clip_mean", "clip_std"}


def prior_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """Configuration of the ``PriorTransformer`` (original: ``PriorDiffusionModel``)."""
    _, length, width = shape_of(shapes, "model.positional_embedding")
    heads = inputs.setting("prior.params.model.hparams.xf_heads", PRIOR_HEADS)
    if heads < 1 or width % heads:
        raise ConversionError(
            f"The prior of width {width} does not have {heads} attention heads; the number stands as xf_heads in the "
            "original config (original_config, --original-config)."
        )
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": count_modules(shapes, "model.transformer.resblocks"),
        "embedding_dim": shape_of(shapes, "model.text_enc_proj.weight")[1],
        "num_embeddings": length - 4,
        "additional_embeddings": 4,
        "embedding_proj_dim": shape_of(shapes, "model.text_emb_proj.weight")[1],
        "clip_embed_dim": shape_of(shapes, "model.out_proj.weight")[0],
    }


def prior_rules(config: Config) -> RuleTable:
    """Rules of the prior itself."""
    source, target = "model.transformer.resblocks.{layer}", "transformer_blocks.{layer}"
    heads = SplitHeads(config["attention_head_dim"], parts=3)
    return RuleTable(
        rules=(
            rename("model.positional_embedding", "positional_embedding"),
            rename("model.prd_emb", "prd_embedding"),
            rename("model.time_embed.0.{p}", "time_embedding.linear_1.{p}"),
            rename("model.time_embed.2.{p}", "time_embedding.linear_2.{p}"),
            rename("model.clip_img_proj.{p}", "proj_in.{p}"),
            rename("model.text_emb_proj.{p}", "embedding_proj.{p}"),
            rename("model.text_enc_proj.{p}", "encoder_hidden_states_proj.{p}"),
            rename("model.final_ln.{p}", "norm_out.{p}"),
            rename("model.out_proj.{p}", "proj_to_clip_embeddings.{p}"),
            rename(f"{source}.ln_1.{{p}}", f"{target}.norm1.{{p}}"),
            split(f"{source}.attn.c_qkv.{{p}}", tuple(f"{target}.attn1.to_{name}.{{p}}" for name in "qkv"), heads),
            rename(f"{source}.attn.c_proj.{{p}}", f"{target}.attn1.to_out.0.{{p}}"),
            rename(f"{source}.ln_2.{{p}}", f"{target}.norm3.{{p}}"),
            rename(f"{source}.mlp.c_fc.{{p}}", f"{target}.ff.net.0.proj.{{p}}"),
            rename(f"{source}.mlp.c_proj.{{p}}", f"{target}.ff.net.2.{{p}}"),
        )
    )


def stats_rules(config: Config) -> RuleTable:
    """Rules of the normalisation of image embeddings, which the original keeps in a file of its own."""
    return RuleTable(
        rules=(
            rename("clip_mean", "clip_mean", AddLeadingAxis()),
            rename("clip_std", "clip_std", AddLeadingAxis()),
        )
    )


# ------------------------------------------------------------------------------------------------ text encoder
def is_text_encoder(shapes: Shapes) -> bool:
    """Whether these are the keys of M-CLIP; that of 2.0 has the same, but is published with 640 channels."""
    return is_mclip(shapes) and shape_of(shapes, "LinearTransformation.weight")[0] != 640


# ------------------------------------------------------------------------------------------------ CLIP
def is_clip(shapes: Shapes) -> bool:
    """Whether these are the keys of a ``CLIPModel``."""
    return "text_projection.weight" in shapes and "visual_projection.weight" in shapes


def clip_text_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """Configuration of the ``CLIPTextModelWithProjection``, as the ``CLIPModel`` has it."""
    width = shape_of(shapes, "text_projection.weight")[0]
    return {**_clip_part(inputs, "text_config"), "projection_dim": width}


def clip_vision_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """Configuration of the ``CLIPVisionModelWithProjection``, as the ``CLIPModel`` has it."""
    width = shape_of(shapes, "visual_projection.weight")[0]
    return {**_clip_part(inputs, "vision_config"), "projection_dim": width}


def _clip_part(inputs: Inputs, name: str) -> dict[str, Any]:
    part = inputs.json("clip", "config.json").get(name)
    if not isinstance(part, dict):
        raise ConversionError(f"The CLIP folder has no config.json with a {name}; a CLIPModel folder is expected.")
    return model_settings(part)


def clip_text_rules(config: Config) -> RuleTable:
    """Rules of the text half of a ``CLIPModel``."""
    return _clip_half(
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.{rest}",
        "text_model.final_layer_norm.{p}",
        "text_projection.weight",
        elsewhere=("vision_model.{rest}", "visual_projection.{rest}"),
    )


def clip_vision_rules(config: Config) -> RuleTable:
    """Rules of the image half of a ``CLIPModel``."""
    return _clip_half(
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
        "vision_model.pre_layrnorm.{p}",  # spelled like this in the published files
        "vision_model.encoder.{rest}",
        "vision_model.post_layernorm.{p}",
        "visual_projection.weight",
        elsewhere=("text_model.{rest}", "text_projection.{rest}"),
    )


def _clip_half(*kept: str, elsewhere: tuple[str, ...]) -> RuleTable:
    model = kept[0].partition(".")[0]
    return RuleTable(
        rules=tuple(rename(key, key) for key in kept),
        elsewhere=elsewhere,
        drops=(
            Drop(f"{model}.embeddings.position_ids", POSITION_IDS),
            Drop("logit_scale", "used in the training of CLIP only"),
        ),
    )
