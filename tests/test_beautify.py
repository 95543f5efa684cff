"""The prompt beautifier on a tiny language model: what the model is asked, and what becomes of its answer."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging as diffusers_logging

from kandinsky_diffusers import PromptBeautifier
from tests.support.language_model import make_language_model


# the README of ai-forever/Kandinsky-3, with a prompt in its place
ASKED_BY_31 = """### System: You are a prompt engineer. Your mission is to expand prompts written by user. You should \
provide the best prompt for text to image generation in English.
### User:
a red cat
### Assistant:
"""
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model. Read only."""
    return make_language_model(tmp_path_factory.mktemp("language-model"))


@pytest.fixture
def beautifier(folder: Path) -> PromptBeautifier:
    return PromptBeautifier(folder, max_new_tokens=12, device="cpu")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, beautifier: PromptBeautifier) -> Any:
    """The beautifier with a function in the place of the language model, which lists what it was asked."""
    asked: list[Any] = []

    def put(answer: str) -> tuple[PromptBeautifier, list[Any]]:
        class Model:
            tokenizer = beautifier._loaded().tokenizer
            device = torch.device("cpu")

            def __call__(self, request: Any, **options: Any) -> list[dict[str, str]]:
                asked.append((request, options))
                return [{"generated_text": answer}]

        monkeypatch.setattr(beautifier, "_loaded", Model)
        return beautifier, asked

    return put


def with_chat_template(beautifier: PromptBeautifier, template: str) -> PromptBeautifier:
    beautifier._loaded().tokenizer.chat_template = template
    return beautifier


# ------------------------------------------------------------------------------------------------ what is asked
def test_the_default_is_the_model_and_the_template_of_31_and_loads_nothing() -> None:
    beautifier = PromptBeautifier()
    assert beautifier.model == "Intel/neural-chat-7b-v3-1"
    assert beautifier.request("a red cat") == ASKED_BY_31
    assert beautifier._pipeline is None


def test_a_model_without_chat_template_gets_that_of_31(beautifier: PromptBeautifier) -> None:
    assert beautifier.request("a red cat") == ASKED_BY_31


def test_a_chat_model_gets_messages_in_its_own_template(beautifier: PromptBeautifier) -> None:
    system, _, rest = ASKED_BY_31.removeprefix("### System: ").partition("\n")
    assert rest.startswith("### User:\n")
    assert with_chat_template(beautifier, CHATML).request("a red cat") == [
        {"role": "system", "content": system},
        {"role": "user", "content": "a red cat"},
    ]
    answer = beautifier("a red cat")
    assert answer
    assert "<|" not in answer


def test_a_chat_model_that_knows_no_system_role_gets_it_all_from_the_user(beautifier: PromptBeautifier) -> None:
    message: Any = with_chat_template(beautifier, WITHOUT_SYSTEM).request("a red cat")[0]
    assert message["role"] == "user"
    assert message["content"].startswith("You are a prompt engineer.")
    assert message["content"].endswith("\n\na red cat")
    assert beautifier("a red cat")


def test_a_template_of_ones_own_takes_the_place_of_the_models(folder: Path) -> None:
    beautifier = PromptBeautifier(folder, system_prompt="Say {more}.", template="{{json}} [{system}] <{prompt}> ")
    with_chat_template(beautifier, CHATML)
    assert beautifier.request("a {system} cat") == "{{json}} [Say {more}. Answer in English.] <a {system} cat> "


def test_the_language_is_named_or_kept() -> None:
    assert "text to image generation in English." in PromptBeautifier().request("a cat")
    assert "text to image generation in Russian." in PromptBeautifier(language="Russian").request("a cat")
    kept = PromptBeautifier(language=None).request("красная кошка")
    assert "text to image generation in the language of the user's prompt." in kept
    assert "\nкрасная кошка\n" in kept
    own = PromptBeautifier(system_prompt="Write poems.", language="German").request("a cat")
    assert own.startswith("### System: Write poems. Answer in German.\n")


# ------------------------------------------------------------------------------------------------ what is answered
def test_answers_are_the_same_each_time_alone_and_in_a_list(folder: Path, beautifier: PromptBeautifier) -> None:
    answers = beautifier(["a red cat", "a blue dog"])
    again = PromptBeautifier(folder, max_new_tokens=12, device="cpu")
    assert [again("a red cat"), again("a blue dog")] == answers
    assert answers[0] != answers[1]
    assert not {"a red cat", "a blue dog"} & set(answers)


def test_a_seed_decides_and_leaves_the_global_generator_alone(folder: Path, beautifier: PromptBeautifier) -> None:
    state = torch.get_rng_state()
    drawn = beautifier(["a red cat", "a blue dog"], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = PromptBeautifier(folder, max_new_tokens=12, device="cpu", seed=1)
    assert [again("a blue dog"), again("a red cat")] == drawn[::-1]
    assert len({beautifier("a red cat", seed=seed) for seed in (1, 2, 3)}) == 3
    assert beautifier("a red cat") != drawn[0]


def test_the_global_generator_changes_no_answer(folder: Path, beautifier: PromptBeautifier) -> None:
    first = beautifier("a red cat", seed=5)
    torch.manual_seed(99)
    assert PromptBeautifier(folder, max_new_tokens=12, device="cpu")("a red cat", seed=5) == first


def test_what_is_known_is_not_asked_again(answering: Any) -> None:
    beautifier, asked = answering("a fine cat")
    assert beautifier(["a cat", "a dog", "a cat"]) == ["a fine cat"] * 3
    assert beautifier("a dog") == "a fine cat"
    assert len(asked) == 2
    beautifier("a dog", seed=3)
    assert len(asked) == 3
    assert [options["do_sample"] for _, options in asked] == [False, False, True]


def test_the_oldest_answer_is_forgotten_first(answering: Any, folder: Path) -> None:
    beautifier, asked = answering("a fine cat")
    small = PromptBeautifier(folder, cache_size=2)
    small._loaded = beautifier._loaded
    small(["a", "b", "c", "b", "c", "a"])
    assert [request.split("\n")[2] for request, _ in asked] == ["a", "b", "c", "a"]
    none = PromptBeautifier(folder, cache_size=0)
    none._loaded = beautifier._loaded
    none(["a", "a"])
    assert len(asked) == 6


def test_options_of_generation_and_loading_reach_the_model(folder: Path) -> None:
    beautifier = PromptBeautifier(
        folder,
        device="cpu",
        model_kwargs={"attn_implementation": "eager"},
        dtype=torch.bfloat16,
        max_new_tokens=3,
        generation_kwargs={"min_new_tokens": 3},
    )
    pipeline = beautifier._loaded()
    assert pipeline.model.dtype == torch.bfloat16
    assert pipeline.model.config._attn_implementation == "eager"
    lengths: list[int] = []
    generate = pipeline.model.generate
    pipeline.model.generate = lambda **options: lengths.append(len(generate(**options)[0])) or generate(**options)
    beautifier("a cat")
    asked = len(pipeline.tokenizer(beautifier.request("a cat")).input_ids)
    assert lengths == [asked + 3]


def test_an_unloaded_model_is_gone_its_answers_stay_and_it_comes_back(folder: Path) -> None:
    beautifier = PromptBeautifier(folder, max_new_tokens=4, device="cpu", keep_loaded=False)
    answer = beautifier("a red cat")
    assert beautifier._pipeline is None
    assert beautifier("a red cat") == answer
    beautifier.keep_loaded = True
    assert beautifier("a blue dog")
    model = weakref.ref(beautifier._pipeline.model)
    beautifier.unload()
    beautifier.unload()
    assert model() is None


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("  A red cat,\n soft light. ", "A red cat, soft light."),
        ('"A red cat, soft light"', "A red cat, soft light"),
        ("«Красная кошка»", "Красная кошка"),
        ('"A red cat" beside "a dog"', '"A red cat" beside "a dog"'),
        ("### Assistant:\nA red cat", "A red cat"),
        ('Assistant: **Prompt:** "A red cat"', "A red cat"),
        ("A red cat\n### User:\nAnother\n### Assistant:\nA dog", "A red cat"),
        ("<think>The user wants a cat.</think>\n\nA red cat", "A red cat"),
        ("The user wants a cat.</think>A red cat", "A red cat"),
        ("A street: wet, dark #neon", "A street: wet, dark #neon"),
    ],
)
def test_only_the_prompt_of_an_answer_is_kept(answering: Any, answer: str, prompt: str) -> None:
    assert answering(answer)[0]("a cat") == prompt


@pytest.mark.parametrize("answer", ["", " \n", '""', "### User: and then?", "<think>A cat, well,"])
def test_without_an_answer_the_prompt_stays_and_that_is_said(answering: Any, caplog: Any, answer: str) -> None:
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        assert answering(answer)[0]("a cat") == "a cat"
    diffusers_logging.disable_propagation()
    assert "'a cat' is empty" in caplog.text


def test_an_empty_prompt_stays_empty(answering: Any) -> None:
    beautifier, asked = answering("a fine cat")
    assert beautifier(["", "a cat"]) == ["", "a fine cat"]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"template": "{system} only"}, ValueError, "`template` is '{system} only'"),
        ({"language": " "}, ValueError, "`language` is ' '"),
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` is 0"),
        ({"cache_size": -1}, ValueError, "`cache_size` is -1"),
        ({"seed": "one"}, TypeError, "`seed` is 'one'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PromptBeautifier(**options)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [(3, TypeError, "`prompt` is 3"), (["a", 3], TypeError, "`prompt` is"), ([], ValueError, "`prompt` is an empty")],
)
def test_what_is_no_prompt_is_refused(prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PromptBeautifier()(prompt)
