"""The edge detector whose edges ControlNet of 3.x draws along: HED, holistically nested edge detection."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..images import Images, made_rgb, pad_to, pixels_from, size_of


SAFE_LEVELS = 3


class EdgeBlock(nn.Module):
    """One level of the network: convolutions, and the edges that are seen at its resolution.

    Args:
        in_channels: of the features that come in.
        out_channels: of the features that go on.
        layers: number of convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, layers: int):
        super().__init__()
        widths = [in_channels, *[out_channels] * layers]
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(widths))
        self.side = nn.Conv2d(out_channels, 1, 1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `[batch, out_channels, h, w]`, and logits of edges `[batch, 1, h, w]`."""
        for conv in self.convs:
            features = conv(features).relu()
        return features, self.side(features)


class KandinskyHEDDetector(ModelMixin, ConfigMixin):
    """White edges on black, as hints for ControlNet: `detector(image)`.

    A VGG of five levels, each of which votes at its own resolution (Xie and Tu, "Holistically-Nested Edge Detection",
    2015), in the form of ControlNet's annotator, `annotator/hed` of lllyasviel/ControlNet, whose `ControlNetHED.pth`
    it runs. The annotator is usually given pictures of about 512 pixels: in larger ones more detail counts as edge.

    `detector.compile()` compiles the network; `forward` alone takes and returns tensors.

    Args:
        block_out_channels: of each level; from one to the next the resolution is halved.
        layers_per_block: number of convolutions of each level.

    Raises:
        ValueError: these are not equally many.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: Sequence[int] = (64, 128, 256, 512, 512),
        layers_per_block: Sequence[int] = (2, 2, 3, 3, 3),
    ):
        super().__init__()
        if len(block_out_channels) != len(layers_per_block) or not block_out_channels:
            raise ValueError(
                f"`layers_per_block` has {len(layers_per_block)} items; accepted is one for each of"
                f" {len(block_out_channels)} in `block_out_channels`, at least one."
            )
        widths = pairwise([3, *block_out_channels])
        self.mean = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.blocks = nn.ModuleList(
            EdgeBlock(*pair, layers) for pair, layers in zip(widths, layers_per_block, strict=True)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """How sure the network is of an edge, `[batch, 1, height, width]` in [0, 1], float32.

        The logistic function of the mean of all levels, each resized bilinearly. Pictures that are too small for the
        last level are continued by repeating their border.

        Args:
            pixels: `[batch, 3, height, width]` in [-1, 1], at least one pixel.
        """
        height, width = pixels.shape[-2:]
        smallest = 2 ** (len(self.blocks) - 1)
        pixels = pad_to(pixels.float(), max(height, smallest), max(width, smallest))
        features = ((pixels + 1.0) * 127.5 - self.mean.float()).to(self.mean.dtype)
        sides = []
        for level, block in enumerate(self.blocks):
            features, side = block(F.max_pool2d(features, 2) if level else features)
            sides.append(F.interpolate(side.float(), pixels.shape[-2:], mode="bilinear"))
        return torch.stack(sides).mean(dim=0).sigmoid()[..., :height, :width]

    @torch.no_grad()
    def __call__(self, image: Images, safe: bool = False) -> Any:
        """Edges of pictures, each in its own size.

        Args:
            image: one picture, or a list of pictures of any sizes, see [`images.pixels_from`]; PIL pictures of any
                mode, arrays `[height, width, 3]`, tensors `[3, height, width]`, or batches of these.
            safe: three levels instead of 256, as in the annotator: what is faint in the edges is no hint then.

        Returns:
            A PIL picture (RGB), white where an edge is, as large as `image`; a list of them for a list or a batch.

        Raises:
            TypeError, ValueError: `image` is not as described.
        """
        several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 3) == 4
        items: Any = made_rgb(image if isinstance(image, (list, tuple)) else [image])
        batches = [pixels_from(item, *size_of(item)) for item in items or [items]]
        edges = [super(KandinskyHEDDetector, self).__call__(batch.to(self.device)) for batch in batches]
        pictures = [_as_picture(rows, safe) for batch in edges for rows in batch]
        return pictures if several else pictures[0]


def _as_picture(edges: torch.Tensor, safe: bool) -> PIL.Image.Image:
    """Edges `[1, height, width]` in [0, 1] as a picture; values are cut to bytes, not rounded, as in the original."""
    if safe:
        edges = ((edges * SAFE_LEVELS).floor() / (SAFE_LEVELS - 1)).clamp(max=1.0)
    values = (edges[0] * 255.0).cpu().numpy().astype(np.uint8)
    return PIL.Image.fromarray(values).convert("RGB")
