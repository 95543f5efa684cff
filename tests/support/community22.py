"""Tiny repositories of Kandinsky 2.2 like those of the community, as a source of conversions."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.pipelines import kandinsky2_2
from safetensors.torch import load_file

from tests.support.tiny22 import decoder_components, prior_components


OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def write_community(folder: Path) -> Path:
    """Four Kandinsky 2.2 repositories that stock diffusers loads, each with its weights in other forms.

    | folder | weights |
    |---|---|
    | prior | the prior in safetensors shards; CLIP's text half whole, its image half pickled by an old transformers |
    | text | pickled |
    | inpainting | pickled in shards, with a variant in half precision beside |
    | depth | safetensors; MoVQ pickled by an old diffusers, under the names of that time |
    """
    prior = kandinsky2_2.KandinskyV22PriorPipeline(**prior_components())
    prior.save_pretrained(folder / "prior")
    (folder / "prior" / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    prior.prior.save_pretrained(folder / "prior" / "prior", max_shard_size="100KB")
    pickle_clip(folder / "prior" / "image_encoder", "vision_model.embeddings.position_ids")

    text = kandinsky2_2.KandinskyV22Pipeline(**decoder_components("text2image"))
    text.save_pretrained(folder / "text", safe_serialization=False)

    inpainting = kandinsky2_2.KandinskyV22InpaintPipeline(**decoder_components("inpaint"))
    inpainting.save_pretrained(folder / "inpainting", safe_serialization=False, max_shard_size="2MB")
    inpainting.to(torch.float16).save_pretrained(folder / "inpainting", variant="fp16")

    depth = kandinsky2_2.KandinskyV22ControlnetPipeline(**decoder_components("controlnet"))
    depth.save_pretrained(folder / "depth")
    pickle_with_old_names(folder / "depth" / "movq")
    return folder


def pickle_clip(folder: Path, positions: str) -> None:
    """Do as a transformers of 2023: pickle, together with the buffer of positions."""
    tensors = load_file(folder / "model.safetensors")
    count = tensors[positions.replace("position_ids", "position_embedding.weight")].shape[0]
    torch.save({**tensors, positions: torch.arange(count)[None]}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickle_with_old_names(folder: Path) -> None:
    """Do as a diffusers before 0.18: pickle, with the names that attention had."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    torch.save({_old_name(key): tensor for key, tensor in tensors.items()}, folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def _old_name(key: str) -> str:
    for new, old in OLD_NAMES.items():
        key = key.replace(new, old)
    return key
