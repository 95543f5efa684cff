"""Models with fewer layers than those of the tiny releases, for what takes long with each layer, as tracing does."""

from __future__ import annotations

from typing import Any


def shallow(unet: Any) -> Any:
    """A UNet of 2.x like `unet`, with random weights, of its first and its last level, with one layer each."""
    config = unet.config
    ends = {"down_block_types": config.down_block_types, "up_block_types": config.up_block_types}
    changed = {name: (blocks[0], blocks[-1]) for name, blocks in ends.items()}
    channels = (config.block_out_channels[0], config.block_out_channels[-1])
    return type(unet).from_config({**config, **changed, "block_out_channels": channels, "layers_per_block": 1}).eval()
