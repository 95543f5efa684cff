"""Regional prompting with Kandinsky 3.x: other prompts for parts of the picture.

Each cross-attention of the UNet attends to the prompt of the whole picture and to that of each region, and puts the
results together as the masks say. (The idea is that of kandinsky3_regional_prompting_pipeline.py in the
diffusers-based code base of 3.1, where the mask of the first region has no effect.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from .. import sampling
from ..attention import set_text_processor, text_processor
from ..context_cache import KeyValue
from ..decoding import Batch, Call, Conditions
from ..images import Images, pad_to, shares_from
from ..inpainting import Crop
from ..inputs import as_prompts, check_share
from .denoiser import cross_attentions
from .text import TextInputs, fitted


@dataclass(frozen=True)
class Region:
    """A part of the picture, and what is to be there.

    Args:
        prompt: one for all pictures, or one for each prompt of the call.
        mask: white or 1 where `prompt` counts, black or 0 where it does not, grey for something between; one for all
            pictures, or one for each prompt or picture. Resized to the picture.
        negative_prompt: None for that of the call.
        prompt_embeds: states instead of a prompt, with `attention_mask`; as for the call.
        attention_mask: `[prompts, tokens]`.
        negative_prompt_embeds: states instead of a negative prompt, with `negative_attention_mask`.
        negative_attention_mask: `[prompts, tokens]`.
    """

    prompt: str | list[str] | None
    mask: Images
    negative_prompt: str | list[str] | None = None
    prompt_embeds: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    negative_attention_mask: torch.Tensor | None = None


Regions = Sequence[Region | tuple[str, Images]]

NEGATIVES = ("negative_prompt", "negative_prompt_embeds", "negative_attention_mask")


@dataclass(frozen=True)
class RegionInputs:
    """A region, checked.

    Args:
        text: its prompts, with the negative ones of the call where it has none of its own.
        shares: `[1 or prompts or pictures, 1, h, w]` in [0, 1], 1 where its prompt counts; of several sizes together.
    """

    text: TextInputs
    shares: Sequence[torch.Tensor]

    def masks(self, size: tuple[int, int]) -> torch.Tensor:
        """Its shares of a picture of `size`, `[1 or prompts or pictures, 1, height, width]`."""
        return torch.cat([F.interpolate(share, size, mode="nearest-exact") for share in self.shares])

    def inside(self, crop: Crop) -> RegionInputs:
        """It in the part of the picture that is painted."""
        return replace(self, shares=[crop.cut_out(self.masks(crop.whole_size))])


def regions_from(regions: Regions | None, text: TextInputs, batch: Batch) -> list[RegionInputs]:
    """The regions among the arguments of a call; none for None.

    Args:
        regions: the argument.
        text: prompts of the call.
        batch: of the call.

    Raises:
        TypeError: it is no sequence, or an item is neither a [`Region`] nor a pair of prompt and mask.
        ValueError: there is none, or texts or masks are others than accepted; the argument is named.
    """
    if regions is None:
        return []
    if not isinstance(regions, (list, tuple)):
        raise TypeError(f"`regions` is a {type(regions).__name__}; accepted is a list of (prompt, mask).")
    if not regions:
        raise ValueError("`regions` is empty; accepted is a list of (prompt, mask), or None.")
    return [_checked(_as_region(item), f"regions[{index}]", text, batch) for index, item in enumerate(regions)]


def _as_region(item: Any) -> Region:
    if isinstance(item, Region):
        return item
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        raise TypeError(f"`regions` has a {type(item).__name__}: {item!r}; accepted is (prompt, mask), or a `Region`.")
    return Region(*item)


def _checked(region: Region, name: str, text: TextInputs, batch: Batch) -> RegionInputs:
    shares = shares_from(region.mask, f"{name}.mask")
    batch.expand(torch.cat([share[:, 0, 0, 0] for share in shares]), f"{name}.mask")
    try:
        own = _text_of(region, text)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{name}`: {error}") from error
    if own.count not in (1, text.count):
        raise ValueError(f"`{name}` has {own.count} prompts; accepted is 1, or one for each of {text.count} prompts.")
    return RegionInputs(own, shares)


def _text_of(region: Region, text: TextInputs) -> TextInputs:
    has_negative = any(getattr(region, name) is not None for name in NEGATIVES)
    negatives = {name: getattr(region if has_negative else text, name) for name in NEGATIVES}
    prompt, embeds, mask = region.prompt, region.prompt_embeds, region.attention_mask
    rows = next((len(value) for value in negatives.values() if value is not None and not isinstance(value, str)), 1)
    if prompt is not None and len(as_prompts(prompt)) == 1:
        prompt = as_prompts(prompt) * rows
    elif embeds is not None and mask is not None and len(embeds) == 1:
        embeds, mask = embeds.expand(rows, -1, -1), mask.expand(rows, -1)
    return TextInputs(prompt=prompt, prompt_embeds=embeds, attention_mask=mask, **negatives)


@dataclass(frozen=True)
class RegionalAttention:
    """How the cross-attentions of one call put the results of the regions together.

    Args:
        tokens: number of tokens of each region, which lie after those of the whole picture.
        shares: of each region, by the number of positions of a level, `[rows or 1, positions, 1]`: 1 where its prompt
            counts.
        base_ratio: share of the whole picture's prompt inside of regions.
    """

    tokens: int
    shares: Sequence[Mapping[int, torch.Tensor]]
    base_ratio: float

    @contextmanager
    def applied_to(self, unet: Any) -> Iterator[None]:
        """Let the cross-attentions of a UNet do so, and afterwards what they did before."""
        layers = cross_attentions(unet).values()
        before = [text_processor(layer) for layer in layers]
        try:
            for layer, processor in zip(layers, before, strict=True):
                set_text_processor(layer, RegionalAttnProcessor(self, processor))
            yield
        finally:
            for layer, processor in zip(layers, before, strict=True):
                set_text_processor(layer, processor)


class RegionalAttnProcessor:
    """Attends to the tokens of the whole picture and of each region, and paints region over region.

    Args:
        regional: the regions.
        processor: attends to one of them.
    """

    def __init__(self, regional: RegionalAttention, processor: Any):
        self.regional = regional
        self.processor = processor

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | KeyValue,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Attend.

        Args:
            attn: the layer with the weights.
            hidden_states: `[rows, positions, width]`.
            encoder_hidden_states: `[rows, tokens, context width]`, those of the regions last, or what [`project`] has
                made of them.
            attention_mask: `[rows, 1, tokens]`, added to the scores.
        """
        regional = self.regional
        tokens = [regional.tokens] * len(regional.shares)
        tokens.insert(0, encoder_hidden_states.shape[1] - sum(tokens))
        contexts, masks = encoder_hidden_states.split(tokens, dim=1), attention_mask.split(tokens, dim=2)
        attended = [
            self.processor(attn, hidden_states, context, attention_mask=mask)
            for context, mask in zip(contexts, masks, strict=True)
        ]
        base, *of_regions = attended
        output = base
        for shares, own in zip(regional.shares, of_regions, strict=True):
            share = shares[hidden_states.shape[1]][-len(own) :]  # of the conditional half, where it runs alone
            output = torch.lerp(output, own, share.to(own))
        return torch.lerp(output, base, regional.base_ratio)

    def project(self, attn: Attention, tokens: torch.Tensor) -> KeyValue:
        """Keys and values of all tokens, which are as good apart as the tokens are."""
        return self.processor.project(attn, tokens)


def shares_of(masks: torch.Tensor, latent_size: tuple[int, int], pixels: int, levels: int) -> dict[int, torch.Tensor]:
    """Masks at the size of each level of the UNet, by its number of positions: `[rows, positions, 1]`.

    Args:
        masks: `[rows, 1, height, width]`, of the picture's size.
        latent_size: height and width of the latents.
        pixels: per latent.
        levels: number of levels, each of half the size.
    """
    height, width = latent_size
    masks = pad_to(masks, height * pixels, width * pixels)
    sizes = [(height // 2**level, width // 2**level) for level in range(levels)]
    return {
        rows * columns: F.interpolate(masks, (rows, columns), mode="nearest-exact").flatten(2).transpose(1, 2)
        for rows, columns in sizes
    }


class RegionsMixin:
    """Mixed in before the 3.x pipeline: the arguments `regions` and `regional_base_ratio`."""

    def _with_regions(self, call: Call) -> Call:
        """A call with its regions checked."""
        check_share("regional_base_ratio", call["regional_base_ratio"])
        regions = regions_from(call["regions"], call.text, call.batch)
        for region in regions:
            self._check_text(region.text)
        return replace(call, regions=regions)

    def _regional_conditions(self, call: Call, device: torch.device) -> Conditions:
        """Contexts of the regions in a row, all filled up to the longest."""
        if not call.regions:
            return {}
        images = call.batch.images
        contexts = [self._context(self._states_of(region.text, images, device), images) for region in call.regions]
        tokens = max(context["context_mask"].shape[1] for context in contexts)
        return {
            f"regional_{name}": torch.cat([fitted(context[name], tokens) for context in contexts], dim=1)
            for name in ("context", "context_mask")
        }

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Conditions,
        call: Call,
        on_step_end: sampling.OnStepEnd | None,
    ) -> torch.Tensor:
        regional = self._regional_attention(latents, conditions, call)
        with nullcontext() if regional is None else regional.applied_to(self.unet):
            return super()._denoise(latents, timesteps, conditions, call, on_step_end)

    def _regional_attention(
        self, latents: torch.Tensor, conditions: Conditions, call: Call
    ) -> RegionalAttention | None:
        if not call.regions:
            return None
        levels, halves = len(self.unet.config.block_out_channels), self._halves(latents, conditions)
        size = (latents.shape[-2], latents.shape[-1])
        masks = [call.batch.expand(region.masks(call.batch.size).to(latents), "regions") for region in call.regions]
        shares = [shares_of(torch.cat([mask] * halves), size, self.movq_scale_factor, levels) for mask in masks]
        tokens = conditions["regional_context_mask"].shape[1] // len(shares)
        return RegionalAttention(tokens, shares, call["regional_base_ratio"])
