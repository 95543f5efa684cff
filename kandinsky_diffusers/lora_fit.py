"""Which model a LoRA is for, whether it fits there, and the configuration that peft builds its layers with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import logging

from .lora_files import ALPHA, PEFT_CONFIG, LoraFile, describe, layer_of, prefix_of


logger = logging.get_logger(__name__)

# ways to begin a training that also change the weights of the model
CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
# with these peft imports any module by its name
IMPORTS = ("megatron_config", "megatron_core")
_SHOWN = 5
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
_REPETITION = re.compile(r"[*+]|\{\d")
_MOST_REPETITIONS = 2

Part = tuple[Mapping[str, torch.Tensor], Mapping[str, Any] | None]


def parts_for(models: Mapping[str, Any], lora: LoraFile, pipeline: str) -> dict[str, Part]:
    """Tensors and stored configuration for each model of a pipeline."""
    parts: dict[str, Part] = {}
    for prefix, tensors in lora.tensors.items():
        layers = {layer_of(name) for name in tensors}
        fitting = [name for name, model in models.items() if prefix in ("", prefix_of(name)) and _has(model, layers)]
        if fitting:
            parts[fitting[0]] = (tensors, lora.configs.get(prefix, lora.configs.get("")))
        elif prefix == "" or any(prefix_of(name) == prefix for name in models):
            raise ValueError(_misfit(models, lora, layers, pipeline))
    if not parts:
        raise ValueError(_misfit(models, lora, set(), pipeline))
    if left := sorted(lora.tensors.keys() - {"", *map(prefix_of, parts)}):
        logger.warning(f"{lora}; {pipeline} takes {', '.join(parts)}, and leaves {', '.join(left)} out.")
    return parts


def _has(model: torch.nn.Module, layers: set[str]) -> bool:
    return layers <= {name for name, _ in model.named_modules()}


def _misfit(models: Mapping[str, Any], lora: LoraFile, layers: set[str], pipeline: str) -> str:
    own = {name for model in models.values() for name, _ in model.named_modules()}
    missing = sorted(layers - own)
    why = f" {len(missing)} of its {len(layers)} layers are not there, such as {missing[0]}." if missing else ""
    fits = " and ".join(f"`{name}`, {describe(n for n, _ in model.named_modules())}" for name, model in models.items())
    return f"{lora}. {pipeline} takes LoRAs for {fits}.{why}"


def config_for(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], stored: Mapping[str, Any] | None, lora: LoraFile
) -> dict[str, Any]:
    """Arguments of `LoraConfig`: those stored with the file, or what its tensors tell, in which alpha is the rank.

    Raises:
        ValueError: matrices are missing or do not fit their layer or the stored configuration.
    """
    ranks, faults = _ranks(model, tensors)
    if stored is None:
        if lora.format == "peft":
            logger.warning(f"{lora}, without {PEFT_CONFIG}, which has its alpha: it is taken for the rank.")
        config = _config_from(tensors, ranks)
    else:
        config, more = _config_stored(stored, ranks)
        faults += more
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(f"{lora}, which does not fit: {'; '.join(faults[:_SHOWN])}{more}.")
    return config


def _ranks(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, int], list[str]]:
    """The rank of each layer, and what does not fit."""
    ranks, faults = {}, []
    for name in dict.fromkeys(map(layer_of, tensors)):
        down, up = (tensors.get(f"{name}.{matrix}.weight") for matrix in ("lora_A", "lora_B"))
        if down is None or up is None:
            faults.append(f"{name} has only one of its two matrices")
            continue
        layer = model.get_submodule(name)
        inputs, outputs = _widths(getattr(layer, "base_layer", layer))
        rank = ranks[name] = down.shape[0]
        if tuple(down.shape[1:]) != inputs or tuple(up.shape) != (outputs, rank, *(1 for _ in inputs[1:])):
            faults.append(
                f"{name} has the matrices {list(down.shape)} and {list(up.shape)}, and {outputs} outputs of "
                f"{' x '.join(map(str, inputs))} inputs"
            )
    return ranks, faults


def _widths(layer: Any) -> tuple[tuple[int, ...], int]:
    if isinstance(layer, torch.nn.Linear):  # quantised ones too, whose weights have another shape
        return (layer.in_features,), layer.out_features
    if isinstance(layer, torch.nn.Conv2d):
        return tuple(layer.weight.shape[1:]), layer.out_channels
    return (), 0


def _config_from(tensors: Mapping[str, torch.Tensor], ranks: Mapping[str, int]) -> dict[str, Any]:
    alphas = {name: _alpha(tensors, name, rank) for name, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] if values else 1 for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_exactly(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "use_dora": any(key.endswith("lora_magnitude_vector") for key in tensors),
        "lora_bias": any(key.endswith("lora_B.bias") for key in tensors),
    }


def _alpha(tensors: Mapping[str, torch.Tensor], layer: str, rank: int) -> float:
    return float(tensors[f"{layer}.{ALPHA}"]) if f"{layer}.{ALPHA}" in tensors else rank


def _exactly(name: str) -> str:
    """As a pattern of peft, which else would also be for layers whose names end so."""
    return f"^{re.escape(name)}"


def _config_stored(stored: Mapping[str, Any], ranks: Mapping[str, int]) -> tuple[dict[str, Any], list[str]]:
    from peft import LoraConfig, PeftType
    from peft.utils.other import get_pattern_key

    kind = stored.get("peft_type", PeftType.LORA)
    if kind != PeftType.LORA:
        raise ValueError(f"its configuration has `peft_type` {kind}; accepted is {PeftType.LORA.value}.")
    if str(stored.get("init_lora_weights")).startswith(CHANGES_THE_MODEL):
        raise ValueError(
            f"its configuration has `init_lora_weights` {stored['init_lora_weights']!r}: it was trained on a model"
            " with other weights. Accepted is what peft's `path_initial_model_for_weight_conversion` makes of it."
        )
    _check_patterns(stored)
    own = {key: value for key, value in stored.items() if key not in IMPORTS}
    try:
        config: Any = LoraConfig.from_peft_type(**own)
        faults = []
        for name, rank in ranks.items():
            wanted = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
            if wanted != rank:
                faults.append(f"{name} has rank {rank}, and its configuration says {wanted}")
    except (TypeError, AttributeError, ValueError, LookupError, ImportError, re.error) as error:
        raise ValueError(f"its configuration is none that peft takes: {error}") from error
    return config.to_dict(), faults


def _check_patterns(stored: Mapping[str, Any]) -> None:
    """Regular expressions come from the file, too, and one such as `(a+)+b` takes years for a name of 60 letters.

    Raises:
        ValueError: one repeats a group, or has more than two repetitions.
    """
    settings = [stored.get(name) for name in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")]
    patterns = [setting for setting in settings if isinstance(setting, str)]
    patterns += [pattern for setting in settings if isinstance(setting, Mapping) for pattern in setting]
    for pattern in patterns:
        if _REPEATED_GROUP.search(pattern) or len(_REPETITION.findall(pattern)) > _MOST_REPETITIONS:
            raise ValueError(
                f"its configuration has the pattern {pattern[:80]!r}; accepted are up to"
                f" {_MOST_REPETITIONS} repetitions, and none of a group."
            )
