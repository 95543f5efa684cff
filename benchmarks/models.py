"""Models of the published sizes with random weights, and module trees that share them."""

from __future__ import annotations

import copy
import functools
from itertools import chain
from typing import Any

import torch
from diffusers import PriorTransformer, UNet2DConditionModel, VQModel
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3UNet as StockKandinsky3UNet

from kandinsky_diffusers import Kandinsky3UNet, KandiSuperResUNet


class LatentsOnly(VQModel):
    """Stands where a pipeline wants a MoVQ, and decodes nothing: for measuring what comes before."""

    def decode(self, h: torch.Tensor, *args: Any, **kwargs: Any) -> DecoderOutput:
        """`h`, as it is."""
        return DecoderOutput(sample=h)


UNET_2: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "block_out_channels": (384, 768, 1152, 1536),
    "layers_per_block": 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
UNET_21 = {"encoder_hid_dim": 1024, "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"}
UNET_22 = {"encoder_hid_dim": 1280, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
MOVQ: dict[str, Any] = {
    "block_out_channels": (128, 256, 256, 512),
    "down_block_types": (*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
    "layers_per_block": 2,
    "latent_channels": 4,
    "num_vq_embeddings": 16384,
    "vq_embed_dim": 4,
    "norm_type": "spatial",
}

# name -> class, configuration, and what makes it tiny, for trying out the benchmarks themselves
MODELS: dict[str, tuple[type[torch.nn.Module], dict[str, Any], dict[str, Any]]] = {
    "prior": (
        PriorTransformer,  # its defaults are the prior of 2.2
        {},
        {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 32},
    ),
    "unet-2.1": (UNet2DConditionModel, UNET_2 | UNET_21, {}),
    "unet-2.2": (UNet2DConditionModel, UNET_2 | UNET_22, {}),
    "unet-3.0": (StockKandinsky3UNet, {}, {}),
    "unet-3.1": (Kandinsky3UNet, {"has_null_embedding": True}, {}),
    "movq-2": (VQModel, MOVQ, {}),
    "movq-3": (VQModel, MOVQ | {"block_out_channels": (256, 512, 512, 1024)}, {}),
    "no-movq": (LatentsOnly, MOVQ, {}),
    "unet-superres": (
        KandiSuperResUNet,
        {},
        {"init_channels": 32, "block_out_channels": (32, 32), "layers_per_block": (1, 1), "time_embedding_dim": 32},
    ),
}
TINY = {
    UNet2DConditionModel: {
        "block_out_channels": (32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "encoder_hid_dim": 32,
        "attention_head_dim": 16,
    },
    StockKandinsky3UNet: {
        "time_embedding_dim": 32,
        "groups": 8,
        "attention_head_dim": 16,
        "layers_per_block": 2,
        "block_out_channels": (32, 64),
        "cross_attention_dim": 32,
        "encoder_hid_dim": 32,
    },
    VQModel: {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "num_vq_embeddings": 16},
}
ZEROS_AT_FIRST = ("positional_embedding", "prd_embedding", "clip_mean", "clip_std", "null_embedding")


@functools.lru_cache(maxsize=3)  # of one subject; cleared before the next one
def build(name: str, device: str, dtype: torch.dtype, tiny: bool) -> Any:
    """A model of `MODELS`, for inference, with PyTorch's own random weights; built where it is used."""
    cls, config, small = MODELS[name]
    if name == "no-movq" or tiny:
        base = next((TINY[base] for base in cls.__mro__ if base in TINY), {})
        config = config | base | small
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = cls(**config)
    finally:
        torch.set_default_dtype(previous)
    for key in ZEROS_AT_FIRST:
        if isinstance(getattr(model, key, None), torch.nn.Parameter):
            torch.nn.init.normal_(model.get_parameter(key), std=0.02)
    return model.eval().requires_grad_(False)


def twin(model: Any) -> Any:
    """Another tree of modules around the same parameters and buffers.

    Attention processors, hooks and compiled code belong to modules, so that neither tree is touched by what is done to
    the other one.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def own_copy(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Another model with the same numbers, in `dtype` if one is given."""
    return copy.deepcopy(model).to(dtype or model.dtype)
