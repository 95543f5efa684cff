"""What the refiner of KandiSuperRes Flash reads in the place of a text."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class KandiSuperResContext(ModelMixin, ConfigMixin):
    """The stored context of the empty prompt, so that refining needs no text encoder.

    Args:
        tokens: how many.
        width: of a token, the `cross_attention_dim` of the refiner.
    """

    @register_to_config
    def __init__(self, tokens: int = 128, width: int = 4096):
        super().__init__()
        self.states = nn.Parameter(torch.zeros(tokens, width))
        self.mask: torch.Tensor
        self.register_buffer("mask", torch.ones(tokens, dtype=torch.int64))

    def forward(self, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Context `[batch, tokens, width]` and mask `[batch, tokens]`, 1 at tokens that are attended to."""
        return self.states.expand(batch, -1, -1), self.mask.expand(batch, -1)
