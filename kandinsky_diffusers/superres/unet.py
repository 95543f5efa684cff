"""The UNet of KandiSuperRes, which works on pixels and predicts the clean picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ..footprint import Load, run_once


class KandiSuperResUNet(ModelMixin, ConfigMixin):
    """Predicts the clean picture from a noisy one and the picture of low resolution; without attention and text.

    (`UNet` in KandiSuperRes/model/unet_sr.py of the original.) The defaults are the published sizes, 413 million
    parameters.

    Args:
        sample_channels: of the noisy picture, of the one of low resolution, and of the prediction.
        init_channels: between the first convolution and the first level.
        block_out_channels: of each level; all levels but the last work at half the size of the one before.
        layers_per_block: residual blocks of each level, on the way down and on the way up.
        time_embedding_dim: width of the time embedding.
        groups: of the group norms.
        dropout: before the last convolution of each block, in training.

    Raises:
        ValueError: the two sequences differ in length.
    """

    _no_split_modules: ClassVar = ["SuperResBlock"]
    _repeated_blocks: ClassVar = ["SuperResBlock"]

    @register_to_config
    def __init__(
        self,
        sample_channels: int = 3,
        init_channels: int = 128,
        block_out_channels: Sequence[int] = (128, 256, 512, 1024),
        layers_per_block: Sequence[int] = (2, 4, 8, 8),
        time_embedding_dim: int = 512,
        groups: int = 32,
        dropout: float = 0.1,
    ):
        super().__init__()
        if len(block_out_channels) != len(layers_per_block):
            raise ValueError(
                f"`layers_per_block` is {list(layers_per_block)}; accepted is one number for each of "
                f"{len(block_out_channels)} levels."
            )
        self.time_proj = Timesteps(init_channels, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(init_channels, time_embedding_dim)
        self.conv_in = nn.Conv2d(2 * sample_channels, init_channels, kernel_size=3, padding=1)
        widths = (init_channels, *block_out_channels)
        last = len(block_out_channels) - 1
        same = {"time_channels": time_embedding_dim, "groups": groups, "dropout": dropout}
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        for level, layers in enumerate(layers_per_block):
            outer, inner = widths[level : level + 2]
            down = nn.Conv2d if level < last else None
            self.down_blocks.append(SuperResLevel([outer] + [inner] * layers, sample_first=down, **same))
        for level, layers in reversed(list(enumerate(layers_per_block))):
            outer, inner = widths[level : level + 2]
            skipped = inner if level < last else 0
            up = nn.ConvTranspose2d if level < last else None
            channels = ([inner + skipped] + [inner] * (layers - 1) + [outer])[: layers + 1]
            self.up_blocks.append(SuperResLevel(channels, sample_last=up, **same))
        self.conv_norm_out = nn.GroupNorm(groups, init_channels)
        self.conv_out = nn.Conv2d(init_channels, sample_channels, kernel_size=3, padding=1)

    @property
    def size_multiple(self) -> int:
        """Height and width of `sample` have to be multiples of it."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        image: torch.Tensor,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict the clean picture.

        Args:
            sample: `[batch, 3, height, width]`, noisy pixels around [-1, 1].
            timestep: a number from 0 to 999, or `[batch]` of them.
            image: `[batch, 3, any, any]` in [-1, 1], resized bilinearly to the size of `sample`.
            return_dict: return a tuple if False.

        Returns:
            Pixels shaped like `sample`, nominally in [-1, 1].

        Raises:
            ValueError: `sample` has a size that cannot be halved often enough.
        """
        self._check_size(sample)
        if image.shape[-2:] != sample.shape[-2:]:
            image = F.interpolate(image, sample.shape[-2:], mode="bilinear")
        time_embed = self._embed_time(timestep, sample)
        hidden = self.conv_in(torch.cat([sample, image], dim=1))
        skips: list[torch.Tensor] = []
        for block in self.down_blocks:
            hidden = block(hidden, time_embed)
            skips.append(hidden)
        skips.pop()  # the lowest level goes straight up
        for level, block in enumerate(self.up_blocks):
            if level > 0:
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = block(hidden, time_embed)
        predicted = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        return UNet2DOutput(sample=predicted) if return_dict else (predicted,)

    def _embed_time(self, timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        return self.time_embedding(self.time_proj(timesteps).to(sample.dtype))

    def _check_size(self, sample: torch.Tensor) -> None:
        height, width = sample.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"`sample` is {height} pixels high and {width} wide; accepted are multiples of {self.size_multiple}."
            )


class SuperResLevel(nn.Module):
    """The residual blocks of one level.

    Args:
        channels: before the first block, and after each.
        sample_first: the convolution with which the first block changes the size, if it does.
        sample_last: likewise, of the last block.
        options: of [`SuperResBlock`].
    """

    def __init__(
        self,
        channels: Sequence[int],
        sample_first: type[nn.Module] | None = None,
        sample_last: type[nn.Module] | None = None,
        **options: float,
    ):
        super().__init__()
        samplers: list[type[nn.Module] | None] = [None] * (len(channels) - 1)
        samplers[0] = sample_first or samplers[0]
        samplers[-1] = sample_last or samplers[-1]
        self.resnets = nn.ModuleList(
            SuperResBlock(*sizes, sampler=sampler, **options)
            for *sizes, sampler in zip(channels[:-1], channels[1:], samplers, strict=True)
        )

    def forward(self, hidden: torch.Tensor, time_embed: torch.Tensor) -> torch.Tensor:
        """`hidden` `[batch, channels, height, width]` through all blocks, with `time_embed` `[batch, width]`."""
        for resnet in self.resnets:
            hidden = resnet(hidden, time_embed)
        return hidden


class SuperResBlock(nn.Module):
    """A residual block whose first half has no activation, and whose learned resampling is after the norm.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        time_channels: width of the time embedding.
        groups: of the group norms.
        dropout: before the second convolution, in training.
        sampler: `nn.Conv2d` halves the size, `nn.ConvTranspose2d` doubles it, None leaves it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        groups: int,
        dropout: float,
        sampler: type[nn.Module] | None = None,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.sampler = _sampler(sampler, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.shortcut_sampler = _sampler(sampler, in_channels)
        changed = sampler is not None or in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1) if changed else None

    def forward(self, hidden: torch.Tensor, time_embed: torch.Tensor) -> torch.Tensor:
        """Residual and shortcut of `hidden`; scale and shift of the second norm come from `time_embed`."""
        scale, shift = self.time_emb_proj(F.silu(time_embed))[:, :, None, None].chunk(2, dim=1)
        residual = self.norm1(hidden)
        if self.sampler is not None and self.shortcut_sampler is not None:
            residual, hidden = self.sampler(residual), self.shortcut_sampler(hidden)
        residual = self.norm2(self.conv1(residual)) * (1 + scale) + shift
        residual = self.conv2(self.dropout(F.silu(residual)))
        return residual + (hidden if self.conv_shortcut is None else self.conv_shortcut(hidden))


def _sampler(kind: type[nn.Module] | None, channels: int) -> nn.Module | None:
    return None if kind is None else kind(channels, channels, kernel_size=4, stride=2, padding=1)


@run_once.register
def _(model: KandiSuperResUNet, load: Load, encodes: bool) -> None:
    pixels = torch.empty(load.rows, 3, *load.pixels, dtype=model.dtype)
    model(pixels, 1, pixels)
