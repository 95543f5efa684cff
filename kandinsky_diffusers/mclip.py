"""Prompts of 2.0 and 2.1, and the states that M-CLIP, the multilingual text encoder of both, makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Self

import torch

from .decoding import Batch, Call, Conditions
from .inputs import as_negatives, as_prompts, check_alternatives
from .options import PromptOptions
from .text import tokenize


TEXT_LENGTH = 77

States = tuple[torch.Tensor, ...]


class TextStates(PromptOptions, total=False):
    """What the decoders take instead of prompts, see their `encode_prompt`; and what they take with them."""

    prompt_embeds: Annotated[torch.Tensor | None, None]
    negative_prompt_embeds: Annotated[torch.Tensor | None, None]
    pooled_prompt_embeds: Annotated[torch.Tensor | None, None]
    negative_pooled_prompt_embeds: Annotated[torch.Tensor | None, None]


@dataclass(frozen=True)
class TextInputs:
    """Prompts and negative prompts of one call, as text or as states of the text encoder.

    Args:
        prompt: one or several; None with `prompt_embeds`.
        negative_prompt: one for all, or one for each prompt; None is the empty one.
        prompt_embeds: hidden states `[prompts, 77, width]`.
        negative_prompt_embeds: hidden states `[1 or prompts, 77, width]`.
        pooled_prompt_embeds: pooled states `[prompts, image width]`.
        negative_pooled_prompt_embeds: pooled states `[1 or prompts, image width]`.

    Raises:
        TypeError: a text is no str or list of str.
        ValueError: text and states are both given, or for the prompt neither; states without their pooled ones or the
            other way round; or a number of negatives that fits neither one nor all prompts.
    """

    STATES: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.prompt is None and self.prompt_embeds is None:
            raise ValueError("`prompt` is missing; accepted is a str, a list of str, or `prompt_embeds` instead.")
        for sign in ("", "negative_"):
            states = {f"{sign}{name}": getattr(self, f"{sign}{name}") for name in self.STATES}
            check_alternatives(f"{sign}prompt", getattr(self, f"{sign}prompt"), states)
        as_negatives(self.negative_prompt, self.count)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Those among the arguments of a call."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    @classmethod
    def state_names(cls) -> list[str]:
        """Names of the states, those of a prompt followed by those of its negative one."""
        return [name for state in cls.STATES for name in (state, f"negative_{state}")]

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(as_prompts(self.prompt)) if self.prompt_embeds is None else len(self.prompt_embeds)

    def encoded(
        self,
        encode: Callable[[list[str]], States],
        images_per_prompt: int,
        with_negatives: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor | None, ...]:
        """States in the order of [`state_names`], one row for each image.

        Args:
            encode: makes the states, in the order of `STATES`, of a list of str; called where they are not given.
            images_per_prompt: how often each row is repeated.
            with_negatives: whether to make the negative ones, None else.
            device: of the states.
            dtype: of the states.
        """
        batch = Batch(self.count, self.count * images_per_prompt, (0, 0))

        def rows(sign: str, texts: Callable[[], list[str]]) -> list[torch.Tensor]:
            given = [getattr(self, f"{sign}{name}") for name in self.STATES]
            states = encode(texts()) if given[0] is None else given
            return [batch.expand(state.to(device, dtype), f"{sign}prompt_embeds") for state in states]

        positive = rows("", lambda: as_prompts(self.prompt))
        if not with_negatives:
            return tuple(state for positive_state in positive for state in (positive_state, None))
        negative = rows("negative_", lambda: as_negatives(self.negative_prompt, self.count))
        return tuple(state for pair in zip(positive, negative, strict=True) for state in pair)


class TextConditionsMixin:
    """Mixed in before the other parts of a text-to-image pipeline whose UNet reads states made by `encode_prompt`."""

    _text_inputs: type[TextInputs] = TextInputs
    # what the UNet takes besides hidden states, and under which name the conditions have it
    _added_conditions: ClassVar[Mapping[str, str]]

    def _check(self, arguments: Mapping[str, Any]) -> Call:
        text = self._text_inputs.of(arguments)
        return replace(self._check_common(arguments, text.count), text=text)

    def _encode(self, call: Call, device: torch.device) -> Conditions:
        """All conditions that text-to-image knows, one row for each picture."""
        states = self.encode_prompt(
            device=device,
            num_images_per_prompt=call.batch.images_per_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            **vars(call.text),
        )
        named = zip(self._text_inputs.state_names(), states, strict=True)
        return {name: rows for name, rows in named if rows is not None} | self._embeds_for(call, device)

    @property
    def _text_dtype(self) -> torch.dtype:
        # a pipeline for texts alone may be built without a UNet
        return (self.text_encoder if self.unet is None else self.unet).dtype

    def _both(self, conditions: Conditions, name: str) -> torch.Tensor:
        """A condition for the network: the unconditional half first, where there is guidance."""
        if not self.do_classifier_free_guidance:
            return conditions[name]
        return torch.cat([conditions[f"negative_{name}"], conditions[name]])

    def predict_noise(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """What the UNet says of `latents` at `timestep`.

        Args:
            latents: `[batch, 4, height, width]`.
            timestep: a training timestep.
            conditions: named tensors with one row for each image: those of the callback, and `masked_image` and
                `mask_image` (latents, 1 keeps) when inpainting.

        Returns:
            Noise and variance, `[2 * batch, 8, height, width]` with the unconditional half first, or `[batch, 8, ...]`
            where guidance is off.
        """
        read = [conditions.get(name) for name in self._callback_tensor_inputs]
        cache = self._context_cache(self.unet, [*read, self._halves(latents, conditions)])
        added = {to: self._both(conditions, name) for to, name in self._added_conditions.items()}
        sample = self._unet_input(latents, timestep, conditions)
        return self.unet(
            sample=sample,
            timestep=timestep,
            encoder_hidden_states=self._both(conditions, "prompt_embeds"),
            cross_attention_kwargs=self._attention_arguments(sample),
            added_cond_kwargs={**added, "cache": cache},
            return_dict=False,
        )[0]


def encode_with_mclip(text_encoder: Any, tokenizer: Any, texts: list[str], device: torch.device) -> States:
    """Hidden states `[texts, 77, width]` and pooled states `[texts, image width]` of M-CLIP.

    The pooled state is a linear map of the mean over real tokens; the hidden states of padding are kept, and the UNet
    sees them (kandinsky2/model/text_encoders.py of the original).
    """
    ids, mask = tokenize(tokenizer, texts, TEXT_LENGTH)
    pooled, hidden = text_encoder(input_ids=ids.to(device), attention_mask=mask.to(device))
    return hidden, pooled
