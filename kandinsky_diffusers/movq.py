"""MoVQ, the autoencoder of every Kandinsky from 2.1 on: stock's weights and numbers, and pictures of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from .components import SavedAsStock
from .tiling import apply_in_tiles


QUANTIZED_AT_ONCE = 4096  # latent pixels whose distances to all codes are held in memory: those of a 512 x 512 picture


class MoVQ(SavedAsStock, VQModel):
    """[`VQModel`] with slicing, tiling and group offloading; otherwise it computes exactly what stock does.

    Tiling follows KandiSuperRes: pictures are encoded in tiles that do not overlap, and decoded in tiles that do, the
    overlap fading linearly from one tile into the next. Models whose decoder takes codebook indices
    (`lookup_from_codebook`) decode whole.
    """

    _supports_group_offloading = True
    # everything that `encode` and `decode` call, since the hooks of offloading sit there; `embedding` is in `quantize`
    _group_offload_block_modules = ("encoder", "quant_conv", "quantize", "embedding", "post_quant_conv", "decoder")

    _repeated_blocks = ("ResnetBlock2D", "ResnetBlockCondNorm2D")

    use_slicing = False
    use_tiling = False
    tile_sample_min_size = 1024
    tile_overlap = 0.25

    def enable_tiling(self, tile_sample_min_size: int = 1024, overlap: float = 0.25) -> None:
        """Work on one tile at a time where height or width exceeds a tile, so that memory does not grow with the size.

        Args:
            tile_sample_min_size: side of a tile in pixels; rounded down to what the model can encode.
            overlap: share of a tile that fades into its neighbour when decoding, at least 0 and below 1.

        Raises:
            ValueError: a tile has no latent pixel, or nothing of it is left beside the overlap.
        """
        side = tile_sample_min_size // self._scale
        if side < 1:
            raise ValueError(f"`tile_sample_min_size` is {tile_sample_min_size}; accepted is at least {self._scale}.")
        if not 0 <= overlap < 1 or int(side * (1 - overlap)) < 1:
            raise ValueError(
                f"`overlap` is {overlap}; accepted is at least 0 and below 1, with one of the {side} latent pixels of "
                "a tile left."
            )
        self.tile_sample_min_size, self.tile_overlap = tile_sample_min_size, overlap
        super().enable_tiling()

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor]:
        """Latents of pictures.

        Args:
            x: `[batch, channels, height, width]` in [-1, 1].
            return_dict: return a tuple if False.
        """
        latents = self._sliced(self._encode_tiled, x)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Pictures of latents, nominally in [-1, 1], not clipped.

        Args:
            h: `[batch, channels, height, width]`.
            force_not_quantize: decode `h` as it is, not its nearest codes; Kandinsky does.
            return_dict: return a tuple if False.
            shape: of the latents, where `h` are codebook indices.
        """
        if self.config.lookup_from_codebook:
            return super().decode(h, force_not_quantize, return_dict, shape)
        loss: Any = h.new_zeros(len(h))
        if not force_not_quantize:
            h, loss = self._nearest_codes(h)
        sample = self._sliced(self._decode_tiled, h)
        return DecoderOutput(sample=sample, commit_loss=loss) if return_dict else (sample, loss)

    @property
    def _scale(self) -> int:
        return pixels_per_latent(self)

    def _sliced(self, function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        if not self.use_slicing or len(batch) == 1:
            return function(batch)
        return torch.cat([function(one) for one in batch.split(1)])

    def _encode_whole(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode(pixels).latents

    def _decode_whole(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(latents, force_not_quantize=True).sample

    def _encode_tiled(self, pixels: torch.Tensor) -> torch.Tensor:
        side = self.tile_sample_min_size // self._scale * self._scale
        height, width = pixels.shape[-2:]
        if not self.use_tiling or max(height, width) <= side:
            return self._encode_whole(pixels)
        # a rest at the border that is narrower than a latent pixel has no latent, tiled or whole
        return apply_in_tiles(self._encode_whole, pixels, side, side, 1 / self._scale, smallest=self._scale)

    def _decode_tiled(self, latents: torch.Tensor) -> torch.Tensor:
        side = self.tile_sample_min_size // self._scale
        height, width = latents.shape[-2:]
        if not self.use_tiling or max(height, width) <= side:
            return self._decode_whole(latents)
        stride = int(side * (1 - self.tile_overlap))
        return apply_in_tiles(self._decode_whole, latents, side, stride, self._scale)

    def _nearest_codes(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What [`VectorQuantizer`] computes, in bounded memory.

        The codebook is read by calling the embedding: offloading brings weights in for a call, and stock's quantiser
        reads them without one.
        """
        codes = self.quantize.embedding(torch.arange(self.quantize.n_e, device=latents.device))
        pixels = latents.permute(0, 2, 3, 1).flatten(0, 2)
        nearest = [torch.cdist(some, codes).argmin(dim=1) for some in pixels.split(QUANTIZED_AT_ONCE)]
        chosen = codes[torch.cat(nearest)]
        loss = F.mse_loss(chosen.detach(), pixels) + self.quantize.beta * F.mse_loss(chosen, pixels.detach())
        quantized = pixels + (chosen - pixels).detach()  # gradients pass straight through
        batch, channels, height, width = latents.shape
        return quantized.view(batch, height, width, channels).permute(0, 3, 1, 2).contiguous(), loss


def pixels_per_latent(movq: VQModel | AutoencoderKL | None) -> int:
    """Side of a latent pixel in pixels; 8, as published, for a pipeline that was built without a MoVQ."""
    return 8 if movq is None else 2 ** (len(movq.config.block_out_channels) - 1)
