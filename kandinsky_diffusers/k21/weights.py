"""Where every tensor of the Kandinsky 2.1 release goes: rules, and configurations read from tensor shapes.

Original code: ai-forever/Kandinsky-2, folder ``kandinsky2``.  All targets are stock classes of diffusers and
transformers.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from ..conversion.errors import ConversionError
from ..conversion.matching import Shapes
from ..conversion.recipe import Config, Inputs
from ..conversion.rules import Drop, RuleTable, rename, split
from ..conversion.shapes import count_modules, shape_of
from ..conversion.transforms import AddLeadingAxis, SplitHeads, Squeeze


# What shapes cannot tell, as published.
UNET_HEAD_DIM = 64
PRIOR_HEADS = 32
XLM_ROBERTA_HEAD_DIM = 64
XLM_ROBERTA = {"layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

POSITION_IDS = "position numbers, a buffer of old transformers versions"

ATTENTION_DOWN, PLAIN_DOWN = "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"
ATTENTION_UP, PLAIN_UP = "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"


# ------------------------------------------------------------------------------------------------ UNet
def is_unet(shapes: Shapes, in_channels: int) -> bool:
    """Whether these are the keys of a 2.1 UNet with that many input channels (4: text to image, 9: inpainting)."""
    return "clip_to_seq.weight" in shapes and shapes.get("input_blocks.0.0.weight", ())[1:2] == (in_channels,)


def unet_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """Configuration of the ``UNet2DConditionModel`` (original: ``Text2ImUNet`` and ``InpaintText2ImUNet``)."""
    layers = _layers_per_block(shapes)
    firsts = range(1, 1 + count_modules(shapes, "input_blocks"), layers + 1)
    attention = [f"input_blocks.{first}.1.qkv.weight" in shapes for first in firsts]
    channels = [shape_of(shapes, f"input_blocks.{first}.0.out_layers.3.weight")[0] for first in firsts]
    context_dim, text_dim = shape_of(shapes, "to_model_dim_n.weight")
    return {
        "sample_size": inputs.setting("model_config.image_size", 64),
        "in_channels": shape_of(shapes, "input_blocks.0.0.weight")[1],
        "out_channels": shape_of(shapes, "out.2.weight")[0],
        "down_block_types": [ATTENTION_DOWN if level else PLAIN_DOWN for level in attention],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [ATTENTION_UP if level else PLAIN_UP for level in reversed(attention)],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "cross_attention_dim": context_dim,
        "attention_head_dim": _unet_head_dim([*itertools.compress(channels, attention), channels[-1]], inputs),
        "encoder_hid_dim": text_dim,
        "encoder_hid_dim_type": "text_image_proj",
        "addition_embed_type": "text_image",
        "resnet_time_scale_shift": "scale_shift",
    }


def unet_rules(config: Config) -> RuleTable:
    """Rules of the UNet; its numbered blocks become levels, whose layout the configuration tells."""
    resnet, attention = "{resnet}", "{attention}"
    heads = SplitHeads(config["attention_head_dim"], parts=3)
    context_heads = SplitHeads(config["attention_head_dim"], parts=2)
    to_qkv = tuple(f"{attention}.to_{name}" for name in "qkv")
    to_context = (f"{attention}.add_k_proj", f"{attention}.add_v_proj")
    return RuleTable(
        rules=(
            rename("time_embed.0.{p}", "time_embedding.linear_1.{p}"),
            rename("time_embed.2.{p}", "time_embedding.linear_2.{p}"),
            rename("clip_to_seq.{p}", "encoder_hid_proj.image_embeds.{p}"),
            rename("to_model_dim_n.{p}", "encoder_hid_proj.text_proj.{p}"),
            rename("proj_n.{p}", "add_embedding.text_proj.{p}"),
            rename("ln_model_n.{p}", "add_embedding.text_norm.{p}"),
            rename("img_layer.{p}", "add_embedding.image_proj.{p}"),
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
        paths=_unet_paths(config),
    )


def _unet_paths(config: Config) -> dict[str, dict[str, str]]:
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


def _unet_head_dim(widths: list[int], inputs: Inputs) -> int:
    """Shapes do not tell the width of a head, but each layer with attention, the middle one too, has whole heads."""
    head_dim = inputs.setting("model_config.num_head_channels", UNET_HEAD_DIM)
    if head_dim < 1 or any(width % head_dim for width in widths):
        raise ConversionError(
            f"Attention of width {', '.join(map(str, sorted(set(widths))))} does not have heads of width {head_dim}; "
            "it stands as num_head_channels in the original config (original_config, --original-config)."
        )
    return head_dim


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
    """Whether these are the keys of the M-CLIP text encoder; that of 2.0 has the same, but pools to 640 channels."""
    return shapes.get("LinearTransformation.weight", (640,))[0] != 640


def text_encoder_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """Configuration of ``MultilingualCLIP``: sizes from the shapes, the rest from the release's ``config.json``."""
    words, width = shape_of(shapes, "transformer.embeddings.word_embeddings.weight")
    published = inputs.json("release", "text_encoder/config.json")
    for name in ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path"):
        published.pop(name, None)
    return {
        **XLM_ROBERTA,
        "num_attention_heads": max(1, width // XLM_ROBERTA_HEAD_DIM),
        **published,
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": count_modules(shapes, "transformer.encoder.layer"),
        "intermediate_size": shape_of(shapes, "transformer.encoder.layer.0.intermediate.dense.weight")[0],
        "max_position_embeddings": shape_of(shapes, "transformer.embeddings.position_embeddings.weight")[0],
        "type_vocab_size": shape_of(shapes, "transformer.embeddings.token_type_embeddings.weight")[0],
        "transformerDimSize": shape_of(shapes, "LinearTransformation.weight")[1],
        "imageDimSize": shape_of(shapes, "LinearTransformation.weight")[0],
    }


def text_encoder_rules(config: Config) -> RuleTable:
    """Rules of the text encoder: ``MultilingualCLIP`` kept the original's names."""
    return RuleTable(
        rules=(
            rename("transformer.embeddings.{name}.{p}", "transformer.embeddings.{name}.{p}"),
            rename("transformer.encoder.{rest}", "transformer.encoder.{rest}"),
            rename("transformer.pooler.dense.{p}", "transformer.pooler.dense.{p}"),
            rename("LinearTransformation.{p}", "LinearTransformation.{p}"),
        ),
        drops=(Drop("transformer.embeddings.position_ids", POSITION_IDS),),
        paths={
            "name": {n: n for n in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")}
        },
    )


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
    if part is None:
        raise ConversionError(f"The CLIP folder has no config.json with a {name}; a CLIPModel folder is expected.")
    return {key: value for key, value in part.items() if key not in ("model_type", "torch_dtype", "dtype")}


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


# ------------------------------------------------------------------------------------------------ helpers
def _each(targets: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(f"{target}.{name}" for target in targets)
