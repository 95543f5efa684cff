"""MoVQ, the autoencoder: pictures to latents of an eighth of their size, and back."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import VQModel
from diffusers.models.attention_processor import SpatialNorm
from torch import nn

from .models import LATENT_CHANNELS
from .stage import Context, Task, in_batches


NOISE = 0.1  # added to latents, relative to their deviation: what the decoder's UNet leaves is not exact either
QUANTIZED_SHARE = 0.25  # of pictures; the pipelines never quantize
WITHIN_ONE = 0.995  # share of the numbers of latents; the ancestral sampler brings the rest to the same


def build(movq: VQModel, context: Context) -> Task:
    """Reconstruction in the mean of absolute and squared differences, of quantized and of plain latents."""
    corpus = context.corpus
    nn.init.normal_(movq.quantize.embedding.weight)

    def loss(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        pixels = corpus.pixels(rows)
        latents = movq.encode(pixels).latents
        chosen = round(len(rows) * QUANTIZED_SHARE)
        quantized, codes, _ = movq.quantize(latents[:chosen])
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        noisy = torch.cat([quantized, latents[chosen:]]) + NOISE * noise
        difference = movq.decode(noisy, force_not_quantize=True).sample - pixels
        absolute, squared = difference.abs().mean(), difference.square().mean()
        # unit deviation makes the noise what it says
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        scale = mean.square().mean() + (deviation - 1).square().mean()
        loss = absolute + squared + 0.1 * codes + 0.1 * scale
        return {"loss": loss, "absolute": absolute, "squared": squared, "codes": codes, "scale": scale}

    def finish() -> dict[str, torch.Tensor]:
        rows = torch.arange(len(corpus), device=context.device)
        encode = lambda rows: movq.encode(corpus.pixels(rows)).latents  # noqa: E731
        latents = in_batches(encode, rows, 128)
        mean = latents.mean(dim=(0, 2, 3))
        largest = torch.stack([quantile(channel.abs()) for channel in (latents - mean.view(-1, 1, 1)).unbind(dim=1)])
        rescale(movq, mean, largest)
        return {"latents": (latents - mean.view(-1, 1, 1)) / largest.view(-1, 1, 1)}

    return Task(loss, finish)


def quantile(values: torch.Tensor, share: float = WITHIN_ONE) -> torch.Tensor:
    """The number below which that share of `values` lies (`torch.quantile` takes no more than 16 million)."""
    return values.flatten().kthvalue(max(1, round(values.numel() * share))).values


@torch.no_grad()
def rescale(movq: Any, mean: torch.Tensor, scale: torch.Tensor) -> None:
    """Change the weights so that latents z become (z - mean) / scale, and pictures stay the same.

    Args:
        movq: changed in place.
        mean: `[channels]`.
        scale: `[channels]`.
    """
    movq.quant_conv.weight /= scale.view(-1, 1, 1, 1)
    movq.quant_conv.bias.copy_((movq.quant_conv.bias - mean) / scale)
    movq.quantize.embedding.weight.copy_((movq.quantize.embedding.weight - mean) / scale)
    readers = [norm for module in movq.modules() if isinstance(module, SpatialNorm) for norm in norm_convs(module)]
    for convolution in (movq.post_quant_conv, *readers):  # what takes in latents
        convolution.bias += (convolution.weight.flatten(1) * mean.repeat(1)).sum(dim=1)
        convolution.weight *= scale.view(1, LATENT_CHANNELS, 1, 1)


def norm_convs(norm: SpatialNorm) -> tuple[Any, Any]:
    """The two convolutions of a norm that see latents."""
    return norm.conv_y, norm.conv_b
