"""MoVQ, the autoencoder of every Kandinsky from 2.1 on: stock's weights and numbers, and pictures of any size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from diffusers.models.attention_processor import SpatialNorm
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from .components import SavedAsStock, parts_of, view_as
from .tiling import apply_in_tiles


QUANTIZED_AT_ONCE = 4096  # latent pixels whose distances to all codes are held in memory: those of a 512 x 512 picture


class AtLatentSize(NamedTuple):
    """The latents for the norms of a decoder that are to work with them at their own size, see [`LatentSizedNorm`]."""

    latents: torch.Tensor


class LatentSizedNorm(SpatialNorm):
    """[`SpatialNorm`], whose scale and shift are made of the latents before these are stretched to the picture's size.

    Stretching repeats pixels, and a 1 x 1 convolution sees one pixel at a time, so their order does not matter. Up to
    64 times less is convolved, and nothing is stretched: latents are multiplied block by block. Three tensors of the
    picture's size are there at once, in stock five. Given bare latents, it is the stock class.
    """

    def forward(self, f: torch.Tensor, zq: torch.Tensor | AtLatentSize) -> torch.Tensor:
        """`f` `[batch, channels, n * height, n * width]`, normalised, with scale and shift made of `zq`.

        Args:
            f: what is normalised.
            zq: latents `[batch, latent channels, height, width]`.
        """
        if not isinstance(zq, AtLatentSize):
            return super().forward(f, zq)
        normed = self.norm_layer(f)
        # laid out as that is, which need not be as `f` is, for the result is laid out as shift and scale are
        side_by_side = normed.is_contiguous(memory_format=torch.channels_last) and not normed.is_contiguous()
        latents = zq.latents.contiguous(memory_format=torch.channels_last if side_by_side else torch.contiguous_format)
        scale, shift = (conv(latents)[:, :, :, None, :, None] for conv in (self.conv_y, self.conv_b))
        height, width = latents.shape[-2:]
        blocks = normed.unflatten(-1, (width, -1)).unflatten(-3, (height, -1))
        return torch.addcmul(shift, blocks, scale).flatten(-2).flatten(-3, -2)


class MoVQ(SavedAsStock, VQModel):
    """[`VQModel`] with slicing, tiling and group offloading, that decodes in less time and memory than stock.

    What it decodes differs from what stock does in last bits, unless `exact_reference=True`; codes are stock's.

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

    @functools.wraps(VQModel.__init__)  # from_config reads the names of the arguments from it
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_shared_state()

    def _on_shared_state(self) -> None:
        for parent, name, norm in parts_of(self.decoder, SpatialNorm):
            setattr(parent, name, view_as(norm, LatentSizedNorm))

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
        *,
        exact_reference: bool = False,
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Pictures of latents, nominally in [-1, 1], not clipped.

        Args:
            h: `[batch, channels, height, width]`.
            force_not_quantize: decode `h` as it is, not its nearest codes; Kandinsky does.
            return_dict: return a tuple if False.
            shape: of the latents, where `h` are codebook indices.
            exact_reference: compute as stock does, to the last bit.
        """
        if self.config.lookup_from_codebook:
            return super().decode(h, force_not_quantize, return_dict, shape)
        loss: Any = h.new_zeros(len(h))
        if not force_not_quantize:
            h, loss = self._nearest_codes(h)
        decode = self._decode_as_stock if exact_reference or not self._has_latent_sized_norms else self._decode_whole
        sample = self._sliced(partial(self._decode_tiled, decode), h)
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

    @property
    def _has_latent_sized_norms(self) -> bool:
        """Not with other norms, and not with a decoder that was swapped in."""
        return isinstance(self.decoder.conv_norm_out, LatentSizedNorm)

    def _decode_as_stock(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(latents, force_not_quantize=True).sample

    def _decode_whole(self, latents: torch.Tensor) -> torch.Tensor:
        # all but the first layers have channels side by side in any case, since the attention leaves them so
        latents = latents.contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(latents), AtLatentSize(latents))

    def _encode_tiled(self, pixels: torch.Tensor) -> torch.Tensor:
        side = self.tile_sample_min_size // self._scale * self._scale
        height, width = pixels.shape[-2:]
        if not self.use_tiling or max(height, width) <= side:
            return self._encode_whole(pixels)
        # a rest at the border that is narrower than a latent pixel has no latent, tiled or whole
        return apply_in_tiles(self._encode_whole, pixels, side, side, 1 / self._scale, smallest=self._scale)

    def _decode_tiled(self, decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
        side = self.tile_sample_min_size // self._scale
        height, width = latents.shape[-2:]
        if not self.use_tiling or max(height, width) <= side:
            return decode(latents)
        stride = int(side * (1 - self.tile_overlap))
        return apply_in_tiles(decode, latents, side, stride, self._scale)

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
