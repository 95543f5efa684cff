"""The ControlNet of Kandinsky 3.x: a picture, such as its edges, says what is where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding, zero_module
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_kandinsky3 import (
    Kandinsky3AttentionPooling,
    Kandinsky3DownSampleBlock,
)
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3UNet as StockKandinsky3UNet
from diffusers.utils import BaseOutput

from ..context_cache import ContextCache
from ..footprint import TEXT_LENGTH, Load, run_once
from .denoiser import DenoiserMixin, Read, additive_mask


@dataclass
class Kandinsky3ControlNetOutput(BaseOutput):
    """What a ControlNet adds to the UNet.

    Args:
        down_block_res_samples: one for each level, `[batch, channels, height, width]` after the level's halving.
    """

    down_block_res_samples: tuple[torch.Tensor, ...]


class Kandinsky3ControlNetModel(DenoiserMixin, PeftAdapterMixin, ModelMixin, AttentionMixin, ConfigMixin):
    """The way down of a [`Kandinsky3UNet`], but for its lowest level, which also sees a control image.

        residuals = controlnet(latents, t, context, mask, control_image, return_dict=False)[0]
        prediction = unet(latents, t, context, mask, projected=True, down_block_additional_residuals=residuals).sample

    Each level ends in a 1x1 convolution, zero before training, whose output is both the level's residual and what the
    next level gets (`UNetKandi3Controlnet` in models/unet_kandi3.py of kandinsky3-diffusers; elsewhere such a
    convolution is a side branch).

    Args:
        in_channels: of the latents.
        conditioning_channels: of the control image.
        time_embedding_dim: width of the time embedding.
        groups: number of groups of the group norms.
        attention_head_dim: width of an attention head.
        layers_per_block: number of residual blocks on either side of each attention, per level.
        block_out_channels: number of channels of each level, all of the UNet's but the last.
        cross_attention_dim: width of the projected text.
        conditioning_embedding_out_channels: numbers of channels on the control image's way to the size of the
            latents, which each but the first halves it.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 3,
        time_embedding_dim: int = 1536,
        groups: int = 32,
        attention_head_dim: int = 64,
        layers_per_block: int = 3,
        block_out_channels: tuple[int, ...] = (384, 768, 1536),
        cross_attention_dim: int = 4096,
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
    ):
        super().__init__()
        first = block_out_channels[0] // 2
        self.time_proj = Timesteps(first, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(first, time_embedding_dim)
        self.add_time_condition = Kandinsky3AttentionPooling(
            time_embedding_dim, cross_attention_dim, attention_head_dim
        )
        self.conv_in = torch.nn.Conv2d(in_channels, first, kernel_size=3, padding=1)
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            first, conditioning_channels, tuple(conditioning_embedding_out_channels)
        )
        self.down_blocks = torch.nn.ModuleList()
        self.controlnet_down_blocks = torch.nn.ModuleList()
        for level, channels in enumerate(block_out_channels):
            attends = level > 0  # the first level has no attention, as in the UNet
            self.down_blocks.append(
                Kandinsky3DownSampleBlock(
                    block_out_channels[level - 1] if attends else first,
                    channels,
                    time_embedding_dim,
                    context_dim=cross_attention_dim if attends else None,
                    num_blocks=layers_per_block,
                    groups=groups,
                    head_dim=attention_head_dim,
                    self_attention=attends,
                )
            )
            self.controlnet_down_blocks.append(zero_module(torch.nn.Conv2d(channels, channels, kernel_size=1)))
        self._use_own_attention()

    @classmethod
    def from_unet(
        cls,
        unet: StockKandinsky3UNet,
        conditioning_channels: int = 3,
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
    ) -> Self:
        """A ControlNet to train for a UNet, in float32: with its weights where it has them, without effect at first.

        Args:
            unet: of 3.x. Of one for inpainting the weights for the latents are taken.
            conditioning_channels: of the control image.
            conditioning_embedding_out_channels: see [`Kandinsky3ControlNetModel`].
        """
        config = unet.config
        controlnet = cls(
            in_channels=config.get("out_channels") or config.in_channels,
            conditioning_channels=conditioning_channels,
            time_embedding_dim=config.time_embedding_dim,
            groups=config.groups,
            attention_head_dim=config.attention_head_dim,
            layers_per_block=config.layers_per_block,
            block_out_channels=tuple(config.block_out_channels[:-1]),
            cross_attention_dim=config.cross_attention_dim,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
        )
        weights, of_unet = controlnet.state_dict(), unet.state_dict()
        weights |= {key: of_unet[key] for key in weights if not key.startswith("controlnet_")}
        weights["conv_in.weight"] = weights["conv_in.weight"][:, : controlnet.config.in_channels]
        controlnet.load_state_dict(weights)
        return controlnet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float | torch.Tensor = 1.0,
        return_dict: bool = True,
        *,
        context_lengths: torch.Tensor | None = None,
        cache: ContextCache | None = None,
        fill: bool = False,
    ) -> Kandinsky3ControlNetOutput | tuple[tuple[torch.Tensor, ...]] | None:
        """What to add to the outputs of the UNet's levels.

        Args:
            sample: `[batch, in_channels, height, width]`, noisy latents; height and width are multiples of 8.
            timestep: a number, or `[batch]` of them.
            encoder_hidden_states: the context `[batch, tokens, cross_attention_dim]`, as the UNet projects it; see
                [`Kandinsky3UNet`].
            encoder_attention_mask: `[batch, tokens]`, 1 at tokens that are attended to; None for all of them.
            controlnet_cond: the control image, `[rows, conditioning_channels, 8 * height, 8 * width]`, in [0, 1]; if
                there are fewer rows than samples (one for all, or one for both halves of guidance) they are repeated.
            conditioning_scale: times what the residuals are taken; or a map of it, `[rows, 1, any height, any width]`,
                of which each residual takes the nearest values.
            return_dict: return a tuple if False.
            context_lengths: see [`Kandinsky3UNet.forward`].
            cache: likewise; the control image is one of the conditions, its scale is not.
            fill: likewise.

        Raises:
            ValueError: `sample` has a size that cannot be halved often enough, or `controlnet_cond` has another size.
        """
        self._check_size(sample, len(self.down_blocks))
        self._check_condition(controlnet_cond, sample)

        def read() -> Read:
            mask = additive_mask(encoder_attention_mask, sample.dtype, as_original=True)
            return self._pool(encoder_hidden_states, mask, context_lengths), encoder_hidden_states, mask

        embed_condition = partial(self.controlnet_cond_embedding, controlnet_cond)
        condition = embed_condition() if cache is None else cache.keep("condition", embed_condition)
        if fill:
            return self._fill(cache, read)
        pooled, context, mask = self._read_once(cache, read)
        time_embed = self._embed_time(timestep, sample)
        time_embed = time_embed + pooled.to(time_embed.device)
        hidden = self.conv_in(sample) + _repeated(condition, len(sample))
        residuals: list[torch.Tensor] = []
        for block, convolution in zip(self.down_blocks, self.controlnet_down_blocks, strict=True):
            hidden = convolution(self._run(block, hidden, time_embed, context, mask))
            residuals.append(hidden)
        if cache is not None:
            cache.filled = True
        scaled = tuple(_scaled(residual, conditioning_scale) for residual in residuals)
        return Kandinsky3ControlNetOutput(down_block_res_samples=scaled) if return_dict else (scaled,)

    def _check_condition(self, condition: torch.Tensor, sample: torch.Tensor) -> None:
        pixels = 2 ** (len(self.config.conditioning_embedding_out_channels) - 1)
        wanted = (self.config.conditioning_channels, *(pixels * side for side in sample.shape[-2:]))
        if condition.ndim != 4 or tuple(condition.shape[1:]) != wanted or len(sample) % len(condition):
            raise ValueError(
                f"`controlnet_cond` has the shape {list(condition.shape)}; accepted is {[len(sample), *wanted]}, or"
                " fewer rows that can be repeated."
            )


def _repeated(rows: torch.Tensor, count: int) -> torch.Tensor:
    return rows.repeat(count // len(rows), 1, 1, 1)


def _scaled(residual: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    if not isinstance(scale, torch.Tensor):
        return residual * scale
    scale = F.interpolate(scale, residual.shape[-2:], mode="nearest-exact")
    return residual * _repeated(scale, len(residual)).to(residual)


@run_once.register
def _(model: Kandinsky3ControlNetModel, load: Load, encodes: bool) -> None:
    config: Any = model.config
    empty = partial(torch.empty, dtype=model.dtype)
    sample = empty(load.rows, config.in_channels, *load.latents)
    context = empty(load.rows, TEXT_LENGTH, config.cross_attention_dim)
    model(sample, 1, context, None, empty(load.pictures, config.conditioning_channels, *load.pixels))
