"""What a stage is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .corpus import Corpus
from .loop import LossFunction


WEIGHTS = "weights.pt"  # of a finished stage


@dataclass(frozen=True)
class Context:
    """What a stage is built from.

    Args:
        work: the folder of corpus, tokenizers and stages.
        corpus: on the device.
        device: where the models run.
    """

    work: Path
    corpus: Corpus
    device: torch.device

    def result(self, stage: str) -> dict[str, Any]:
        """What a finished stage wrote: `model`, its weights, and what it hands on."""
        return torch.load(self.work / stage / WEIGHTS, map_location=self.device, weights_only=True)


@dataclass(frozen=True)
class Task:
    """A stage that is ready to run.

    Args:
        loss: `(rows, generator) -> losses`.
        finish: called after the training, when it may still change the model; returns tensors for later stages.
    """

    loss: LossFunction
    finish: Callable[[], dict[str, torch.Tensor]] = dict


def in_batches(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, size: int = 512) -> torch.Tensor:
    """`function` of rows, without gradients and `size` at a time."""
    with torch.no_grad():
        return torch.cat([function(some) for some in rows.split(size)])


def frozen(model: nn.Module, weights: dict[str, torch.Tensor], device: torch.device) -> Any:
    """A model with these weights that is not trained."""
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval().to(device)
