"""The original IP-Adapter of Kandinsky 3.1: its files, and the repository that a conversion makes of them, as data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import clip_weights
from ..conversion.files import copy_clip_image_processor, image_processor_check
from ..conversion.hub_source import published_config, weight_paths
from ..conversion.recipe import FilesComponent, ModelComponent, Part, Release, Repo, SourceFile, WeightsComponent
from . import ip_adapter_weights as weights


FILES = (
    SourceFile("adapter", weight_paths("unet", "diffusers"), weights.is_ip_adapter),
    SourceFile("image_encoder", weight_paths("image_encoder", "transformers"), clip_weights.is_image_encoder),
)

ADAPTER = WeightsComponent(
    "",
    "kandinsky_diffusers",
    "IPAdapter",
    parts=(Part("adapter", weights.ip_adapter_rules),),
    configure=weights.ip_adapter_config,
    stem="ip_adapter",
    shapes=weights.ip_adapter_shapes,
)

IMAGE_ENCODER = ModelComponent(
    "image_encoder",
    "transformers",
    "CLIPVisionModelWithProjection",
    parts=(Part("image_encoder", clip_weights.half_rules),),
    configure=partial(published_config, root="release", folder="image_encoder"),
)

IMAGE_PROCESSOR = FilesComponent(
    "image_encoder",  # where `load_ip_adapter` looks for it
    "transformers",
    "CLIPImageProcessor",
    write=partial(copy_clip_image_processor, root="release", folder="image_processor"),
    check=partial(image_processor_check, root="release", folder="image_processor"),
)


class IPAdapterParts(NamedTuple):
    """A written adapter and its image encoder, without a UNet, which would be many times as large."""

    adapter: Any
    image_encoder: Any


def load_parts(folder: Path, variant: str | None) -> IPAdapterParts:
    """What a repository holds, in float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import CLIPVisionModelWithProjection

    from .ip_adapter_unet import LAYERS, IPAdapter

    weights = {key: tensor.float() for key, tensor in load_file(folder / "ip_adapter.safetensors").items()}
    outputs = {key: tensor.shape for key, tensor in weights.items() if key.endswith(".to_out_ip.weight")}
    layers = {
        key.removeprefix(f"{LAYERS}.").removesuffix(".to_out_ip.weight"): (shape[1], shape[0])
        for key, shape in outputs.items()
    }
    encoder = CLIPVisionModelWithProjection.from_pretrained(
        folder, subfolder="image_encoder", variant=variant, dtype=torch.float32
    )
    adapter = IPAdapter.from_weights(weights, layers, len(weights["image_proj.norm.weight"]))
    return IPAdapterParts(adapter, encoder)


def run_parts(parts: IPAdapterParts) -> list[Any]:
    """Tokens of a black picture, and what each layer makes of them."""
    import torch

    side = parts.image_encoder.config.image_size
    with torch.no_grad():
        tokens = parts.adapter.projection(parts.image_encoder(torch.zeros(1, 3, side, side)).image_embeds)
        layers = parts.adapter.layers.values()
        return [tokens, *(layer(torch.ones(1, 1, 1, layer.to_k_ip.out_features), tokens) for layer in layers)]


RELEASE = Release(
    "3-ip-adapter",
    "the IP-Adapter of Kandinsky 3.1",
    FILES,
    (
        Repo(
            "kandinsky-3-ip-adapter",
            pipeline=None,
            main="adapter",
            components=(ADAPTER, IMAGE_ENCODER, IMAGE_PROCESSOR),
            smoke=run_parts,
            load=load_parts,
        ),
    ),
)
