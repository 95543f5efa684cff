"""Configurations are read off shapes, whatever the sizes: stock models, mapped back, give theirs again."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel, VQModel
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky_diffusers import Kandinsky3UNet, KandinskyV20UNet, autoencoder_weights
from kandinsky_diffusers.conversion.matching import match
from kandinsky_diffusers.conversion.preview import plan
from kandinsky_diffusers.conversion.recipe import Inputs
from kandinsky_diffusers.k3 import weights as weights3
from kandinsky_diffusers.k20 import weights as weights20
from kandinsky_diffusers.k21 import weights
from kandinsky_diffusers.unet_weights import ATTENTION_DOWN, ATTENTION_UP, PLAIN_DOWN, PLAIN_UP


levels = st.lists(st.booleans(), min_size=2, max_size=4)


def original_shapes(model_class: Any, config: dict[str, Any], table: Any) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the original checkpoint that belongs to a model."""
    with torch.device("meta"):
        model = model_class(**config)
    return match(table.inverse, {key: tuple(t.shape) for key, t in model.state_dict().items()}).target_shapes


@settings(max_examples=15, deadline=None)
@given(attention=levels, layers=st.integers(1, 3), head_dim=st.sampled_from([8, 16, 32]), inpaint=st.booleans())
def test_unets_of_any_depth_and_attention_levels(attention, layers, head_dim, inpaint):
    if not any(attention):
        attention = [*attention, True]
    config = {
        "sample_size": 64,
        "in_channels": 9 if inpaint else 4,
        "out_channels": 8,
        "down_block_types": [ATTENTION_DOWN if level else PLAIN_DOWN for level in attention],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [ATTENTION_UP if level else PLAIN_UP for level in reversed(attention)],
        "block_out_channels": [32 * (number + 1) for number in range(len(attention))],
        "layers_per_block": layers,
        "cross_attention_dim": 24,
        "attention_head_dim": head_dim,
        "resnet_time_scale_shift": "scale_shift",
    }
    inputs = Inputs(original_config={"model_config": {"num_head_channels": head_dim}})
    of_21 = {"encoder_hid_dim": 40, "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"}
    of_20 = {"text_dim": 40, "text_dim_2": 16, "pooled_text_dim": 12}
    for cls, own, family in ((UNet2DConditionModel, of_21, weights), (KandinskyV20UNet, of_20, weights20)):
        shapes = original_shapes(cls, config | own, family.unet_rules(config | own))
        assert family.is_unet(shapes, config["in_channels"])
        assert family.unet_config(shapes, inputs) == config | own


@settings(max_examples=10, deadline=None)
@given(heads=st.integers(1, 4), head_dim=st.sampled_from([8, 12]), layers=st.integers(1, 12), text=st.integers(3, 80))
def test_priors_of_any_size(heads, head_dim, layers, text):
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": layers,
        "embedding_dim": 20,
        "num_embeddings": text,
        "additional_embeddings": 4,
        "embedding_proj_dim": 20,
        "clip_embed_dim": 20,
    }
    table = weights.prior_rules(config) + weights.stats_rules(config)
    shapes = original_shapes(PriorTransformer, config, table)
    inputs = Inputs(original_config={"prior": {"params": {"model": {"hparams": {"xf_heads": heads}}}}})
    assert weights.prior_config(shapes, inputs) == config


@settings(max_examples=10, deadline=None)
@given(attention=levels, layers=st.integers(1, 3), codes=st.integers(2, 50))
def test_autoencoders_of_any_depth_and_attention_levels(attention, layers, codes):
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [32 * (1 + number // 2) for number in range(len(attention))],
        "layers_per_block": layers,
        "down_block_types": ["AttnDownEncoderBlock2D" if level else "DownEncoderBlock2D" for level in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if level else "UpDecoderBlock2D" for level in reversed(attention)],
    }
    of_vae = config | {"sample_size": 256, "scaling_factor": 0.0512}
    shapes = original_shapes(AutoencoderKL, of_vae, autoencoder_weights.vae_rules(of_vae))
    assert autoencoder_weights.is_vae(shapes)
    assert autoencoder_weights.vae_config(shapes, Inputs()) == of_vae

    config |= {"num_vq_embeddings": codes, "vq_embed_dim": 4, "norm_type": "spatial"}
    shapes = original_shapes(VQModel, config, autoencoder_weights.movq_rules(config))
    assert autoencoder_weights.movq_config(shapes, Inputs()) == config
    config["num_vq_embeddings"] = autoencoder_weights.CODES
    shapes = original_shapes(VQModel, config, autoencoder_weights.movq_rules_without_codebook(config))
    assert autoencoder_weights.is_movq_without_codebook(shapes)
    assert autoencoder_weights.movq_config(shapes, Inputs()) == config


@settings(max_examples=10, deadline=None)
@given(
    channels=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    layers=st.integers(2, 3),
    head_dim=st.sampled_from([4, 8]),
    groups=st.sampled_from([2, 4]),
    inpaint=st.booleans(),
)
def test_unets_of_kandinsky_3_of_any_size(channels, layers, head_dim, groups, inpaint):
    config = {
        "in_channels": 9 if inpaint else 4,
        "out_channels": 4 if inpaint else None,
        "time_embedding_dim": 24,
        "groups": groups,
        "attention_head_dim": head_dim,
        "layers_per_block": layers,
        "block_out_channels": [16 * number for number in channels],
        "cross_attention_dim": 24,
        "encoder_hid_dim": 20,
        "has_null_embedding": True,
    }
    table = weights3.unet_rules(config) + weights3.projection_rules(config)
    shapes = original_shapes(Kandinsky3UNet, config, table)
    original = {"weights/kandinsky3.pt": {"head_dim": head_dim, "groups": groups}}
    nested = {f"unet/{key}": shape for key, shape in shapes.items() if key not in weights3.PROJECTION}
    nested["null_embedding"] = nested.pop("unet/null_embedding")
    nested |= {f"projections/t5.{key}": shapes[key] for key in weights3.PROJECTION}
    if inpaint:
        original = {"weights/kandinsky3_inpainting.pt": original["weights/kandinsky3.pt"]}
    (made,) = plan(nested, original_config=original)
    assert not made.notes
    assert made.config == config
