"""The models of the tiny Kandinsky 2.1, in the classes that a conversion makes of the original ones."""

from __future__ import annotations

from typing import Any

from diffusers import PriorTransformer, UNet2DConditionModel, VQModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from torch import nn
from transformers import CLIPConfig, CLIPModel


TEXT_LENGTH = 77
WIDTH = 64  # of CLIP's embeddings and states, of the M-CLIP, and of the context of the UNets

LATENT_SIZE = 8  # of a picture of 64 x 64 pixels
LATENT_CHANNELS = 4
CODES = 256

MOVQ_WIDTH, MOVQ_LEVELS, MOVQ_LAYERS = 32, (1, 1, 2, 2), 1
UNET_WIDTH, UNET_LEVELS, UNET_LAYERS, UNET_HEAD_WIDTH = 64, (1, 2), 1, 32
PRIOR_WIDTH, PRIOR_HEADS, PRIOR_LAYERS = 128, 4, 4

SPECIAL_TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}  # of the M-CLIP


def make_clip(vocabulary: int, special: dict[str, int]) -> CLIPModel:
    """CLIP, whose two halves are the prior pipeline's.

    Args:
        vocabulary: number of tokens.
        special: ids of the tokens that begin, end and pad a text.
    """
    layers = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**layers, "vocab_size": vocabulary, "max_position_embeddings": TEXT_LENGTH, "projection_dim": WIDTH}
    vision = {**layers, "image_size": 64, "patch_size": 8, "projection_dim": WIDTH}
    config = CLIPConfig(text_config={**text, **special}, vision_config=vision, projection_dim=WIDTH)
    return CLIPModel(config)


def make_mclip(vocabulary: int) -> MultilingualCLIP:
    """M-CLIP, the text encoder of the UNets."""
    config = MCLIPConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=3 * WIDTH,
        max_position_embeddings=TEXT_LENGTH + 3,  # positions are counted from the padding's id, 1
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        transformerDimSize=WIDTH,
        imageDimSize=WIDTH,
        **SPECIAL_TOKENS,
    )
    return MultilingualCLIP(config)


def make_movq() -> VQModel:
    """MoVQ, the autoencoder: eight pixels to a latent."""
    levels = len(MOVQ_LEVELS)
    return VQModel(
        block_out_channels=tuple(MOVQ_WIDTH * level for level in MOVQ_LEVELS),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=MOVQ_LAYERS,
        latent_channels=LATENT_CHANNELS,
        num_vq_embeddings=CODES,
        vq_embed_dim=LATENT_CHANNELS,
        norm_type="spatial",
    )


def make_prior() -> PriorTransformer:
    """The prior: from a text to the embedding of a picture."""
    prior: Any = PriorTransformer(
        num_attention_heads=PRIOR_HEADS,
        attention_head_dim=PRIOR_WIDTH // PRIOR_HEADS,
        num_layers=PRIOR_LAYERS,
        embedding_dim=WIDTH,
        num_embeddings=TEXT_LENGTH,
        embedding_proj_dim=WIDTH,
        clip_embed_dim=WIDTH,
    )
    for learned in (prior.positional_embedding, prior.prd_embedding):
        nn.init.normal_(learned, std=0.02)
    for statistic in (prior.clip_mean, prior.clip_std):
        statistic.requires_grad_(False)
    return prior


def make_unet(inpainting: bool = False) -> UNet2DConditionModel:
    """A UNet: the decoder's, or the one for inpainting, which sees the known latents and their mask too."""
    levels = len(UNET_LEVELS)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=2 * LATENT_CHANNELS + 1 if inpainting else LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,  # noise and variance
        down_block_types=("SimpleCrossAttnDownBlock2D",) * levels,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * levels,
        block_out_channels=tuple(UNET_WIDTH * level for level in UNET_LEVELS),
        layers_per_block=UNET_LAYERS,
        attention_head_dim=UNET_HEAD_WIDTH,
        resnet_time_scale_shift="scale_shift",
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="text_image_proj",
        addition_embed_type="text_image",
    )
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def hyperparameters(clip: Any) -> dict[str, Any]:
    """The configuration of the original code for models of these sizes, `hyperparameters.json` of the release."""
    text, vision = clip.config.text_config, clip.config.vision_config
    return {
        "clip_name": "ViT-L/14",
        "clip_image_size": vision.image_size,
        "image_enc_params": {
            "name": "MOVQ",
            "scale": 1,
            "params": {
                "embed_dim": LATENT_CHANNELS,
                "n_embed": CODES,
                "ddconfig": {
                    "double_z": False,
                    "z_channels": LATENT_CHANNELS,
                    "resolution": 64,
                    "in_channels": 3,
                    "out_ch": 3,
                    "ch": MOVQ_WIDTH,
                    "ch_mult": list(MOVQ_LEVELS),
                    "num_res_blocks": MOVQ_LAYERS,
                    "attn_resolutions": [],
                    "dropout": 0.0,
                },
            },
        },
        "text_enc_params": {"model_name": "multiclip", "in_features": WIDTH, "out_features": WIDTH},
        "prior": {
            "params": {
                "model": {
                    "type": "prior",
                    "diffusion_sampler": "uniform",
                    "hparams": {
                        "text_ctx": TEXT_LENGTH,
                        "xf_width": PRIOR_WIDTH,
                        "xf_layers": PRIOR_LAYERS,
                        "xf_heads": PRIOR_HEADS,
                        "xf_final_ln": True,
                        "xf_padding": False,
                        "text_drop": 0.1,
                        "clip_dim": WIDTH,
                        "clip_xf_width": WIDTH,
                    },
                },
                "diffusion": {
                    "steps": 1000,
                    "learn_sigma": False,
                    "sigma_small": True,
                    "noise_schedule": "cosine",
                    "use_kl": False,
                    "predict_xstart": True,
                    "rescale_learned_sigmas": False,
                    "timestep_respacing": "",
                },
            }
        },
        "model_config": {
            "version": "2.1",
            "image_size": LATENT_SIZE,
            "num_channels": UNET_WIDTH,
            "num_res_blocks": UNET_LAYERS,
            "channel_mult": ",".join(map(str, UNET_LEVELS)),
            "num_heads": 1,
            "num_head_channels": UNET_HEAD_WIDTH,
            "num_heads_upsample": -1,
            "attention_resolutions": ",".join(str(LATENT_SIZE >> level) for level in range(len(UNET_LEVELS))),
            "dropout": 0,
            "model_dim": WIDTH,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
            "use_fp16": False,
            "cache_text_emb": True,
            "text_encoder_in_dim1": WIDTH,
            "text_encoder_in_dim2": WIDTH,
            "image_encoder_in_dim": WIDTH,
            "num_image_embs": 10,
            "pooling_type": "from_model",
            "in_channels": LATENT_CHANNELS,
            "out_channels": 2 * LATENT_CHANNELS,
            "use_flash_attention": False,
        },
        "diffusion_config": {
            "learn_sigma": True,
            "sigma_small": False,
            "steps": 1000,
            "noise_schedule": "linear",
            "timestep_respacing": "",
            "use_kl": False,
            "predict_xstart": False,
            "rescale_timesteps": True,
            "rescale_learned_sigmas": True,
            "linear_start": 0.00085,
            "linear_end": 0.012,
        },
        "clip": {
            "embed_dim": WIDTH,
            "image_resolution": vision.image_size,
            "vision_patch_size": vision.patch_size,
            "vision_width": vision.hidden_size,
            "vision_layers": vision.num_hidden_layers,
            "transformer_layers": text.num_hidden_layers,
            "transformer_heads": text.num_attention_heads,
            "context_length": TEXT_LENGTH,
            "vocab_size": text.vocab_size,
            "transformer_width": text.hidden_size,
        },
    }
