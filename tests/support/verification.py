"""Changing a written model, and what a verification says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kandinsky_diffusers.conversion import Verification
from kandinsky_diffusers.conversion.reports import TensorReport


PRIOR = Path("prior", "diffusion_pytorch_model.safetensors")
UNET = Path("unet", "diffusion_pytorch_model.safetensors")


def change(path: Path, key: str, changed: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace a tensor of a file by what a function makes of it; None takes it away."""
    tensors = load_file(path)
    new = changed(tensors.pop(key).clone())
    save_file(tensors if new is None else {**tensors, key: new}, path, {"format": "pt"})


def failures(found: Verification) -> dict[str, TensorReport]:
    """Key to report of all tensors with which something is wrong."""
    return {tensor.key: tensor for component in found.components for tensor in component.failures}


def problems(found: Verification) -> str:
    """What is wrong with the repository, or a model, as a whole."""
    return "\n".join([*found.problems, *(text for component in found.components for text in component.problems)])
