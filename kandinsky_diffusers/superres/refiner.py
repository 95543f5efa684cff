"""How KandiSuperRes Flash redraws fine detail: one step of Kandinsky 3.1 Flash on the latents, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import sampling
from ..movq import MoVQ, pixels_per_latent
from ..running import RunningCall
from ..tiling import apply_in_tiles


TILE, STRIDE = 352, 264  # latents


class Refiner:
    """The second half of the Flash pipeline (`refine_tiled` in KandiSuperRes/model/diffusion_refine.py).

    Tiles go to `device` one at a time, and back to where the pixels are.

    Args:
        movq: between pixels and latents; it works in tiles of its settings, enabled or not.
        unet: predicts the noise.
        scheduler: its timesteps say how much is redrawn.
        context: what the UNet reads in the place of a text.
        device: where the models run.
        generator: for the noise, drawn for each tile.
        decoding: what else `decode` of the MoVQ is told.
    """

    def __init__(
        self,
        movq: MoVQ,
        unet: Any,
        scheduler: Any,
        context: Any,
        device: torch.device,
        generator: Any = None,
        decoding: Mapping[str, Any] | None = None,
    ):
        self.movq, self.unet, self.scheduler, self.context = movq, unet, scheduler, context
        self.device, self.generator, self.decoding = device, generator, decoding or {}
        self._pixels_per_latent = pixels_per_latent(movq)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of `pixels` `[1, 3, height, width]` around [-1, 1]; tiles do not overlap."""

        def encoded(tile: torch.Tensor) -> torch.Tensor:
            return self.movq.encode(tile.to(self.device, self.movq.dtype)).latents.to(pixels)

        scale = self._pixels_per_latent
        side = self.movq.tile_sample_min_size // scale * scale
        return apply_in_tiles(encoded, pixels, side, side, 1 / scale)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels of `latents` `[1, 4, height, width]`; tiles overlap where there are several."""

        def decoded(tile: torch.Tensor) -> torch.Tensor:
            tile = tile.to(self.device, self.movq.dtype)
            return self.movq.decode(tile, force_not_quantize=True, **self.decoding).sample.to(latents)

        side = self.movq.tile_sample_min_size // self._pixels_per_latent
        overlap = self.movq.tile_overlap if max(latents.shape[-2:]) > side else 0
        return apply_in_tiles(decoded, latents, side, int(side * (1 - overlap)), self._pixels_per_latent)

    def redraw(self, latents: torch.Tensor) -> torch.Tensor:
        """`latents` noised to the scheduler's first timestep and denoised again, in overlapping tiles."""
        context, mask = (part.to(self.device) for part in self.context(1))
        context = context.to(self.unet.dtype)
        self.scheduler.set_timesteps()  # on the host, see `RunningCall`
        running = RunningCall(self.scheduler.timesteps, self.device, watched=False)
        conditions = {
            "encoder_hidden_states": context,
            "encoder_attention_mask": mask,
            "projected": True,
            "cache": running.context_cache(self.unet, [context, mask]),  # all tiles have the same
        }
        return apply_in_tiles(lambda tile: self._redraw_tile(tile, running, conditions), latents, TILE, STRIDE)

    def _redraw_tile(self, tile: torch.Tensor, running: RunningCall, conditions: dict[str, Any]) -> torch.Tensor:
        def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.unet(sample.to(self.unet.dtype), timestep, return_dict=False, **conditions)[0].to(sample)

        def step(prediction: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
            return self.scheduler.step(prediction, running.on_host(timestep), sample, self.generator).prev_sample

        self.scheduler.set_timesteps()
        start = self.scheduler.noised_start(tile.to(self.device), self.generator)
        return sampling.denoise(start, running.timesteps, predict, lambda prediction: prediction, step).to(tile)
