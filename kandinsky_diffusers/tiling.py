"""Tiles of latents or pictures, for networks that must not see all at once: MoVQ, and the refiner of KandiSuperRes."""

from __future__ import annotations

from collections.abc import Callable

import torch


def apply_in_tiles(
    function: Callable[[torch.Tensor], torch.Tensor],
    samples: torch.Tensor,
    side: int,
    stride: int,
    scale: float = 1.0,
    smallest: int = 1,
) -> torch.Tensor:
    """`function` of each tile, row by row, every result fading linearly into those to its right and below it.

    (`tiled_encode` and `tiled_decode` in KandiSuperRes/movq.py of the original, `refine_tiled` in its
    KandiSuperRes/model/diffusion_refine.py; each tile fades into what has been faded already.)

    Args:
        function: from a tile `[batch, channels, side, side]`, smaller at the right and lower border, to one of `scale`
            times its size.
        samples: `[batch, channels, height, width]`.
        side: of a tile.
        stride: from one tile to the next, at most `side`; what is left of `side` fades.
        scale: of the result.
        smallest: side of the smallest rest at a border that `function` takes; a smaller one is left out.

    Returns:
        `[batch, channels, scale * height, scale * width]`, on the device on which `function` leaves its results.
    """
    kept, fading = int(stride * scale), int((side - stride) * scale)
    tops, lefts = (range(0, max(size - smallest + 1, 1), stride) for size in samples.shape[-2:])
    rows: list[torch.Tensor] = []
    above: list[torch.Tensor] = []
    for top in tops:
        row: list[torch.Tensor] = []
        for left in lefts:
            tile = function(samples[..., top : top + side, left : left + side])
            if above:
                tile = _fade(above[len(row)], tile, fading, dim=-2)
            if row:
                tile = _fade(row[-1], tile, fading, dim=-1)
            row.append(tile)
        rows.append(torch.cat([tile[..., :kept, :kept] for tile in row], dim=-1))
        above = row
    return torch.cat(rows, dim=-2)


def _fade(before: torch.Tensor, tile: torch.Tensor, extent: int, dim: int) -> torch.Tensor:
    """`tile`, its beginning along `dim` faded in over the end of the tile before it."""
    extent = min(extent, before.shape[dim], tile.shape[dim])
    weight = torch.arange(extent, device=tile.device, dtype=tile.dtype) / max(extent, 1)
    weight = weight.view(-1, *[1] * (-1 - dim))
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    beginning, rest = tile.split([extent, tile.shape[dim] - extent], dim)
    return torch.cat([end * (1 - weight) + beginning * weight, rest], dim)
