"""The UNet of Kandinsky 2.0, which reads the states of two text encoders."""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..unet import UNet2DConditionModel


POOLING_HEADS = 8


class FirstTokenPooling(nn.Module):
    """What the first token of a text gathers from all of them by self-attention.

    (`proj2` of the UNet of the original, which computes the other tokens too; scores are divided by sqrt(head width).)

    Args:
        width: of the states.
        out_width: of the result.
        heads: number of attention heads.
    """

    def __init__(self, width: int, out_width: int, heads: int = POOLING_HEADS):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, out_width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[batch, out_width]` from `[batch, tokens, width]`."""
        query, key, value = self.to_q(states[:, :1]), self.to_k(states), self.to_v(states)
        query, key, value = (rows.unflatten(2, (self.heads, -1)).transpose(1, 2) for rows in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(attended.transpose(1, 2).flatten(1))


class PooledTextEmbedding(nn.Module):
    """The vector that both texts add to the time embedding.

    Args:
        pooled_width: of the pooled states of the first encoder.
        width_2: of the hidden states of the second.
        out_width: of the time embedding.
    """

    def __init__(self, pooled_width: int, width_2: int, out_width: int):
        super().__init__()
        self.text_proj = nn.Linear(pooled_width, out_width)
        self.text_norm = nn.LayerNorm(out_width)
        self.pool_2 = FirstTokenPooling(width_2, out_width)
        self.text_norm_2 = nn.LayerNorm(out_width)

    def forward(self, pooled: torch.Tensor, states_2: torch.Tensor) -> torch.Tensor:
        """`[batch, out_width]` from `[batch, pooled_width]` and `[batch, tokens, width_2]`."""
        return self.text_norm(self.text_proj(pooled)) + self.text_norm_2(self.pool_2(states_2))


class JoinedTextProjection(nn.Module):
    """The tokens of both texts, one after the other, at the width of cross-attention.

    Args:
        width: of the hidden states of the first encoder.
        width_2: of those of the second.
        out_width: of cross-attention.
    """

    def __init__(self, width: int, width_2: int, out_width: int):
        super().__init__()
        self.text_proj = nn.Linear(width, out_width)
        self.text_proj_2 = nn.Linear(width_2, out_width)
        self.norm = nn.LayerNorm(out_width)

    def forward(self, states: torch.Tensor, states_2: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens + tokens_2, out_width]`."""
        return self.norm(torch.cat([self.text_proj(states), self.text_proj_2(states_2)], dim=1))


class KandinskyV20UNet(UNet2DConditionModel):
    """The UNet of 2.0: that of 2.1, conditioned on two texts.

    Call it with the hidden states of M-CLIP `[batch, tokens, text_dim]` as `encoder_hidden_states`, and with
    `added_cond_kwargs`: `text_embeds`, its pooled states `[batch, pooled_text_dim]`, and `text_embeds_2`, the hidden
    states of mT5 `[batch, tokens, text_dim_2]`.

    Args:
        sample_size: height and width of the latents it was trained on.
        in_channels: 4 for pictures; 9 for inpainting: noisy latents, latents of the masked picture, mask (1 keeps).
        out_channels: noise and variance.
        down_block_types: as in [`UNet2DConditionModel`], as all that follow.
        mid_block_type: of the block in the middle.
        up_block_types: from the lowest level up.
        block_out_channels: number of channels of each level.
        layers_per_block: number of residual blocks per level.
        attention_head_dim: width of an attention head.
        cross_attention_dim: width of the projected text.
        resnet_time_scale_shift: how the time embedding acts.
        text_dim: width of the first text encoder's hidden states.
        text_dim_2: width of the second's.
        pooled_text_dim: width of the first's pooled states.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = 64,
        in_channels: int = 4,
        out_channels: int = 8,
        down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        mid_block_type: str = "UNetMidBlock2DSimpleCrossAttn",
        up_block_types: tuple[str, ...] = (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        block_out_channels: tuple[int, ...] = (384, 768, 1152, 1536),
        layers_per_block: int = 3,
        attention_head_dim: int = 64,
        cross_attention_dim: int = 768,
        resnet_time_scale_shift: str = "scale_shift",
        text_dim: int = 1024,
        text_dim_2: int = 512,
        pooled_text_dim: int = 640,
    ):
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim,
            cross_attention_dim=cross_attention_dim,
            resnet_time_scale_shift=resnet_time_scale_shift,
        )
        time_embed_dim = self.time_embedding.linear_2.out_features
        self.add_embedding = PooledTextEmbedding(pooled_text_dim, text_dim_2, time_embed_dim)
        self.encoder_hid_proj = JoinedTextProjection(text_dim, text_dim_2, cross_attention_dim)

    def to_json_string(self) -> str:
        """The configuration as JSON, without the settings of the base class that this class does not take."""
        config: dict[str, Any] = json.loads(super().to_json_string())
        known = inspect.signature(type(self).__init__).parameters
        kept = {name: value for name, value in config.items() if name in known or name.startswith("_")}
        return json.dumps(kept, indent=2, sort_keys=True) + "\n"

    def _embed_conditions(
        self, emb: torch.Tensor, encoder_hidden_states: torch.Tensor, added_cond_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """What the texts add to the time embedding, `[batch, time_embed_dim]`.

        Raises:
            ValueError: `added_cond_kwargs` lacks `text_embeds` or `text_embeds_2`.
        """
        missing = [name for name in ("text_embeds", "text_embeds_2") if name not in (added_cond_kwargs or {})]
        if missing:
            raise ValueError(
                f"`added_cond_kwargs` is without {', '.join(missing)}; it needs `text_embeds` (pooled states of the"
                " first text encoder) and `text_embeds_2` (hidden states of the second)."
            )
        return self.add_embedding(added_cond_kwargs["text_embeds"], added_cond_kwargs["text_embeds_2"])

    def _read_conditions(self, encoder_hidden_states: torch.Tensor, added_cond_kwargs: dict[str, Any]) -> torch.Tensor:
        """The context of cross-attention, `[batch, tokens, cross_attention_dim]`."""
        return self.encoder_hid_proj(encoder_hidden_states, added_cond_kwargs["text_embeds_2"])
