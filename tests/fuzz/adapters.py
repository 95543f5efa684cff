"""LoRAs and IP-Adapters of unknown origin."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from kandinsky_diffusers.k3.ip_adapter import _read, _sources
from kandinsky_diffusers.lora_files import find_lora, layer_of, read_lora
from kandinsky_diffusers.lora_fit import config_for

from . import mutations as hostile
from .pickling import NUMBERS
from .sandbox import CANARY, Target, written


Act = Callable[[], Any]


class _Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(4, 4)


LORA_LAYER = "down_blocks.0.attentions.0.to_q"
LORA_MODEL = torch.nn.ModuleDict(
    {"down_blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"attentions": torch.nn.ModuleList([_Attention()])})])}
)


def targets(lora: Path, ip_adapter: Path) -> list[Target]:
    """What reads them, and tells whether they fit.

    Args:
        lora: a release of a LoRA.
        ip_adapter: a converted IP-Adapter.
    """
    return [
        Target("LoRA", partial(_lora, lora), (ValueError, FileNotFoundError)),
        Target("IP-Adapter", partial(_ip_adapter, ip_adapter), (ValueError, OSError)),
    ]


def _lora_settings(random: Random) -> Any:
    """The configuration of peft that lies beside a LoRA, or in it."""
    patterns = ("(a+)+b", ".*.*.*.*.*x", "(", "to_q", "^down", "\\", "a{1,9}{1,9}", "[", "(?P<a>x)(?P=a)")
    settings = {
        "r": random.choice((2, 2, 2, *NUMBERS)),
        "lora_alpha": 4,
        "target_modules": random.choice((["to_q"], *patterns)),
        "rank_pattern": random.choice(({}, {random.choice(patterns): 2})),
        "peft_type": random.choice(("LORA", "LORA", "LORA", "IA3", "x", 3)),
    }
    more = {
        "megatron_core": CANARY,
        "megatron_config": {},
        "init_lora_weights": "pissa",
        "auto_mapping": {"a": CANARY},
    }
    settings |= dict(random.sample(list(more.items()), random.choice((0, 0, 1, 2))))
    return hostile.changed(random, settings) if random.random() < 0.6 else settings


def _lora(release: Path, random: Random, case: Path) -> Act:
    folder = case / "in"
    if random.random() < 0.5:
        content = (release / "pytorch_model.bin").read_bytes()
        written(folder / "pytorch_model.bin", random.choice((hostile.damaged, hostile.torch_archive))(random, content))
    else:
        header = {
            f"base_model.model.{LORA_LAYER}.lora_A.weight": {
                "dtype": "F32",
                "shape": [2, 4],
                "data_offsets": [0, 32],
            },
            f"base_model.model.{LORA_LAYER}.lora_B.weight": {
                "dtype": "F32",
                "shape": [4, 2],
                "data_offsets": [32, 64],
            },
            "__metadata__": {
                "lora_adapter_metadata": hostile.json_text(random, _lora_settings(random)).decode(errors="replace")
            },
        }
        if random.random() < 0.5:
            del header["__metadata__"]
            written(folder / "adapter_config.json", hostile.json_text(random, _lora_settings(random)))
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + bytes(64)
        written(
            folder / "adapter_model.safetensors",
            content if random.random() < 0.6 else hostile.safetensors(random, content),
        )

    def act() -> None:
        lora = read_lora(find_lora(folder))
        for prefix, tensors in lora.tensors.items():
            if set(map(layer_of, tensors)) == {LORA_LAYER}:
                config_for(LORA_MODEL, tensors, lora.configs.get(prefix), lora)

    return act


def _ip_adapter(converted: Path, random: Random, case: Path) -> Act:
    path = case / "in" / "ip_adapter.safetensors"
    content = (converted / "ip_adapter.safetensors").read_bytes()
    path.write_bytes(hostile.safetensors(random, content))
    names = ("ip_adapter.safetensors", "../x.safetensors", "missing.safetensors", "x.bin", "../../outside/keep.txt")
    (adapter,) = _sources(path.parent, None, random.choice((names[0], names[0], names[0], *names)))
    return partial(_read, adapter)
