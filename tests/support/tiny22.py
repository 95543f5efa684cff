"""Tiny Kandinsky 2.2 models: stock classes in the published configuration, with small sizes and random weights.

All tasks share the width of the image embedding, :data:`EMBEDDING`, so that any decoder goes with the prior.  The
pictures of the decoders may have any size from 64 x 64 on: MoVQ has the published four levels.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from diffusers import DDPMScheduler, PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, VQModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.support.goldens import golden_family


Model = TypeVar("Model", bound=torch.nn.Module)

EMBEDDING = 32

# task -> input channels and kind of the added embedding of its UNet; its scheduler clips samples or not
UNETS = {"text2image": (4, "image"), "inpaint": (9, "image"), "controlnet": (8, "image_hint")}
CLIP_SAMPLE = {"text2image": True, "inpaint": False, "controlnet": False}


def tiny_components(task: str = "text2image", seed: int = 0) -> dict[str, Any]:
    """All components of a combined pipeline: a decoder's, and the prior's as ``prior_...``."""
    prior = {f"prior_{name}": component for name, component in prior_components(seed).items()}
    return {**decoder_components(task, seed), **prior}


def prior_components(seed: int = 0) -> dict[str, Any]:
    """Fresh components of ``KandinskyV22PriorPipeline``; the same seed gives the same weights."""
    tokenizer = make_tokenizer()
    return {
        "prior": _randomised(make_prior(), seed, "prior"),
        "image_encoder": _randomised(make_image_encoder(), seed, "image_encoder"),
        "text_encoder": _randomised(make_text_encoder(len(tokenizer)), seed, "text_encoder"),
        "tokenizer": tokenizer,
        "scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log",
            num_train_timesteps=1000,
            clip_sample=True,
            clip_sample_range=10.0,
            prediction_type="sample",
        ),
        "image_processor": CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, resample=3
        ),
    }


def decoder_components(task: str = "text2image", seed: int = 0) -> dict[str, Any]:
    """Fresh components of a decoder for ``text2image`` (and image to image), ``inpaint`` or ``controlnet``."""
    return {
        "unet": _randomised(make_unet(task), seed, f"unet {task}"),
        "movq": _randomised(make_movq(), seed, "movq"),
        "scheduler": DDPMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="linear",
            clip_sample=CLIP_SAMPLE[task],
            prediction_type="epsilon",
            steps_offset=1,
        ),
    }


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with a vocabulary of a few hundred words, from the golden set in use."""
    return CLIPTokenizer.from_pretrained(golden_family("kandinsky-2.1").path / "files" / "clip")


def make_prior() -> PriorTransformer:
    """Published: 32 heads of width 64, 20 layers, embeddings of width 1280."""
    return PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        embedding_dim=EMBEDDING,
        num_embeddings=77,
        additional_embeddings=4,
    )


def make_text_encoder(words: int) -> CLIPTextModelWithProjection:
    """Published: CLIP ViT-bigG/14; an ``eos_token_id`` of 2 means the largest id there is."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=EMBEDDING,
            intermediate_size=64,
            projection_dim=EMBEDDING,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            hidden_act="gelu",
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    )


def make_image_encoder() -> CLIPVisionModelWithProjection:
    """Published: CLIP ViT-bigG/14."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=64,
            projection_dim=EMBEDDING,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            hidden_act="gelu",
        )
    )


def make_unet(task: str = "text2image") -> UNet2DConditionModel:
    """Published: four levels of 384, 768, 1152, 1536 channels, three layers per block."""
    channels, added = UNETS[task]
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=16,
        encoder_hid_dim=EMBEDDING,
        encoder_hid_dim_type="image_proj",
        addition_embed_type=added,
        resnet_time_scale_shift="scale_shift",
    )


def make_movq() -> VQModel:
    """Published: 128, 256, 256, 512 channels, two layers per block, 16384 codes."""
    return VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=64,
        vq_embed_dim=4,
        norm_type="spatial",
    )


def _randomised(model: Model, seed: int, name: str) -> Model:
    """Random weights that keep the size of what passes through; no bias, norm or embedding stays at its start."""
    rng = torch.Generator().manual_seed(seed + sum(name.encode()))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.ndim > 1 and parameter.shape[0] > 1:
                parameter.copy_(noise * 0.8 / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_((parameter == 1) + 0.1 * noise)
    return model.eval()
