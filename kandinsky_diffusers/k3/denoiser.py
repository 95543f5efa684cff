"""What UNet and ControlNet of Kandinsky 3.x share: how they take time and text, and how their attention runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3AttentionBlock as StockKandinsky3AttentionBlock

from ..attention import (
    MASKING_BACKENDS,
    DispatchedAttnProcessor,
    enable_xformers,
    keeps_context,
    tokens_for,
    use_dispatched_attention,
)
from ..components import parts_of, view_as, what_fixes_forward
from ..context_cache import ContextCache, fill_cache
from ..inputs import check_choice


Read = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # what was pooled of a context, context and mask

STOCK_MASKED_SCORE = -10000.0  # what stock adds to the score of a token that is not attended to


class Kandinsky3AttentionBlock(StockKandinsky3AttentionBlock):
    """[`StockKandinsky3AttentionBlock`], of which the context may be a cache ([`ContextCache`]).

    What the cache has for this block is looked up before the block is entered: so the code of a compiled block is the
    same for all blocks, and for all steps.
    """

    def __call__(
        self, x: torch.Tensor, time_embed: torch.Tensor, context: Any = None, *masks: Any, **named_masks: Any
    ) -> torch.Tensor:
        """As in stock; a `context` may be a cache."""
        return super().__call__(x, time_embed, tokens_for(self.attention, context), *masks, **named_masks)


class InPlaceSiLU(torch.nn.SiLU):
    """[`torch.nn.SiLU`] that overwrites its input unless gradients are needed.

    Between the two convolutions after an attention a picture has four times its channels; that it is there twice would
    be the most memory that a step needs.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input * sigmoid(input)`."""
        return F.silu(input, inplace=not torch.is_grad_enabled())


class DenoiserMixin:
    """Mixed in before a model with `time_proj`, `time_embedding`, `add_time_condition` and `down_blocks`."""

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Kandinsky3AttentionBlock", "Kandinsky3AttentionPooling", "Kandinsky3ResNetBlock"]
    # not the attention block, whose context has another length for each prompt
    _repeated_blocks: ClassVar = ["Kandinsky3ConditionalGroupNorm", "Kandinsky3ResNetBlock"]

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def _use_own_attention(self) -> None:
        """Processors that run on the chosen backend, and blocks that a cache can be given to."""
        model: Any = self
        use_dispatched_attention(model)
        _replace_parts(model, StockKandinsky3AttentionBlock, Kandinsky3AttentionBlock)
        for _, _, block in parts_of(model, Kandinsky3AttentionBlock):
            _replace_parts(block.feed_forward, torch.nn.SiLU, InPlaceSiLU)

    @property
    def supports_context_cache(self) -> bool:
        """Whether a cache can be used.

        It cannot with attention processors other than ours, nor where blocks were hooked or compiled before the model
        became ours.
        """
        model: Any = self
        return keeps_context(model) and not parts_of(model, StockKandinsky3AttentionBlock)

    def set_default_attn_processor(self) -> None:
        """Go back to the attention processors that the model is built with."""
        self.set_attn_processor(DispatchedAttnProcessor())

    def set_attention_backend(self, backend: str) -> None:
        """As diffusers does, but a backend that cannot take masks, which the text needs, is refused at once.

        Raises:
            ValueError: `backend` cannot take the masks of this model, or is unknown.
        """
        check_choice("backend", backend.lower(), [name.value for name in MASKING_BACKENDS])
        super().set_attention_backend(backend)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Run attention on xformers, or no longer; here because `enable_xformers...` of diffusers comes down to it.

        Raises:
            ValueError: `attention_op` is given; xformers chooses the operator here.
            ModuleNotFoundError, ValueError: xformers or a CUDA device is missing.
        """
        if attention_op is not None:
            raise ValueError(f"`attention_op` is {attention_op!r}; accepted is None, xformers chooses the operator.")
        model: Any = self
        if valid:
            enable_xformers(model)
        else:
            model.reset_attention_backend()

    def _embed_time(self, timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        return self.time_embedding(self.time_proj(timesteps).to(sample.dtype))

    def _fill(self, cache: ContextCache | None, read: Callable[[], Read]) -> None:
        """Let the cache have all that a forward would leave there."""
        self._read_once(cache, read)
        fill_cache(cache, cross_attentions(self).values())

    def _read_once(self, cache: ContextCache | None, read: Callable[[], Read]) -> tuple[torch.Tensor, Any, Any]:
        """What `read` returns, or what the cache has kept of it; the cache then is in the place of the context."""
        if cache is None:
            return read()
        pooled, context, mask = cache.keep("read", read)
        return pooled, cache.in_place_of(context), mask

    def _pool(self, context: torch.Tensor, mask: torch.Tensor | None, lengths: torch.Tensor | None) -> torch.Tensor:
        """What attention, with the mean of the context as its query, finds in the context, for the time embedding."""
        query = context.mean(dim=1, keepdim=True) if lengths is None else _mean_of_first(context, lengths)
        return self.add_time_condition.attention(query, context, mask).squeeze(1)

    def _run(self, block: torch.nn.Module, *inputs: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _check_size(self, sample: torch.Tensor, halvings: int) -> None:
        multiple = 2**halvings
        if sample.shape[-2] % multiple or sample.shape[-1] % multiple:
            raise ValueError(
                f"`sample` is {sample.shape[-2]} latents high and {sample.shape[-1]} wide; accepted are multiples of "
                f"{multiple}."
            )


def cross_attentions(model: Any) -> dict[str, Any]:
    """The [`Attention`] layers that attend to the text, by their paths; without self-attention and the pooling.

    Args:
        model: UNet, or ControlNet, which has no way up.
    """
    return {
        f"{side}.{level}.attentions.{index}.attention": layer.attention
        for side in ("down_blocks", "up_blocks")
        for level, block in enumerate(getattr(model, side, ()))
        for index, layer in enumerate(block.attentions)
        if index > 0 and block.context_dim is not None
    }


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype, as_original: bool) -> torch.Tensor | None:
    """`[batch, 1, tokens]`, to be added to the scores, from a mask `[batch, tokens]` with 1 at tokens.

    The two ways differ where nothing at all is attended to: stock's is then the softmax of the scores, the original's
    the mean of the values.
    """
    if mask is None:
        return None
    if not as_original:
        return ((1 - mask.to(dtype)) * STOCK_MASKED_SCORE).unsqueeze(1)
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == 0, lowest).unsqueeze(1)


def _replace_parts(model: torch.nn.Module, stock: type[torch.nn.Module], better: type[torch.nn.Module]) -> None:
    for parent, name, part in parts_of(model, stock):
        if what_fixes_forward(part, better) is None:
            setattr(parent, name, view_as(part, better))


def _mean_of_first(context: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`[batch, 1, width]`, the mean of the first `lengths` `[batch]` rows of each sample."""
    lengths = lengths.to(context.device)[:, None, None]
    rows = torch.arange(context.shape[1], device=context.device)[None, :, None]
    return context.masked_fill(rows >= lengths, 0.0).sum(dim=1, keepdim=True) / lengths.to(context.dtype)
