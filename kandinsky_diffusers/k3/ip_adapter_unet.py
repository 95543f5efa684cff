"""IP-Adapters inside the UNet: where their weights go, and how they are taken out again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection
from diffusers.utils import logging

from ..attention import ImageAttention, IPAdapterAttnProcessor
from .denoiser import cross_attentions


logger = logging.get_logger(__name__)

Weights = Mapping[str, torch.Tensor]
LayerSizes = Mapping[str, tuple[int, int]]

PROJECTION, LAYERS = "image_proj", "ip_adapter"  # as in the published IP-Adapters of diffusers
_SHOWN = 3  # wrong keys in a message


class IPAdapterUNetMixin:
    """Mixed into the UNet of 3.x: adapters in its cross-attentions, which see pictures beside the text.

    `image_proj` makes tokens of the pictures' embeddings, one projection for each adapter; it is None without any.
    """

    image_proj: torch.nn.ModuleList | None

    @property
    def ip_adapter_widths(self) -> list[int]:
        """Width of the image embeddings that each loaded adapter takes."""
        projections: Any = self.image_proj or ()
        return [projection.image_embeds.in_features for projection in projections]

    def load_ip_adapters(self, weights: Sequence[Weights]) -> None:
        """Put adapters into the cross-attentions, in the place of those that were there, with a scale of 1.

        Nothing is changed unless all of them fit.

        Args:
            weights: of each adapter, under the keys of [`IPAdapter.shapes`].

        Raises:
            ValueError: keys are missing or unknown, or tensors have other shapes than this UNet needs.
        """
        sizes, width = layer_sizes(self), self.config.cross_attention_dim
        adapters = [IPAdapter.from_weights(own, sizes, width).to(self.device, self.dtype) for own in weights]
        self.unload_ip_adapters()
        self.image_proj = torch.nn.ModuleList(adapter.projection for adapter in adapters)
        counts = [adapter.projection.num_image_text_embeds for adapter in adapters]
        for name, layer in cross_attentions(self).items():
            parts = [adapter.layers[name] for adapter in adapters]
            layer.set_processor(IPAdapterAttnProcessor(layer.processor, parts, counts, [1.0] * len(counts)))

    def unload_ip_adapters(self) -> None:
        """Take all adapters out; the processors for the text stay."""
        for layer, processor in self._adapted_layers():
            layer.set_processor(processor.text)
        del self.image_proj
        self.image_proj = None

    def set_ip_adapter_scale(self, scale: Sequence[float]) -> None:
        """How much each adapter counts; one number for each.

        Raises:
            ValueError: there are more or fewer adapters.
        """
        count = len(self.ip_adapter_widths)
        if len(scale) != count:
            raise ValueError(f"`scale` has {len(scale)} items; accepted is one for each of {count} IP-Adapters.")
        for _, processor in self._adapted_layers():
            processor.scale = list(scale)

    def set_attn_processor(self, processor: Any) -> None:
        """As diffusers does; adapters stay, and a layer that has any attends to the text with the new processor."""
        adapted = self._adapted_layers()
        super().set_attn_processor(processor)
        for layer, adapters in adapted:
            if not isinstance(layer.processor, IPAdapterAttnProcessor):
                layer.set_processor(adapters.with_text(layer.processor))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """As diffusers does; loaded IP-Adapters are not part of the model, and are left out."""
        if self.image_proj is not None:
            logger.warning("The UNet is saved without its IP-Adapters; `load_ip_adapter` brings them back.")
        with self._without_ip_adapters():
            super().save_pretrained(
                save_directory,
                is_main_process,
                save_function,
                safe_serialization,
                variant,
                max_shard_size,
                push_to_hub,
                use_flashpack,  # all named, for pipelines look for them in the signature
                **kwargs,
            )

    @contextmanager
    def _without_ip_adapters(self) -> Iterator[None]:
        adapted, image_proj = self._adapted_layers(), self.image_proj
        self.unload_ip_adapters()
        try:
            yield
        finally:
            for layer, processor in adapted:
                layer.set_processor(processor)
            self.image_proj = image_proj

    def _adapted_layers(self) -> list[tuple[Any, IPAdapterAttnProcessor]]:
        layers = cross_attentions(self).values()
        return [(layer, layer.processor) for layer in layers if isinstance(layer.processor, IPAdapterAttnProcessor)]

    def _with_image_tokens(self, context: torch.Tensor, added: Mapping[str, Any] | None) -> torch.Tensor:
        """`context` `[batch, tokens, width]`, and after it the tokens of the pictures that the adapters are shown."""
        embeds = (added or {}).get("image_embeds")
        embeds = [embeds] if isinstance(embeds, torch.Tensor) else embeds or []
        projections = [] if self.image_proj is None else list(self.image_proj)
        if len(embeds) != len(projections):
            raise ValueError(
                f"`added_cond_kwargs` has `image_embeds` for {len(embeds)} IP-Adapters, and {len(projections)} are"
                " loaded; accepted is a list with one tensor for each."
            )
        tokens = [project(part) for project, part in zip(projections, embeds, strict=True)]
        return torch.cat([context, *(part.to(context) for part in tokens)], dim=1) if tokens else context


def layer_sizes(unet: Any) -> LayerSizes:
    """Widths of queries and output of each cross-attention, by their paths; the UNet may be on the meta device."""
    return {name: (layer.inner_dim, layer.out_dim) for name, layer in cross_attentions(unet).items()}


@dataclass(frozen=True)
class IPAdapter:
    """The modules of one adapter.

    Args:
        projection: makes tokens of the embedding of a picture.
        layers: what it adds to each cross-attention, by the path of that.
    """

    projection: ImageProjection
    layers: dict[str, ImageAttention]

    @classmethod
    def on_meta(cls, layers: LayerSizes, width: int, embed_width: int, tokens: int) -> IPAdapter:
        """An adapter without weights.

        Args:
            layers: widths of queries and output of each cross-attention.
            width: of the context that these attend to, `cross_attention_dim`.
            embed_width: width of the image embeddings.
            tokens: number of tokens that are made of a picture.
        """
        with torch.device("meta"):
            parts = {name: ImageAttention(width, *sizes) for name, sizes in layers.items()}
            return cls(ImageProjection(embed_width, width, tokens), parts)

    @classmethod
    def from_weights(cls, weights: Weights, layers: LayerSizes, width: int) -> IPAdapter:
        """An adapter with these weights, for layers as in [`on_meta`].

        Raises:
            ValueError: see [`IPAdapterUNetMixin.load_ip_adapters`].
        """
        tokens, embed_width = _size_of(weights, width)
        adapter = cls.on_meta(layers, width, embed_width, tokens)
        _check_weights({key: tuple(tensor.shape) for key, tensor in weights.items()}, adapter.shapes)
        for place, module in adapter._parts.items():
            module.load_state_dict({key: weights[f"{place}.{key}"] for key in module.state_dict()}, assign=True)
        return adapter

    def to(self, device: torch.device, dtype: torch.dtype) -> IPAdapter:
        """Move and cast all modules."""
        for module in self._parts.values():
            module.to(device, dtype)
        return self

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key to shape of all its tensors, as files have them."""
        return {
            f"{place}.{key}": tuple(tensor.shape)
            for place, module in self._parts.items()
            for key, tensor in module.state_dict().items()
        }

    @property
    def _parts(self) -> dict[str, torch.nn.Module]:
        """By what keys begin with."""
        return {
            f"{PROJECTION}.proj": self.projection.image_embeds,
            f"{PROJECTION}.norm": self.projection.norm,
            **{f"{LAYERS}.{name}": layer for name, layer in self.layers.items()},
        }


def _size_of(weights: Weights, width: int) -> tuple[int, int]:
    """Number of tokens, and width of the embeddings."""
    key = f"{PROJECTION}.proj.weight"
    shape = tuple(weights[key].shape) if key in weights else ()
    if len(shape) != 2 or shape[0] % width:
        raise ValueError(
            f"an IP-Adapter's weights have `{key}` of the shape {list(shape)}; accepted is [tokens * {width},"
            " width of the embeddings]. Those for other models do not fit, those of the original have to be converted."
        )
    return shape[0] // width, shape[1]


def _check_weights(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    faults = {
        "are missing": [key for key in expected if key not in given],
        "are unknown": [key for key in given if key not in expected],
        "have other shapes": [
            f"{key} {list(given[key])} (accepted {list(shape)})"
            for key, shape in expected.items()
            if key in given and given[key] != shape
        ],
    }
    told = [f"{len(keys)} {what}, such as {', '.join(keys[:_SHOWN])}" for what, keys in faults.items() if keys]
    if told:
        raise ValueError(f"an IP-Adapter's weights do not fit this UNet: {'; '.join(told)}.")
