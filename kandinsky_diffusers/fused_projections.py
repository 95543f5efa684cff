"""The fused projections of diffusers' attention layers, and when they may be used."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention


# what `Attention.fuse_projections` of diffusers makes, and of which layers
FUSED_LAYERS = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}


def fused_layer(attn: Attention, name: str) -> torch.nn.Linear | None:
    """One of [`FUSED_LAYERS`], as long as it computes what the layers do that it was made of.

    It does not where one of these has been given LoRA, or other weights by offloading or moving, or is trained.
    """
    fused = getattr(attn, name, None)
    if fused is None or torch.is_grad_enabled():
        return None
    layers = [getattr(attn, part) for part in FUSED_LAYERS[name]]
    if any(type(layer) is not torch.nn.Linear for layer in layers):
        return None
    if torch.compiler.is_compiling():  # addresses cannot be seen then
        return fused
    address = fused.weight.untyped_storage().data_ptr()
    return fused if all(layer.weight.untyped_storage().data_ptr() == address for layer in layers) else None
