"""Where every tensor of an original autoencoder goes: MoVQ of 2.1 and 3.x, the VAE of 2.0.

Original code: ai-forever/Kandinsky-2, folder ``kandinsky2/vqgan``, and ai-forever/Kandinsky-3,
``kandinsky3/movq.py``, whose MoVQ has no codebook and wraps the norms of its encoder.  The norms in MoVQ's decoder are
spatial, those in the VAE's are not.
"""

from __future__ import annotations

import itertools
from typing import Any

from .conversion.matching import Shapes
from .conversion.recipe import Config, Inputs
from .conversion.rules import LIGHTNING_DROPS, Constant, Drop, RuleTable, rename
from .conversion.shapes import count_modules, shape_of
from .conversion.transforms import Squeeze


CODEBOOK = "quantize.embedding.weight"
CODES = 16384  # as many as the published codebook of 2.1 has
VAE_SCALE = 0.0512  # of latents, as published (kandinsky2/configs.py)


def is_movq(shapes: Shapes) -> bool:
    """Whether these are the keys of a MoVQ with a codebook, as that of 2.1."""
    return "decoder.norm_out.conv_y.weight" in shapes and CODEBOOK in shapes


def is_movq_without_codebook(shapes: Shapes) -> bool:
    """Whether these are the keys of a MoVQ without codebook, as that of 3.x."""
    return "decoder.norm_out.conv_y.weight" in shapes and CODEBOOK not in shapes


def is_vae(shapes: Shapes) -> bool:
    """Whether these are the keys of the VAE of 2.0."""
    return "decoder.norm_out.weight" in shapes and "encoder.mid.attn_1.q.weight" in shapes


def movq_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """Configuration of the ``VQModel`` with spatial norms."""
    return {
        **_sizes(shapes),
        "latent_channels": shape_of(shapes, "encoder.conv_out.weight")[0],
        "num_vq_embeddings": shapes.get(CODEBOOK, (CODES,))[0],
        "vq_embed_dim": shape_of(shapes, "quant_conv.weight")[0],
        "norm_type": "spatial",
    }


def vae_config(shapes: Shapes, inputs: Inputs) -> dict[str, Any]:
    """Configuration of the ``AutoencoderKL``."""
    return {
        **_sizes(shapes),
        "latent_channels": shape_of(shapes, "post_quant_conv.weight")[0],
        "sample_size": inputs.setting("image_enc_params.params.ddconfig.resolution", 256),
        "scaling_factor": inputs.setting("image_enc_params.scale", VAE_SCALE),
    }


def _sizes(shapes: Shapes) -> dict[str, Any]:
    levels = range(count_modules(shapes, "encoder.down"))
    down = [f"encoder.down.{level}.attn.0.q.weight" in shapes for level in levels]
    up = [f"decoder.up.{level}.attn.0.q.weight" in shapes for level in reversed(levels)]
    return {
        "in_channels": shape_of(shapes, "encoder.conv_in.weight")[1],
        "out_channels": shape_of(shapes, "decoder.conv_out.weight")[0],
        "block_out_channels": [shape_of(shapes, f"encoder.down.{n}.block.0.conv1.weight")[0] for n in levels],
        "layers_per_block": count_modules(shapes, "encoder.down.0.block"),
        "down_block_types": ["AttnDownEncoderBlock2D" if level else "DownEncoderBlock2D" for level in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if level else "UpDecoderBlock2D" for level in up],
    }


def movq_rules(config: Config) -> RuleTable:
    """Rules of a MoVQ with a codebook."""
    return _rules(config, SPATIAL) + RuleTable(rules=(rename(CODEBOOK, CODEBOOK),))


def movq_rules_without_codebook(config: Config) -> RuleTable:
    """Rules of a MoVQ without codebook; ``VQModel`` has one, which is not used."""
    codebook = Constant(CODEBOOK, 0.0, "the original has no codebook")
    return _rules(config, SPATIAL, wrapper=".norm_layer") + RuleTable(constants=(codebook,))


def vae_rules(config: Config) -> RuleTable:
    """Rules of the VAE, whose file also has what Lightning and the training need."""
    drops = (Drop("loss.{rest}", "of the loss, for training"), Drop("model_ema.{rest}", "averages of the training"))
    return _rules(config, PLAIN) + RuleTable(drops=(*LIGHTNING_DROPS, *drops))


# the parts of a norm in the decoder: of an attention layer, target by source
SPATIAL = {f"norm.{name}": f"spatial_norm.{name}" for name in ("norm_layer", "conv_y", "conv_b")}
PLAIN = {"norm": "group_norm"}


def _rules(config: Config, norms: dict[str, str], wrapper: str = "") -> RuleTable:
    """Rules of all but the codebook.

    Args:
        config: of the model.
        norms: the norm of an attention layer in the decoder.
        wrapper: follows the names of the encoder's norms.
    """
    to_qkv = {source: f"to_{source}" for source in "qkv"} | {"proj_out": "to_out.0"}
    return RuleTable(
        rules=(
            rename("{coder}.conv_in.{p}", "{coder}.conv_in.{p}"),
            rename(f"encoder.norm_out{wrapper}.{{p}}", "encoder.conv_norm_out.{p}"),
            rename("decoder.norm_out.{rest}", "decoder.conv_norm_out.{rest}"),
            rename("{coder}.conv_out.{p}", "{coder}.conv_out.{p}"),
            rename("encoder.down.{level}.downsample.{rest}", "encoder.down_blocks.{level}.downsamplers.0.{rest}"),
            rename("{up}.upsample.{rest}", "{up}.upsamplers.0.{rest}"),
            rename(f"{{encoder_resnet}}.norm{{n}}{wrapper}.{{p}}", "{encoder_resnet}.norm{n}.{p}"),
            rename("{decoder_resnet}.norm{n}.{rest}", "{decoder_resnet}.norm{n}.{rest}"),
            rename("{resnet}.conv{n}.{p}", "{resnet}.conv{n}.{p}"),
            rename("{resnet}.nin_shortcut.{p}", "{resnet}.conv_shortcut.{p}", optional=True),
            rename(f"{{encoder_attention}}.norm{wrapper}.{{p}}", "{encoder_attention}.group_norm.{p}"),
            *(
                rename(f"{{decoder_attention}}.{source}.{{p}}", f"{{decoder_attention}}.{target}.{{p}}")
                for source, target in norms.items()
            ),
            *(
                rename(f"{{attention}}.{n}.weight", f"{{attention}}.{to}.weight", Squeeze(2))
                for n, to in to_qkv.items()
            ),
            *(rename(f"{{attention}}.{n}.bias", f"{{attention}}.{to}.bias") for n, to in to_qkv.items()),
            rename("quant_conv.{p}", "quant_conv.{p}"),
            rename("post_quant_conv.{p}", "post_quant_conv.{p}"),
        ),
        paths=_paths(config),
    )


def _paths(config: Config) -> dict[str, dict[str, str]]:
    """The decoder of the original counts its levels from the picture, diffusers from the latents."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    up = {f"decoder.up.{level}": f"decoder.up_blocks.{levels - 1 - level}" for level in range(levels)}
    blocks = {
        "encoder": (layers, {f"encoder.down.{level}": f"encoder.down_blocks.{level}" for level in range(levels)}),
        "decoder": (layers + 1, up),
    }
    paths: dict[str, dict[str, str]] = {"coder": {coder: coder for coder in blocks}, "up": up}
    for coder, (count, path) in blocks.items():
        resnets = {f"{coder}.mid.block_{n}": f"{coder}.mid_block.resnets.{n - 1}" for n in (1, 2)}
        attentions = {f"{coder}.mid.attn_1": f"{coder}.mid_block.attentions.0"}
        for (source, target), block in itertools.product(path.items(), range(count)):
            resnets[f"{source}.block.{block}"] = f"{target}.resnets.{block}"
            attentions[f"{source}.attn.{block}"] = f"{target}.attentions.{block}"
        paths |= {f"{coder}_resnet": resnets, f"{coder}_attention": attentions}
    for kind in ("resnet", "attention"):
        paths[kind] = {**paths[f"encoder_{kind}"], **paths[f"decoder_{kind}"]}
    return paths
