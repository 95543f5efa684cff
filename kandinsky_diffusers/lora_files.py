"""LoRA files: which format one has, for which model it is, and its tensors under peft's names.

A format is a row of [`formats`], its rules are data. Names are peft's, `<layer>.lora_A.weight` `[rank, inputs]` and
`<layer>.lora_B.weight` `[outputs, rank]`, whatever the file calls them.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from huggingface_hub import snapshot_download

from .conversion.errors import ConversionError
from .conversion.json_files import parse_object, read_json
from .conversion.reader import WeightFile, open_weights
from .conversion.rules import RuleTable, rename


# What a folder or a Hub repository may call its LoRA, the best first: by diffusers, peft, accelerate.
WEIGHT_NAMES = (
    LORA_WEIGHT_NAME_SAFE,
    "adapter_model.safetensors",
    "model.safetensors",
    LORA_WEIGHT_NAME,
    "adapter_model.bin",
    "pytorch_model.bin",
)

PREFIXES = ("unet", "prior")  # before the keys of files that say for which model they are
PEFT_PREFIX = "base_model.model."
PEFT_CONFIG = "adapter_config.json"
STORED_CONFIG = "lora_adapter_metadata"  # where diffusers keeps peft's configuration, in the header of a file
TENSORS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")
ALPHA = "alpha"
SIDES = {"down": "lora_A", "up": "lora_B"}

# Layers by what attention processors call them. The LoRA of the output takes what the output layer takes.
PROCESSOR_LAYERS = {
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out": "to_out.0",
    "add_k_proj": "add_k_proj",
    "add_v_proj": "add_v_proj",
}


@dataclass(frozen=True)
class LoraFormat:
    """A way to name the tensors of a LoRA.

    Args:
        name: for messages, and in the README.
        rules: from the keys of a file, without `unet.` or `prior.`, to peft's names.
    """

    name: str
    rules: Callable[[Iterable[str]], RuleTable]


@functools.cache
def formats() -> tuple[LoraFormat, ...]:
    """All that are known; the first that has a rule for one of a file's keys is its format."""
    from .k3.lora import lora_rules  # the pipelines of k3 are built on this module

    return (
        # what ai-forever/kandinsky3-diffusers trains
        LoraFormat("fork", lora_rules),
        # of diffusers up to 0.20, and of its training scripts for 2.2 later
        LoraFormat("attention processors", lambda keys: PROCESSORS),
        LoraFormat("peft", lambda keys: PEFT),
        # of diffusers up to 0.24, before it was built on peft
        LoraFormat("old diffusers", lambda keys: LINEAR_LAYERS),
        LoraFormat("diffusers", lambda keys: DIFFUSERS),
    )


PROCESSORS = RuleTable(
    tuple(
        rename(f"{{rest}}.processor.{old}_lora.{side}.weight", f"{{rest}}.{new}.{matrix}.weight")
        for old, new in PROCESSOR_LAYERS.items()
        for side, matrix in SIDES.items()
    )
)
PEFT = RuleTable(tuple(rename(f"{PEFT_PREFIX}{{rest}}.{name}", f"{{rest}}.{name}") for name in TENSORS))
LINEAR_LAYERS = RuleTable(
    (
        *(rename(f"{{rest}}.lora.{side}.weight", f"{{rest}}.{matrix}.weight") for side, matrix in SIDES.items()),
        rename(f"{{rest}}.{ALPHA}", f"{{rest}}.{ALPHA}"),
    )
)
DIFFUSERS = RuleTable(tuple(rename(f"{{rest}}.{name}", f"{{rest}}.{name}") for name in (*TENSORS, ALPHA)))

# Version and part by what the layers of a model are called. 2.0, 2.1 and 2.2 have the same attention.
MODELS = (
    (
        "3.x",
        "UNet",
        r"add_time_condition\.|(down|up)_blocks\.\d+\.(resnets_(in|out)|attentions\.\d+\.(attention|feed_forward))\.",
    ),
    ("2.x", "UNet", r"(mid_block|(down|up)_blocks\.\d+)\.attentions\.\d+\.(to_\w+|add_\w+)"),
    ("2.1 or 2.2", "prior", r"transformer_blocks\.\d+\.(attn1|ff)\."),
)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA.

    Args:
        title: what messages call it.
        format: name of its format.
        tensors: by `unet`, `prior`, or "" where the file does not say: the tensors by peft's names.
        configs: likewise, arguments of peft's `LoraConfig`, if any came with the file.
    """

    title: str
    format: str
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        models = (describe(map(layer_of, tensors)) for tensors in self.tensors.values())
        return f"{self.title} is a LoRA for {' and '.join(models)} (format: {self.format})"


def find_lora(
    place: str | os.PathLike,
    weight_name: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **hub_options: Any,
) -> Path:
    """The LoRA file in a folder or Hub repository, which is downloaded; arguments as of `load_lora_weights`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a folder has several, and none of the usual name.
    """
    path = Path(place)
    if path.is_file():
        return path
    names = [weight_name] if weight_name else list(WEIGHT_NAMES)
    if use_safetensors is not None:
        names = [name for name in names if name.endswith(".safetensors") == use_safetensors]
    inside = Path(subfolder or "")
    if not path.is_dir():
        patterns = [(inside / name).as_posix() for name in (*names, PEFT_CONFIG)]
        path = Path(snapshot_download(str(place), allow_patterns=patterns, **hub_options))
    folder = path / inside
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    others = sorted(other.name for other in folder.glob("*") if other.suffix in (".safetensors", ".bin", ".pt"))
    if found is None and weight_name is None and len(others) == 1:
        found = folder / others[0]
    if found is None:
        raise FileNotFoundError(
            f"{place} has no {' nor '.join(names)}{f' in {subfolder}' if subfolder else ''}; there are {others}."
            " `weight_name` names another file."
        )
    return found


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file; `adapter_config.json` beside a file of peft belongs to it.

    Raises:
        ValueError: it is unreadable, no LoRA, or holds something that no LoRA has.
    """
    file = open_weights(path)
    tensors = {key: file.tensor(key) for key in file.shapes}
    return lora_from(tensors, str(path), _stored_configs(file))


def lora_from(
    tensors: Mapping[str, torch.Tensor],
    title: str = "the dict",
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> LoraFile:
    """A LoRA from its named tensors.

    Args:
        tensors: in any of the formats.
        title: what messages call it.
        configs: see [`LoraFile`].

    Raises:
        ValueError: they are no LoRA, or some of them are not.
    """
    found = format_of(tensors)
    if found is None:
        some = ", ".join(list(tensors)[:3]) or "none"
        known = ", ".join(known.name for known in formats())
        raise ValueError(f"{title} is no LoRA of a known format; its keys are {some} .... Accepted are: {known}.")
    table = found.rules(_without_prefix(tensors))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        prefix, name = _split(key)
        target = table.target_of(name)
        if target is None or not isinstance(tensor, torch.Tensor):
            unknown.append(key)
        else:
            parts.setdefault(prefix, {})[target] = tensor
    if unknown:
        raise ValueError(
            f"{title} is a LoRA (format: {found.name}), but {len(unknown)} of its {len(tensors)} keys are not of one:"
            f" {', '.join(unknown[:5])}."
        )
    return LoraFile(title, found.name, parts, configs or {})


def format_of(keys: Iterable[str]) -> LoraFormat | None:
    """The format that the keys of a file have, or None."""
    names = _without_prefix(keys)
    for known in formats():
        table = known.rules(names)
        if any(table.target_of(name) for name in names if not name.endswith(f".{ALPHA}")):
            return known
    return None


def identify_lora(keys: Iterable[str]) -> tuple[str, str] | None:
    """Version and part, for `kandinsky-diffusers inspect`, of a file with these keys; None if it is no LoRA."""
    names = list(keys)
    found = format_of(names)
    if found is None:
        return None
    plain = _without_prefix(names)
    table = found.rules(plain)
    model = model_of(layer_of(target) for name in plain if (target := table.target_of(name)))
    versions, parts = zip(*model, strict=True) if model else (("?",), ("unknown model",))
    return " and ".join(dict.fromkeys(versions)), f"LoRA of the {' and the '.join(parts)} ({found.name})"


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to, by peft's name of the tensor."""
    return re.sub(rf"\.({'|'.join(map(re.escape, (*TENSORS, ALPHA)))})$", "", name)


def model_of(layers: Iterable[str]) -> list[tuple[str, str]]:
    """Version and part of the models that have layers called so."""
    names = list(layers)
    return [
        (version, part) for version, part, pattern in MODELS if any(re.match(pattern, f"{name}.") for name in names)
    ]


def describe(layers: Iterable[str]) -> str:
    """The model that has layers called so, in words."""
    names = list(layers)
    known = [f"the {part} of Kandinsky {version}" for version, part in model_of(names)]
    return " and ".join(known) or f"an unknown model with the layer {names[0] if names else 'nothing'}"


def prefix_of(component: str) -> str:
    """`prior_prior`, the prior of a combined pipeline, is `prior` in a file."""
    return component.removeprefix("prior_")


def _split(key: str) -> tuple[str, str]:
    prefix, _, name = key.partition(".")
    return (prefix, name) if prefix in PREFIXES else ("", key)


def _without_prefix(keys: Iterable[str]) -> list[str]:
    return [_split(key)[1] for key in keys]


def _stored_configs(file: WeightFile) -> dict[str, dict[str, Any]]:
    """Configurations from the header of the file, else from beside it, by prefix."""
    beside = file.path.with_name(PEFT_CONFIG)
    title = f"the LoRA configuration of {file.path}"
    try:
        if STORED_CONFIG in file.metadata:
            entries = parse_object(file.metadata[STORED_CONFIG], title)
        elif beside.is_file() and any(key.startswith(PEFT_PREFIX) for key in file.shapes):
            return {"": read_json(beside)}
        else:
            return {}
    except ConversionError as error:
        raise ValueError(f"{title} is not valid JSON: {error}") from error
    configs: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        prefix, name = _split(key)
        configs.setdefault(prefix, {})[name] = value
    return configs
