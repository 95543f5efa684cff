"""Text encoders in 8 bits, made of models that are loaded already, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


LARGEST = 127

DtypeOf = Callable[[str, torch.Tensor], torch.dtype]  # from the name of a weight, and what it is now


class RowsInInt8(nn.Module):
    """A weight as whole numbers from -127 to 127, and for each of its rows what they are multiplied with.

    (Row-wise absolute maximum quantisation of weights, as in LLM.int8(), https://arxiv.org/abs/2208.07339; activations
    stay as they are.)
    """

    def forward(self, numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The weight `[rows, columns]`, in the dtype of `scales` `[rows, 1]`."""
        return numbers * scales

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers and scales; the scales are rounded to the dtype of the weight first, so that only numbers err."""
        exact = weight.float()
        scales = (exact.abs().amax(dim=1, keepdim=True) / LARGEST).to(weight.dtype)
        scales = torch.where(scales == 0, 1, scales)
        return (exact / scales.float()).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def in_eight_bits(model: nn.Module) -> None:
    """Keep the weights of all linear layers of `model` in 8 bits; each is expanded while its layer runs.

    The numbers they had are gone. The states of a T5 of 12 layers with the random weights it starts with differ by
    3.0 % from those of float32 (root mean square, relative); in bfloat16 by 1.7 %. In unscaled float8, the storage of
    diffusers' `apply_layerwise_casting`, it would be 13 % to 21 %, for T5 has query weights smaller than float8
    resolves, and its `wo` would get activations in float8.
    """
    for _, layer in _linear_layers(model):
        layer.weight.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", RowsInInt8(), unsafe=True)


def is_in_eight_bits(model: nn.Module) -> bool:
    """Whether [`in_eight_bits`] has been there."""
    return any(map(parametrize.is_parametrized, model.modules()))


def bytes_saved(model: nn.Module, dtype_of: DtypeOf) -> int:
    """Bytes that [`in_eight_bits`] would save; a scale for each row is what it adds.

    Args:
        model: as loaded.
        dtype_of: dtypes of its weights before.
    """
    saved = 0
    for name, layer in _linear_layers(model):
        rows, columns = layer.weight.shape
        itemsize = dtype_of(f"{name}.weight", layer.weight).itemsize
        saved += rows * columns * (itemsize - 1) - rows * itemsize
    return saved


def largest_expanded(model: nn.Module, dtype_of: DtypeOf) -> int:
    """Bytes of the largest weight that a model in 8 bits expands while a layer runs."""
    sizes = (
        layer.weight.numel() * dtype_of(f"{name}.weight", layer.weight).itemsize
        for name, layer in _linear_layers(model)
    )
    return max(sizes, default=0)


def check_savable(components: Mapping[str, Any]) -> None:
    """Raises ValueError where a model is in 8 bits, whose files nothing could load."""
    for name, model in components.items():
        if isinstance(model, nn.Module) and is_in_eight_bits(model):
            raise ValueError(
                f"`{name}` is in 8 bits, as `fit()` made it, with which a model cannot be saved; save the pipeline"
                " before, or load it anew."
            )


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not parametrize.is_parametrized(layer) and layer.weight.is_floating_point()
    ]
