"""Attention whose kernel the user chooses, and which can keep the keys and values of tokens that do not change.

diffusers' `model.set_attention_backend(...)` reaches only processors that go through its dispatcher. The stock ones of
the 2.x UNets and of the prior do not; those here do, and compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import attention_backend
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor2_0
from diffusers.utils import is_xformers_available

from .context_cache import ContextCache, KeyValue, KeyValueCache, tokens_for
from .fused_projections import FUSED_LAYERS, fused_layer


# those that add a mask of floats to the scores; flash, sage and XLA take none, Ascend's reads it as booleans
MASKING_BACKENDS = (
    AttentionBackendName.NATIVE,
    AttentionBackendName.XFORMERS,
    AttentionBackendName.FLEX,
    AttentionBackendName._NATIVE_CUDNN,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_MATH,
)

_Projected = torch.Tensor | list[torch.Tensor]  # `[layers, batch, tokens, heads, width of a head]`


class DispatchedAttnProcessor(AttnProcessor2_0):
    """[`AttnProcessor2_0`] with a choice of backend, and with room for cached keys and values.

    Raises:
        ValueError: when called with a mask although the chosen backend cannot take one.
    """

    _attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | KeyValue | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            attn: the layer with the weights.
            hidden_states: `[batch, tokens, width]` or `[batch, width, height, width of the picture]`.
            encoder_hidden_states: `[batch, other tokens, other width]` to attend to, or what [`project`] has made of
                them; None attends to `hidden_states`.
            attention_mask: added to the scores; whatever [`Attention.prepare_attention_mask`] takes, or four
                dimensions that broadcast to `[batch, heads, tokens, keys]`.
            temb: what a spatial norm is conditioned on.
            cache: keys and values of earlier tokens.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if encoder_hidden_states is None:
            query, both = _query_key_value(attn, hidden_states)
        else:
            query, given = _split_heads(attn, attn.to_q(hidden_states)), _key_value(self, attn, encoder_hidden_states)
            both = [given.key, given.value]
        query = query if attn.norm_q is None else attn.norm_q(query)
        key, value = both if cache is None else cache.join(both)

        if attention_mask is not None and attention_mask.ndim != 4:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[1], len(key))
            attention_mask = attention_mask.unflatten(0, (len(key), attn.heads))
        output = _attend(self._attention_backend, query, key, value, attention_mask)
        output = _project_out(attn, output)
        if residual.ndim == 4:
            output = output.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            output = output + residual
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor

    def project(self, attn: Attention, tokens: torch.Tensor) -> KeyValue:
        """Keys and values of `tokens` `[batch, tokens, width]` other than the layer's own."""
        key, value = _projected(attn, "to_kv", _normed_context(attn, tokens))
        return KeyValue(key if attn.norm_k is None else attn.norm_k(key), value)


class DispatchedAttnAddedKVProcessor(AttnAddedKVProcessor2_0):
    """[`AttnAddedKVProcessor2_0`], the attention of the 2.x UNets, with a choice of backend.

    Raises:
        ValueError: when called with a mask although the chosen backend cannot take one.
    """

    _attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | KeyValue | ContextCache | None = None,
        attention_mask: torch.Tensor | None = None,
        keeps_layout: bool = False,
    ) -> torch.Tensor:
        """Attend to the conditions, and then, unless the layer is for cross-attention only, to the picture.

        Args:
            attn: the layer with the weights.
            hidden_states: `[batch, channels, height, width]`.
            encoder_hidden_states: `[batch, tokens, width]`, the conditions; or what [`project`] has made of them, or a
                cache that has or makes it.
            attention_mask: added to the scores, as [`Attention.prepare_attention_mask`] takes it.
            keeps_layout: return the same numbers laid out in memory as `hidden_states` are; in stock, channels lie
                side by side afterwards. See [`keeps_layout`].
        """
        residual = hidden_states
        hidden_states = hidden_states.flatten(2)
        pixels = hidden_states.shape[-1]
        if encoder_hidden_states is None:
            both = self._project(attn, hidden_states.transpose(1, 2))
        else:
            both = _key_value(self, attn, tokens_for(attn, encoder_hidden_states))
        key, value = both.key, both.value
        hidden_states = attn.group_norm(hidden_states).transpose(1, 2)

        query = _split_heads(attn, attn.to_q(hidden_states))
        if not attn.only_cross_attention:
            own_key, own_value = _projected(attn, "to_kv", hidden_states)
            key, value = torch.cat([key, own_key], dim=1), torch.cat([value, own_value], dim=1)

        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, pixels, len(query), out_dim=4)
        output = _project_out(attn, _attend(self._attention_backend, query, key, value, attention_mask))
        output = output.transpose(1, 2).reshape(residual.shape)
        return residual + output if keeps_layout else output + residual  # a sum lies in memory as its first term does

    def project(self, attn: Attention, tokens: torch.Tensor) -> KeyValue:
        """Keys and values of the conditions `tokens` `[batch, tokens, width]`."""
        return self._project(attn, _normed_context(attn, tokens))

    def _project(self, attn: Attention, tokens: torch.Tensor) -> KeyValue:
        return KeyValue(_split_heads(attn, attn.add_k_proj(tokens)), _split_heads(attn, attn.add_v_proj(tokens)))


class ImageAttention(torch.nn.Module):
    """What an IP-Adapter adds to a layer, whose queries attend to tokens of a picture by keys and values of their own.

    Args:
        token_dim: width of the tokens.
        inner_dim: width of the layer's queries, all heads together.
        out_dim: width of the layer's output.
    """

    def __init__(self, token_dim: int, inner_dim: int, out_dim: int):
        super().__init__()
        self.to_k_ip = torch.nn.Linear(token_dim, inner_dim)
        self.to_v_ip = torch.nn.Linear(token_dim, inner_dim)
        self.to_out_ip = torch.nn.Linear(inner_dim, out_dim)

    def forward(
        self, query: torch.Tensor, tokens: torch.Tensor | KeyValue, backend: AttentionBackendName | None = None
    ) -> torch.Tensor:
        """Attend: `[batch, positions, out_dim]`.

        Args:
            query: `[batch, positions, heads, width of a head]`.
            tokens: `[batch, tokens, token_dim]`, or what [`project`] has made of them.
            backend: None for the default.
        """
        both = tokens if isinstance(tokens, KeyValue) else self.project(tokens, query.shape[2])
        return self.to_out_ip(_attend(backend, query, both.key, both.value, None))

    def project(self, tokens: torch.Tensor, heads: int) -> KeyValue:
        """Keys and values of `tokens` `[batch, tokens, token_dim]`."""
        return KeyValue(*(to(tokens).unflatten(-1, (heads, -1)) for to in (self.to_k_ip, self.to_v_ip)))


class IPAdapterAttnProcessor(torch.nn.Module):
    """Attention to a text as `text` does it, and to pictures besides: text + sum of scale * [`ImageAttention`].

    The tokens of the pictures are the last ones of `encoder_hidden_states`; a mask is for the text's tokens only.
    (`Kandi3AttnProcessorIpAdapter` in kandinsky3_diffusers/models/attention_processor.py of the original.)

    Args:
        text: the processor for the text; its attention backend is chosen together with that for pictures.
        adapters: one [`ImageAttention`] for each adapter.
        token_counts: how many tokens a picture has for each adapter.
        scale: how much each adapter counts; one that does not count at all is not computed.
    """

    def __init__(
        self, text: Any, adapters: Sequence[torch.nn.Module], token_counts: Sequence[int], scale: Sequence[float]
    ):
        super().__init__()
        self.text = text
        self.adapters = torch.nn.ModuleList(adapters)
        self.token_counts = list(token_counts)
        self.scale = list(scale)
        self._backend: AttentionBackendName | None = getattr(text, "_attention_backend", None)

    @property
    def _attention_backend(self) -> AttentionBackendName | None:
        return self._backend

    @_attention_backend.setter
    def _attention_backend(self, backend: AttentionBackendName | None) -> None:
        self._backend = backend
        if hasattr(self.text, "_attention_backend"):
            self.text._attention_backend = backend

    def with_text(self, text: Any) -> IPAdapterAttnProcessor:
        """The same adapters beside another processor for the text."""
        other = IPAdapterAttnProcessor(text, list(self.adapters), self.token_counts, self.scale)
        other._backend = self._backend
        return other

    def forward(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | KeyValue,
        attention_mask: torch.Tensor | None = None,
        **text_arguments: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            attn: the layer with the weights.
            hidden_states: `[batch, positions, width]`.
            encoder_hidden_states: `[batch, text tokens and image tokens, other width]`, or what [`project`] has made
                of them.
            attention_mask: for the text's tokens.
            text_arguments: what else the processor for the text takes.
        """
        context: Any = encoder_hidden_states
        text, *pictures = (context, *context.pictures) if isinstance(context, KeyValue) else self._split(context)
        output = self.text(attn, hidden_states, text, attention_mask, **text_arguments)
        if not any(self.scale):
            return output
        query = _split_heads(attn, attn.to_q(hidden_states))
        for adapter, tokens, scale in zip(self.adapters, pictures, self.scale, strict=True):
            if scale:
                output = output + scale * adapter(query, tokens, self._backend)
        return output

    def project(self, attn: Attention, tokens: torch.Tensor) -> KeyValue:
        """Keys and values of the text's tokens, and of those of the pictures that count."""
        text, *pictures = self._split(tokens)
        of_text = self.text.project(attn, text)
        of_pictures = [
            adapter.project(own, attn.heads) if scale else None
            for adapter, own, scale in zip(self.adapters, pictures, self.scale, strict=True)
        ]
        return KeyValue(of_text.key, of_text.value, of_pictures)

    def _split(self, tokens: torch.Tensor) -> Sequence[torch.Tensor]:
        return tokens.split([tokens.shape[1] - sum(self.token_counts), *self.token_counts], dim=1)


def text_processor(layer: Any) -> Any:
    """The processor with which a layer attends to the text."""
    processor = layer.processor
    return processor.text if isinstance(processor, IPAdapterAttnProcessor) else processor


def set_text_processor(layer: Any, processor: Any) -> None:
    """Let a layer attend to the text with `processor`; its IP-Adapters, if it has any, stay."""
    adapted = layer.processor
    layer.set_processor(adapted.with_text(processor) if isinstance(adapted, IPAdapterAttnProcessor) else processor)


def keeps_context(model: torch.nn.Module) -> bool:
    """Whether every attention layer of `model` can be given keys and values, see [`ContextCache`]."""
    return all(hasattr(layer.processor, "project") for layer in attention_layers(model))


def keeps_layout(model: torch.nn.Module) -> bool:
    """Whether every attention layer of `model` knows `keeps_layout`.

    On the CPU, a convolution whose weights lie otherwise in memory than its input copies them first: more than a
    fifth of a step of the 2.2 UNet at 256 x 256.
    """
    return all(isinstance(layer.processor, DispatchedAttnAddedKVProcessor) for layer in attention_layers(model))


def processor_states(model: torch.nn.Module) -> list[Any]:
    """On which processors, and on which scales of IP-Adapters, keys and values of `model` depend."""
    processors: list[Any] = [layer.processor for layer in attention_layers(model)]
    return [*processors, *(list(own.scale) for own in processors if isinstance(own, IPAdapterAttnProcessor))]


_DISPATCHED = {
    AttnProcessor2_0: DispatchedAttnProcessor,
    AttnAddedKVProcessor2_0: DispatchedAttnAddedKVProcessor,
}


def use_dispatched_attention(model: torch.nn.Module) -> None:
    """Let `model.set_attention_backend` reach the layers of `model` that have diffusers' default processors.

    Outputs do not change. Layers with any other processor (LoRA, sliced, a user's own) keep it. Calling it again does
    nothing.
    """
    for layer in attention_layers(model):
        replacement = _DISPATCHED.get(type(layer.processor))
        if replacement is not None:
            layer.set_processor(replacement())


def enable_xformers(model: torch.nn.Module) -> None:
    """Run the attention of `model` on xformers, on this model alone. One without diffusers' attention stays as it is.

    Raises:
        ModuleNotFoundError: xformers is not installed.
        ValueError: there is no CUDA device, or a layer has a processor that cannot change its backend.
    """
    if not is_xformers_available():
        raise ModuleNotFoundError(
            "xformers is not installed: `pip install kandinsky-diffusers[xformers]`. PyTorch's own memory-efficient "
            "attention is the default and needs nothing."
        )
    if not torch.cuda.is_available():
        raise ValueError("xformers needs a CUDA device, and there is none.")
    use_dispatched_attention(model)
    layers = attention_layers(model)
    for layer in layers:
        if not hasattr(layer.processor, "_attention_backend"):
            raise ValueError(
                f"`model` has an attention layer with a {type(layer.processor).__name__}, which cannot run on "
                "xformers; accepted are diffusers' default processors."
            )
    if layers:
        choose_backend(model, AttentionBackendName.XFORMERS.value)


def choose_backend(model: Any, backend: str) -> None:
    """`model.set_attention_backend(backend)`, for this model alone."""
    # it also makes its choice everybody's default; leaving this context takes that back
    with attention_backend(AttentionBackendName.NATIVE):
        model.set_attention_backend(backend)


def attention_layers(model: torch.nn.Module) -> list[Attention]:
    """All layers of diffusers' attention in `model`."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def _key_value(processor: Any, attn: Attention, context: torch.Tensor | KeyValue) -> KeyValue:
    return context if isinstance(context, KeyValue) else processor.project(attn, context)


def _normed_context(attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
    return attn.norm_encoder_hidden_states(tokens) if attn.norm_cross else tokens


def _query_key_value(attn: Attention, tokens: torch.Tensor) -> tuple[torch.Tensor, _Projected]:
    """Queries, and keys and values, of the same tokens."""
    if attn.is_cross_attention:  # diffusers does not fuse the queries of such then
        query, both = _split_heads(attn, attn.to_q(tokens)), _projected(attn, "to_kv", tokens)
    else:
        projected = _projected(attn, "to_qkv", tokens)
        query, both = projected[0], projected[1:]
    return query, both if attn.norm_k is None else [attn.norm_k(both[0]), both[1]]


def _projected(attn: Attention, name: str, tokens: torch.Tensor) -> _Projected:
    """What the layers `FUSED_LAYERS[name]` make of tokens, in one product and one tensor where they are fused."""
    layers, fused = FUSED_LAYERS[name], fused_layer(attn, name)
    if fused is None:
        return [_split_heads(attn, getattr(attn, layer)(tokens)) for layer in layers]
    return fused(tokens).unflatten(-1, (len(layers), attn.heads, -1)).movedim(2, 0)


def _split_heads(attn: Attention, projected: torch.Tensor) -> torch.Tensor:
    return projected.unflatten(-1, (attn.heads, -1))


def _attend(
    backend: AttentionBackendName | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    if mask is not None:
        # none chosen means the default, which another model's choice may have changed to one without masks
        backend = backend or AttentionBackendName.NATIVE
        if backend not in MASKING_BACKENDS:
            raise ValueError(
                f"the attention backend {backend.value!r} cannot take the attention mask of this model; accepted by "
                f"`set_attention_backend` are {', '.join(name.value for name in MASKING_BACKENDS)}."
            )
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend).flatten(2)


def _project_out(attn: Attention, output: torch.Tensor) -> torch.Tensor:
    layers: Any = attn.to_out
    projection, dropout = layers
    return dropout(projection(output))
