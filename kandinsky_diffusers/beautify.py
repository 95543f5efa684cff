"""A language model writes a better prompt, as in Kandinsky 3.1."""

from __future__ import annotations

import functools
import gc
import os
import re
from collections.abc import Mapping
from typing import Any, overload

import torch
from diffusers.utils import logging
from diffusers.utils.torch_utils import empty_device_cache

from .inputs import as_prompts, check_at_least, check_counts
from .options import Prompts


logger = logging.get_logger(__name__)

# as the README of ai-forever/Kandinsky-3 gives them, with places for what it has written out
MODEL = "Intel/neural-chat-7b-v3-1"
SYSTEM_PROMPT = (
    "You are a prompt engineer. Your mission is to expand prompts written by user. You should provide the best prompt"
    " for text to image generation in {language}."
)
TEMPLATE = "### System: {system}\n### User:\n{prompt}\n### Assistant:\n"

KEPT_LANGUAGE = "the language of the user's prompt"

_PLACES = re.compile(r"\{(system|prompt)\}")
_ROLE_IN_FRONT = re.compile(r"[#*\s]*(?:assistant|prompt)\s*:[*\s]*", re.IGNORECASE)
_NEXT_TURN = re.compile(r"#{2,}\s*(?:system|user|assistant)\s*:", re.IGNORECASE)
_QUOTES = ('""', "''", "``", "“”", "‘’", "«»", "„“", "„”")

Chat = list[dict[str, str]]


class PromptBeautifier:
    """Makes short prompts rich, with a chat model on transformers' text-generation pipeline.

    `beautifier("a cat")` is a str, of a list a list. Each prompt is answered alone, so that its answer does not depend
    on its neighbours; an answer is kept, and asked for only once. As `prompt_beautifier=` of a pipeline it is applied
    to the prompts before they are encoded:

        beautifier = PromptBeautifier(keep_loaded=False)
        image = pipe("a cat", prompt_beautifier=beautifier).images[0]

    The model is loaded when it is first needed. By default the answer is the likeliest one; with a seed it is drawn,
    and is the same for the same seed. The global random generators of CPU and CUDA are left as they were.

    Args:
        model: folder or Hub id of a model for text generation that follows instructions; by default that of 3.1.
        system_prompt: what the model is told of its task; by default that of 3.1. `{language}` in it stands for the
            language; where it is missing a sentence on the language is added.
        template: the text that the model continues, with `{system}` and `{prompt}`. None is the template of 3.1 for
            the default model, and for any other its tokenizer's chat template if it has one, else that of 3.1.
        language: in which the answer is to be, in words; a prompt in another one is translated. `"English"` is that of
            3.1 and what its text encoder reads best. None keeps the language of the prompt.
        seed: for drawing the answer; None takes the likeliest one.
        max_new_tokens: longest answer, in tokens of the model.
        generation_kwargs: more for the model's `generate`, such as `temperature` or `repetition_penalty`.
        device: of the model; None is an accelerator where there is one. Not to be given with a `device_map`.
        dtype: of the model; `"auto"` is that of its weights.
        model_kwargs: more for the model's `from_pretrained`, such as `quantization_config` or `device_map`.
        cache_size: how many answers are kept; when there are more the one not used for longest is forgotten.
        keep_loaded: whether the model stays in memory after a call; else [`unload`] follows each.

    Raises:
        TypeError, ValueError: an argument is not as described; it is named.
    """

    def __init__(
        self,
        model: str | os.PathLike = MODEL,
        *,
        system_prompt: str = SYSTEM_PROMPT,
        template: str | None = None,
        language: str | None = "English",
        seed: int | None = None,
        max_new_tokens: int = 200,
        generation_kwargs: Mapping[str, Any] | None = None,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        model_kwargs: Mapping[str, Any] | None = None,
        cache_size: int = 256,
        keep_loaded: bool = True,
    ):
        check_counts(max_new_tokens=max_new_tokens)
        check_at_least("cache_size", cache_size, 0)
        if template is not None and set(_PLACES.findall(template)) != {"system", "prompt"}:
            raise ValueError(f"`template` is {template!r}; accepted is a text with {{system}} and {{prompt}}.")
        if language is not None and not (isinstance(language, str) and language.strip()):
            raise ValueError(f"`language` is {language!r}; accepted is a name such as 'English', or None to keep it.")
        self.model = os.fspath(model)
        self._instruction = _with_language(system_prompt, language)
        self._template = TEMPLATE if template is None and self.model == MODEL else template
        self.seed = _checked_seed(seed)
        self.keep_loaded = keep_loaded
        self._generation = {**(generation_kwargs or {}), "max_new_tokens": max_new_tokens}
        self._loading = {"device": device, "dtype": dtype, "model_kwargs": dict(model_kwargs or {})}
        self._pipeline: Any = None
        self._answer = functools.lru_cache(maxsize=cache_size)(self._new_answer)

    @overload
    def __call__(self, prompt: str, seed: int | None = None) -> str: ...

    @overload
    def __call__(self, prompt: list[str], seed: int | None = None) -> list[str]: ...

    def __call__(self, prompt: Prompts, seed: int | None = None) -> Prompts:
        """Better prompts.

        Where the model has nothing to say the prompt itself comes back, with a warning; an empty prompt stays empty.

        Args:
            prompt: one or several.
            seed: instead of the one the beautifier has.

        Returns:
            A str for a str, a list for a list.

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
            OSError: the model cannot be loaded.
        """
        prompts = as_prompts(prompt)
        seed = self.seed if seed is None else _checked_seed(seed)
        answers = [self._answer(text, seed) if text.strip() else text for text in prompts]
        if not self.keep_loaded:
            self.unload()
        return answers[0] if isinstance(prompt, str) else answers

    def request(self, prompt: str) -> str | Chat:
        """What the model gets to see for a prompt: a text that it continues, or messages for its chat template.

        It loads the model where its tokenizer decides on that. A chat template without a system role gets the system
        prompt as the first paragraph of the user's message.
        """
        from jinja2 import TemplateError

        template = self._template
        if template is None:
            tokenizer = self._loaded().tokenizer
            if tokenizer.chat_template:
                chat = [{"role": "system", "content": self._instruction}, {"role": "user", "content": prompt}]
                try:
                    tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                except TemplateError:
                    return [{"role": "user", "content": f"{self._instruction}\n\n{prompt}"}]
                return chat
            template = TEMPLATE
        values = {"system": self._instruction, "prompt": prompt}
        return _PLACES.sub(lambda place: values[place[1]], template)

    def unload(self) -> None:
        """Free the model's memory; what was answered stays known, and a new prompt loads the model again."""
        if self._pipeline is not None:
            device = self._pipeline.device.type
            self._pipeline = None
            gc.collect()  # the hooks of a `device_map` refer to their model and it to them
            empty_device_cache(device)

    def _new_answer(self, prompt: str, seed: int | None) -> str:
        request, pipeline = self.request(prompt), self._loaded()
        # of a chat the pipeline gives the messages back, the answer without what the model has thought before
        options = {**self._generation, "return_full_text": not isinstance(request, str)}
        if seed is None:
            result = pipeline(request, **{**options, "do_sample": False})
        else:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(seed)
                result = pipeline(request, **{**options, "do_sample": True})
        generated = result[0]["generated_text"]
        answer = cleaned(generated if isinstance(generated, str) else generated[-1]["content"] or "")
        if not answer:
            logger.warning(f"The answer of {self.model} to {prompt!r} is empty; the prompt is used as it is.")
        return answer or prompt

    def _loaded(self) -> Any:
        if self._pipeline is None:
            from transformers import pipeline

            # a copy, for transformers writes into it
            loading = {**self._loading, "model_kwargs": dict(self._loading["model_kwargs"])}
            self._pipeline = pipeline("text-generation", model=self.model, **loading)
        return self._pipeline


def cleaned(answer: str) -> str:
    """The prompt in the answer of a model: without thoughts, names of roles and quotes around it, on one line."""
    text = answer.rpartition("</think>")[2].partition("<think>")[0]
    while (role := _ROLE_IN_FRONT.match(text)) is not None:
        text = text[role.end() :]
    text = " ".join(_NEXT_TURN.split(text)[0].split())
    for first, last in _QUOTES:
        inside = text[1:-1]
        if len(text) > 1 and text[0] == first and text[-1] == last and not {first, last} & set(inside):
            return inside.strip()
    return text


def _with_language(system_prompt: str, language: str | None) -> str:
    told = system_prompt if "{language}" in system_prompt else f"{system_prompt} Answer in {{language}}.".lstrip()
    return told.replace("{language}", KEPT_LANGUAGE if language is None else language)


def _checked_seed(seed: int | None) -> int | None:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"`seed` is {seed!r}; accepted is an int, or None.")
    return seed
