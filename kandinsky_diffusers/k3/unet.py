"""The UNet of Kandinsky 3.0, 3.1 and Flash, for pictures and for inpainting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3UNet as StockKandinsky3UNet
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3UNetOutput

from ..components import SavedAsStock
from ..context_cache import ContextCache
from ..step_cache import CachesSteps
from .denoiser import DenoiserMixin, Read, additive_mask
from .ip_adapter_unet import IPAdapterUNetMixin


class Kandinsky3UNet(
    IPAdapterUNetMixin, DenoiserMixin, SavedAsStock, CachesSteps, PeftAdapterMixin, StockKandinsky3UNet
):
    """[`diffusers.Kandinsky3UNet`] that can do what the original can, and is the stock class where called like it.

    The original projects the text outside of the UNet, and zeroes what is padding afterwards. So the context is made
    once, and then used at every step:

        context = unet(project=True, encoder_hidden_states=states, encoder_attention_mask=mask)
        for t in scheduler.timesteps:
            prediction = unet(latents, t, context, mask, projected=True).sample

    It can be given LoRA adapters and IP-Adapters, checkpoints gradients, and its attention runs on the chosen backend.

    Args:
        in_channels: 4 for pictures; 9 for inpainting: noisy latents, mask (1 keeps), latents of the masked picture.
        time_embedding_dim: width of the time embedding.
        groups: number of groups of the group norms.
        attention_head_dim: width of an attention head.
        layers_per_block: number of residual blocks on either side of each attention, per level.
        block_out_channels: number of channels of each of the four levels.
        cross_attention_dim: width of the projected text.
        encoder_hid_dim: width of the text encoder's output.
        out_channels: None for `in_channels`, as in stock; 4 for inpainting.
        has_null_embedding: whether there is a parameter `null_embedding` `[cross_attention_dim]`, the context that
            stands for no text. Off by default, because stock repositories have none.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        time_embedding_dim: int = 1536,
        groups: int = 32,
        attention_head_dim: int = 64,
        layers_per_block: int = 3,
        block_out_channels: tuple[int, ...] = (384, 768, 1536, 3072),
        cross_attention_dim: int = 4096,
        encoder_hid_dim: int = 4096,
        out_channels: int | None = None,
        has_null_embedding: bool = False,
    ):
        super().__init__(
            in_channels=in_channels,
            time_embedding_dim=time_embedding_dim,
            groups=groups,
            attention_head_dim=attention_head_dim,
            layers_per_block=layers_per_block,
            block_out_channels=block_out_channels,
            cross_attention_dim=cross_attention_dim,
            encoder_hid_dim=encoder_hid_dim,
        )
        if out_channels not in (None, in_channels):
            self.conv_out = torch.nn.Conv2d(block_out_channels[0] // 2, out_channels, kernel_size=3, padding=1)
        self.null_embedding = torch.nn.Parameter(torch.zeros(cross_attention_dim)) if has_null_embedding else None
        self.image_proj = None
        self._use_own_attention()

    def _on_shared_state(self) -> None:
        # what a stock object cannot have, and its configuration need not know
        self.register_to_config(out_channels=None, has_null_embedding=False)
        self.null_embedding = None
        if not hasattr(self, "image_proj"):  # another view may have loaded IP-Adapters
            self.image_proj = None
        self._use_own_attention()

    @property
    def runs_in_stock(self) -> bool:
        """Whether the stock class can load these weights: it has as many output channels as input channels."""
        return self.config.out_channels in (None, self.config.in_channels)

    def forward(
        self,
        sample: torch.Tensor | None = None,
        timestep: torch.Tensor | float | int | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        project: bool = False,
        projected: bool = False,
        context_lengths: torch.Tensor | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        regional_hidden_states: torch.Tensor | None = None,
        regional_attention_mask: torch.Tensor | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        cache: ContextCache | None = None,
        fill: bool = False,
    ) -> Kandinsky3UNetOutput | tuple[torch.Tensor] | torch.Tensor | None:
        """Predict the noise, or project the text.

        Args:
            sample: `[batch, in_channels, height, width]`, noisy latents; height and width are multiples of 8. Not with
                `project`.
            timestep: a number, or `[batch]` of them. Not with `project`.
            encoder_hidden_states: `[batch, tokens, encoder_hid_dim]`, the text encoder's output; with `projected`, the
                context `[batch, tokens, cross_attention_dim]`.
            encoder_attention_mask: `[batch, tokens]`, 1 at tokens that are attended to; None for all of them.
            return_dict: return a tuple if False.
            project: return the context `[batch, tokens, cross_attention_dim]` of these texts: the projection, and
                zeros where the mask is 0. Without texts, `null_embedding` as `[1, 1, cross_attention_dim]`; offloading
                brings weights in for a call of the model only, not for a look at one of them.
            projected: `encoder_hidden_states` is a context, and masks are as in the original.
            context_lengths: `[batch]` ints; the query that pools the text is the mean of so many first rows of each
                sample's context (the original's context has one row more than the text has tokens). None for all
                rows, as stock has it.
            added_cond_kwargs: with IP-Adapters, `{"image_embeds": [...]}`, one tensor `[batch, width of embeddings]`
                for each.
            regional_hidden_states: `[batch, regional tokens, ...]`, of prompts for parts of the picture, like
                `encoder_hidden_states`. They are not pooled; in the cross-attentions they follow the others, and the
                processors know which token is for which part ([`k3.regions.RegionalAttention`]).
            regional_attention_mask: `[batch, regional tokens]`; both masks are needed then.
            down_block_additional_residuals: what a ControlNet adds to the outputs of all levels but the lowest, as
                the way up sees them: from the first level on `[batch, channels, height, width]`.
            cache: of a call whose conditions are the same at every step, if [`supports_context_cache`]: the first
                forward keeps there what it makes of them, the later ones take it from there.
            fill: fill the cache, and return None. Not where layers are offloaded.

        Raises:
            ValueError: an argument is missing or does not belong there, `sample` has a size that cannot be halved
                often enough, or there are more or fewer residuals than levels.
        """
        if project:
            if sample is not None or timestep is not None or projected:
                raise ValueError("with `project=True`, `sample`, `timestep` and `projected` have no meaning.")
            return self._project(encoder_hidden_states, encoder_attention_mask)
        if sample is None or timestep is None or encoder_hidden_states is None:
            raise ValueError("`sample`, `timestep` and `encoder_hidden_states` are needed, unless `project` is True.")
        self._check_size(sample, len(self.down_blocks) - 1)
        self._check_residuals(down_block_additional_residuals)

        read = partial(
            self._read,
            encoder_hidden_states,
            encoder_attention_mask,
            regional_hidden_states,
            regional_attention_mask,
            projected=projected,
            lengths=context_lengths,
            added=added_cond_kwargs,
            dtype=sample.dtype,
        )
        if fill:
            return self._fill(cache, read)
        pooled, context, mask = self._read_once(cache, read)
        time_embed = self._embed_time(timestep, sample)
        time_embed = time_embed + pooled.to(time_embed.device)
        sample = self._transform(sample, time_embed, context, mask, down_block_additional_residuals)
        if cache is not None:
            cache.filled = True
        return Kandinsky3UNetOutput(sample=sample) if return_dict else (sample,)

    def _read(
        self,
        states: torch.Tensor,
        states_mask: torch.Tensor | None,
        regional: torch.Tensor | None,
        regional_mask: torch.Tensor | None,
        *,
        projected: bool,
        lengths: torch.Tensor | None,
        added: Mapping[str, Any] | None,
        dtype: torch.dtype,
    ) -> Read:
        """All that does not depend on the step: what is pooled, what the cross-attentions read, and its mask."""
        mask = additive_mask(states_mask, dtype, as_original=projected)
        context = states if projected else self.encoder_hid_proj(states)
        pooled = self._pool(context, mask, lengths)
        if regional is not None:
            context = torch.cat([context, regional if projected else self.encoder_hid_proj(regional)], dim=1)
            mask = additive_mask(_joined(states_mask, regional_mask), dtype, as_original=projected)
        return pooled, self._with_image_tokens(context, added), mask

    def _project(self, states: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        if states is None:
            if self.null_embedding is None:
                raise ValueError("`encoder_hidden_states` is None, and this model has no `null_embedding` to return.")
            return self.null_embedding[None, None]
        context = self.encoder_hid_proj(states)
        return context if mask is None else context.masked_fill((mask == 0).unsqueeze(-1), 0.0)

    def _check_residuals(self, residuals: Sequence[torch.Tensor] | None) -> None:
        skips = len(self.down_blocks) - 1
        if residuals is not None and len(residuals) != skips:
            raise ValueError(
                f"`down_block_additional_residuals` has {len(residuals)} items; accepted is one for each of the first"
                f" {skips} levels."
            )

    def _transform(
        self,
        sample: torch.Tensor,
        time_embed: torch.Tensor,
        context: torch.Tensor | ContextCache,
        mask: torch.Tensor | None,
        residuals: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        sample = self.conv_in(sample)
        skips: list[torch.Tensor] = []
        for block in self.down_blocks:
            sample = self._run(block, sample, time_embed, context, mask)
            skips.append(sample)
        skips.pop()  # the lowest level goes straight up
        if residuals is not None:
            skips = [skip + residual.to(skip) for skip, residual in zip(skips, residuals, strict=True)]
        for level, block in enumerate(self.up_blocks):
            if level > 0:
                sample = torch.cat([sample, skips.pop().to(sample.device)], dim=1)
            sample = self._run(block, sample, time_embed, context, mask)
        return self.conv_out(self.conv_act_out(self.conv_norm_out(sample)))


def _joined(mask: torch.Tensor | None, regional_mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None or regional_mask is None:
        raise ValueError(
            "`regional_hidden_states` needs `encoder_attention_mask` and `regional_attention_mask`; one is None."
        )
    return torch.cat([mask, regional_mask], dim=1)
