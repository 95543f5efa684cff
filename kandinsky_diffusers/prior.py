"""The prior of 2.1 and 2.2 (text to image embedding), which computes once what no step changes."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PriorTransformer
from diffusers.models.transformers.prior_transformer import PriorTransformerOutput
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .attention import DispatchedAttnProcessor, use_dispatched_attention
from .compilation import is_compiled
from .components import SavedAsStock
from .context_cache import KeyValueCache


MASKED_SCORE = -10000.0  # added to the score of a token that is not attended to, as in the original


@dataclass(eq=False)
class PriorPrefix:
    """What a prior keeps of the tokens that no step changes. Made by `prior(prefill=True, ...)`; not to be changed.

    Each step writes the keys and values of its own tokens behind those of the prefix, see [`KeyValueCache`]. So steps
    can share a prefix one after the other, and not from several threads at a time.

    Args:
        caches: keys and values of the prefix and of the last step, one per layer.
        attention_mask: `[batch, 1, remaining tokens, all tokens]`, added to the scores.
    """

    caches: tuple[KeyValueCache, ...]
    attention_mask: torch.Tensor


pytree.register_pytree_node(
    PriorPrefix, lambda prefix: ([prefix.caches, prefix.attention_mask], None), lambda parts, _: PriorPrefix(*parts)
)


class CachedPriorTransformer(SavedAsStock, PriorTransformer):
    """[`PriorTransformer`] that can compute what does not depend on the step once, instead of at every step.

    The tokens are the text states, the text embedding, the time, the noisy image embedding and the learned `prd`, in
    this order, and attention is causal. So the first two, 78 of 81, look the same to the others at every step:

        prefix = prior(prefill=True, proj_embedding=..., encoder_hidden_states=..., attention_mask=...)
        for t in scheduler.timesteps:
            prediction = prior(latents, t, prefix=prefix).predicted_image_embedding

    Without these two arguments it is the stock class. The model itself remembers nothing.
    """

    _repeated_blocks = ("BasicTransformerBlock",)

    @functools.wraps(PriorTransformer.__init__)  # from_config reads the names of the arguments from it
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_shared_state()

    def _on_shared_state(self) -> None:
        use_dispatched_attention(self)

    @property
    def supports_prefix(self) -> bool:
        """Whether a prefix can be computed. If not, call the model as the stock class is called.

        It cannot where the configuration counts no tokens after the text (`additional_embeddings`; Shap-E's prior),
        and with attention processors other than the default.
        """
        after_text = 3 + (self.prd_embedding is not None)
        return self.config.additional_embeddings >= after_text and all(
            isinstance(block.attn1.processor, DispatchedAttnProcessor) for block in self.transformer_blocks
        )

    def set_default_attn_processor(self) -> None:
        """Go back to the attention processors that the model is built with."""
        self.set_attn_processor(DispatchedAttnProcessor())

    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | float | int | None = None,
        proj_embedding: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        prefill: bool = False,
        prefix: PriorPrefix | None = None,
        post_process: bool = False,
    ) -> PriorTransformerOutput | tuple[torch.Tensor] | PriorPrefix | torch.Tensor:
        """Predict the image embedding, or prepare to do so, or bring it to CLIP's scale.

        Args:
            hidden_states: `[batch, embedding_dim]`, the noisy image embedding. Not with `prefill`.
            timestep: a number, or `[batch]` of them. Not with `prefill`.
            proj_embedding: `[batch, embedding_dim]`, the text embedding. Not with `prefix`.
            encoder_hidden_states: `[batch, num_embeddings, embedding_dim]`, the text states; with `prefill` they may
                be fewer, without what is padding in all texts. Not with `prefix`.
            attention_mask: `[batch, num_embeddings]`, true at the tokens of the text, as many as there are states. Not
                with `prefix`.
            return_dict: return a tuple if False.
            prefill: return the prefix of these conditions.
            prefix: the conditions, as `prefill` returned them.
            post_process: return what [`post_process_latents`] makes of `hidden_states`. Offloading brings weights in
                for a call of the model only, not for one of its methods.

        Raises:
            ValueError: an argument is missing, does not belong there, has another shape than the configuration or the
                prefix, or [`supports_prefix`] is False.
        """
        step: dict[str, Any] = {"hidden_states": hidden_states, "timestep": timestep}
        conditions: dict[str, Any] = {
            "proj_embedding": proj_embedding,
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
        }
        if post_process:
            _check_arguments("post_process=True", needed={"hidden_states": hidden_states}, refused=conditions)
            return self.post_process_latents(hidden_states)
        if prefill:
            _check_arguments("prefill=True", needed=conditions, refused={**step, "prefix": prefix})
            self._check_supports_prefix()
            return self._prefill(**conditions)
        if prefix is not None:
            _check_arguments("`prefix`", needed=step, refused=conditions)
            self._check_supports_prefix()
            prediction = self._predict(**step, prefix=prefix)
            return PriorTransformerOutput(prediction) if return_dict else (prediction,)
        _check_arguments("no `prefix`", needed={**step, "proj_embedding": proj_embedding})
        return super().forward(**step, **conditions, return_dict=return_dict)

    def _check_supports_prefix(self) -> None:
        if not self.supports_prefix:
            raise ValueError(
                "this prior cannot use a prefix (`supports_prefix` is False): its configuration has no tokens after "
                "the text, or its attention processors are not the default ones. Call it without one."
            )

    def _prefill(
        self, proj_embedding: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask: torch.Tensor
    ) -> PriorPrefix:
        mask, states, embedding = attention_mask.shape, encoder_hidden_states.shape, proj_embedding.shape
        most = self.config.num_embeddings
        if len(mask) != 2 or mask[1] > most or mask != states[:2] or mask[0] != embedding[0]:
            raise ValueError(
                f"`attention_mask` is {list(mask)}, `encoder_hidden_states` {list(states)} and `proj_embedding` "
                f"{list(embedding)}; accepted are one batch and at most {most} text tokens."
            )
        if self.embedding_proj_norm is not None:
            proj_embedding = self.embedding_proj_norm(proj_embedding)
        text_embedding = self.embedding_proj(proj_embedding)
        text_states = encoder_hidden_states
        if self.encoder_hidden_states_proj is not None:
            text_states = self.encoder_hidden_states_proj(text_states)
        tokens = torch.cat([text_states, _as_token(text_embedding)], dim=1)
        length = tokens.shape[1]
        positions = self._positions(tokens)
        positions = torch.cat([positions[:, : length - 1], positions[:, most : most + 1]], dim=1)

        mask = self._causal_mask(attention_mask, tokens.dtype)
        caches = tuple(KeyValueCache(room=mask.shape[-1] - length) for _ in self.transformer_blocks)
        self._transform(tokens + positions, mask[..., :length, :length], caches)
        return PriorPrefix(caches, mask[..., length:, :].contiguous())

    def _predict(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor | float, prefix: PriorPrefix
    ) -> torch.Tensor:
        batch = len(prefix.attention_mask)
        if len(hidden_states) != batch:
            raise ValueError(f"`hidden_states` is a batch of {len(hidden_states)}; accepted is the prefix's, {batch}.")
        noisy = _as_token(self.proj_in(hidden_states))
        tokens = [self._time_token(timestep, noisy), noisy]
        if self.prd_embedding is not None:
            tokens.append(self.prd_embedding.to(noisy.dtype).expand(batch, -1, -1))
        tokens = torch.cat(tokens, dim=1)

        tokens = self._transform(
            tokens + self._positions(tokens)[:, -tokens.shape[1] :], prefix.attention_mask, prefix.caches
        )
        tokens = self.norm_out(tokens)
        return self.proj_to_clip_embeddings(tokens[:, 1:] if self.prd_embedding is None else tokens[:, -1])

    def _time_token(self, timestep: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
        timesteps = torch.as_tensor(timestep, device=like.device).reshape(-1).expand(len(like))
        return self.time_embedding(self.time_proj(timesteps).to(self.dtype))[:, None]

    def _positions(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.positional_embedding.to(tokens.dtype)

    def _causal_mask(self, attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[batch, 1, tokens, tokens]`, in the two steps in which stock rounds it in half precision."""
        padding = (1 - attention_mask.to(dtype)) * MASKED_SCORE
        padding = F.pad(padding, (0, self.config.additional_embeddings))
        length = padding.shape[1]
        return (padding[:, None, None, :] + self.causal_attention_mask[:, :length, :length]).to(dtype)

    def _transform(self, tokens: torch.Tensor, mask: torch.Tensor, caches: tuple[KeyValueCache, ...]) -> torch.Tensor:
        if self.norm_in is not None:
            tokens = self.norm_in(tokens)
        # through the block's forward and not its parts, since offload hooks sit there
        compiled = any(map(is_compiled, self.transformer_blocks))
        with nullcontext() if compiled else _fast_linear(tokens):
            for block, cache in zip(self.transformer_blocks, caches, strict=True):
                tokens = block(tokens, attention_mask=mask, cross_attention_kwargs={"cache": cache})
        return tokens


class _OneDnnLinear(TorchFunctionMode):
    """Runs linear layers of float32 on oneDNN.

    PyTorch runs them on MKL, which from four rows on rearranges every weight matrix before it multiplies. A step has
    six rows (three tokens, with guidance) and little else to do than to read the weights; this is 1.3 times as fast.
    It is a mode, and not another layer, because LoRA and offload hooks wrap the layers there are.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.linear and not kwargs and all(_is_plain(tensor) for tensor in args):
            return func(args[0].to_mkldnn(), *args[1:]).to_dense()
        return func(*args, **(kwargs or {}))


def _is_plain(tensor: torch.Tensor | None) -> bool:
    return tensor is None or (type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.dtype is torch.float32)


def _fast_linear(tokens: torch.Tensor) -> AbstractContextManager:
    usable = (
        tokens.device.type == "cpu"
        and tokens.dtype is torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )
    return _OneDnnLinear() if usable else nullcontext()


def _as_token(embedding: torch.Tensor) -> torch.Tensor:
    return embedding[:, None] if embedding.ndim == 2 else embedding


def _check_arguments(mode: str, needed: dict[str, Any], refused: dict[str, Any] | None = None) -> None:
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"with {mode}, these arguments are needed: {', '.join(missing)}.")
    superfluous = [name for name, value in (refused or {}).items() if value is not None]
    if superfluous:
        raise ValueError(f"with {mode}, these arguments have no meaning: {', '.join(superfluous)}.")


def arguments_of(conditions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a pipeline's `encode_prompt` returns, by the names of the prior's arguments."""
    return {
        "proj_embedding": conditions["prompt_embeds"],
        "encoder_hidden_states": conditions["text_encoder_hidden_states"],
        "attention_mask": conditions["text_mask"],
    }


def without_padding(arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What [`arguments_of`] returns, for `prefill`, without what is padding in all texts: nothing attends to that.

    On the CPU alone: a device would have to tell the host how long the texts are, and is not faster with fewer tokens.
    """
    mask = arguments["attention_mask"]
    if mask.device.type != "cpu":
        return arguments
    used = mask.bool().any(dim=0).tolist()
    length = len(used) - used[::-1].index(True) if any(used) else 0
    cut = {name: arguments[name][:, :length] for name in ("encoder_hidden_states", "attention_mask")}
    return {**arguments, **cut}
