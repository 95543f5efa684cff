"""Writing trained models as a release of Kandinsky 2.1, in the original layout, by the inverse rules of conversion."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import PriorTransformer
from safetensors.torch import save_file

from kandinsky_diffusers import autoencoder_weights, mclip_weights
from kandinsky_diffusers.conversion.matching import match
from kandinsky_diffusers.conversion.rules import RuleTable
from kandinsky_diffusers.k21 import weights

from .clip import MEAN, STD
from .files import write_json
from .models import hyperparameters


Tensors = Mapping[str, torch.Tensor]

PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "resample": 3,
    "do_center_crop": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
    "do_convert_rgb": True,
}


def write_release(models: Mapping[str, Any], tokenizers: Path, folder: Path) -> Path:
    """Write the files of a release.

    Args:
        models: `clip`, `movq`, `mclip`, `prior`, `decoder` and `inpainting`, as `models` makes them.
        tokenizers: folder with the tokenizers `clip` and `mclip`.
        folder: becomes the release; what is there of the same name is replaced.
    """
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    for name in ("decoder", "inpainting"):
        _save(_original(models[name], weights.unet_rules), folder / f"{name}_fp16.ckpt", torch.float16)
    _save(_original(models["movq"], autoencoder_weights.movq_rules), folder / "movq_final.ckpt")
    _save(_original(models["mclip"], mclip_weights.mclip_rules), folder / "text_encoder" / "pytorch_model.bin")
    _write_prior(models["prior"], folder)
    _write_clip(models["clip"], folder / "clip")
    write_json(folder / "text_encoder" / "config.json", _xlm_roberta_config(models["mclip"]))
    for name, target in (("clip", "clip"), ("mclip", "text_encoder")):
        shutil.copytree(tokenizers / name, folder / target, dirs_exist_ok=True)
    write_json(folder / "hyperparameters.json", hyperparameters(models["clip"]))
    return folder


def _original(model: Any, rules: Callable[[Any], RuleTable], leave_out: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors of a model under their names in the original code, by the inverse of the rules that convert it."""
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key not in leave_out}
    return original_tensors(tensors, rules(model.config))


def original_tensors(tensors: Tensors, table: RuleTable) -> dict[str, torch.Tensor]:
    """What a conversion by these rules would make `tensors` of.

    Raises:
        ConversionError: a tensor is not what the rules make.
    """
    plan = match(table.inverse, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    original: dict[str, torch.Tensor] = {}
    for step in plan.steps:
        made = tuple(tensors[source].cpu() for source in step.sources)
        for transform in step.transforms:
            made = transform(made)
        original.update(zip(step.targets, (tensor.contiguous() for tensor in made), strict=True))
    return original


def _save(tensors: Tensors, path: Path, dtype: torch.dtype = torch.float32) -> None:
    torch.save({key: tensor.to(dtype).clone() for key, tensor in tensors.items()}, path)


def _write_prior(prior: PriorTransformer, folder: Path) -> None:
    statistics = ("clip_mean", "clip_std")
    _save(_original(prior, weights.prior_rules, leave_out=statistics), folder / "prior_fp16.ckpt", torch.float16)
    table = weights.stats_rules(prior.config)
    stats = original_tensors({name: getattr(prior, name).detach() for name in statistics}, table)
    torch.save(tuple(stats[name].clone() for name in statistics), folder / "ViT-L-14_stats.th")


def _write_clip(clip: Any, folder: Path) -> None:
    """OpenAI's CLIP is no part of the release; it comes as the folder of a `CLIPModel`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in clip.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", clip.config.to_dict())
    size = clip.config.vision_config.image_size
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    write_json(folder / "preprocessor_config.json", {**PROCESSOR, **sizes})


def _xlm_roberta_config(mclip: Any) -> dict[str, Any]:
    """What the original builds the M-CLIP's transformer from; the sizes of the linear layer stand elsewhere there."""
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "layer_norm_eps",
        "hidden_act",
    )
    sizes = {name: getattr(mclip.config, name) for name in names}
    return {"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], **sizes}
