"""The UNet of Kandinsky 2.1 and 2.2, which computes once in a call what no step changes."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel as StockUNet2DConditionModel

from .attention import attention_layers, keeps_context, use_dispatched_attention
from .components import SavedAsStock, what_fixes_forward
from .context_cache import ContextCache, fill_cache
from .step_cache import CachesSteps


# `encoder_hid_dim_type` and `addition_embed_type` of 2.1, of 2.2, and of 2.2 with a depth map
KINDS = (("text_image_proj", "text_image"), ("image_proj", "image"), ("image_proj", "image_hint"))


class UNet2DConditionModel(SavedAsStock, CachesSteps, StockUNet2DConditionModel):
    """[`diffusers.UNet2DConditionModel`] that can keep what it computes of the conditions alone.

    What prompts, image embeddings and a depth map become, and the keys and values that attention makes of it, look
    the same at every step of a call. With a cache in `added_cond_kwargs`, one for each call, it is computed once:

        added = {"image_embeds": image_embeds, "cache": ContextCache()}
        for t in scheduler.timesteps:
            prediction = unet(latents, t, None, added_cond_kwargs=added).sample

    Without one it is the stock class. The model itself remembers nothing.
    """

    _repeated_blocks: ClassVar = ["ResnetBlock2D"]

    def _on_shared_state(self) -> None:
        use_dispatched_attention(self)

    @classmethod
    def replaces(cls, component: Any) -> bool:
        """Whether it is one of Kandinsky's, and is not offloaded, hooked or compiled already."""
        config = component.config
        kind = config.encoder_hid_dim_type, config.addition_embed_type
        return kind in KINDS and what_fixes_forward(component, cls) is None

    @property
    def supports_context_cache(self) -> bool:
        """Whether a cache can be used; it cannot with attention processors other than the default."""
        return keeps_context(self)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: Any,
        *args: Any,
        added_cond_kwargs: Any = None,
        fill: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in the stock class, with one thing more that `added_cond_kwargs` may have.

        Args:
            sample: as for the stock class.
            timestep: likewise.
            encoder_hidden_states: likewise.
            args: likewise.
            added_cond_kwargs: the conditions, and as `cache` a [`ContextCache`], if [`supports_context_cache`].
            fill: fill the cache, and return None. Not where layers are offloaded.
            kwargs: as for the stock class.

        Raises:
            ValueError: with `fill` there is no cache.
        """
        cache = _cache_in(added_cond_kwargs)
        if fill:
            self.get_aug_embed(None, encoder_hidden_states, added_cond_kwargs)
            self.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)
            return fill_cache(cache, attention_layers(self))
        output = super().forward(
            sample, timestep, encoder_hidden_states, *args, added_cond_kwargs=added_cond_kwargs, **kwargs
        )
        if cache is not None:
            cache.filled = True
        return output

    def get_aug_embed(self, emb: Any, encoder_hidden_states: Any, added_cond_kwargs: Any) -> Any:
        """What the conditions add to the time embedding, and what is made of a depth map; kept by the cache."""
        cache = _cache_in(added_cond_kwargs)
        make = partial(self._embed_conditions, emb, encoder_hidden_states, added_cond_kwargs)
        return make() if cache is None else cache.keep("added embedding", make)

    def process_encoder_hidden_states(
        self, encoder_hidden_states: torch.Tensor, added_cond_kwargs: dict[str, Any]
    ) -> Any:
        """What the attentions read, `[batch, tokens, cross_attention_dim]`, or the cache that keeps what they make."""
        cache = _cache_in(added_cond_kwargs)
        make = partial(self._read_conditions, encoder_hidden_states, added_cond_kwargs)
        return make() if cache is None else cache.in_place_of(cache.keep("context", make))

    def _embed_conditions(
        self, emb: Any, encoder_hidden_states: torch.Tensor, added_cond_kwargs: dict[str, Any]
    ) -> Any:
        return super().get_aug_embed(emb, encoder_hidden_states, added_cond_kwargs)

    def _read_conditions(self, encoder_hidden_states: torch.Tensor, added_cond_kwargs: dict[str, Any]) -> torch.Tensor:
        return super().process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)


def _cache_in(added_cond_kwargs: dict[str, Any] | None) -> ContextCache | None:
    return (added_cond_kwargs or {}).get("cache")
