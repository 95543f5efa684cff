"""`prompt_beautifier=` of every pipeline that takes prompts: its prompts are drawn, and bad ones are refused early."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline

import kandinsky_diffusers
from kandinsky_diffusers import registry
from tests.support import tiny22


ALL = [
    *registry.OTHER_PIPELINES,
    *(cls for family in registry.FAMILIES.values() for entry in family.values() for cls in entry if cls),
]
WITH_PROMPT = [cls for cls in ALL if "prompt" in inspect.signature(cls.__call__).parameters]

PIPELINES = {
    "KandinskyV20Pipeline": "2.0",
    "KandinskyV20Img2ImgPipeline": "2.0",
    "KandinskyV20InpaintPipeline": "2.0",
    "KandinskyPriorPipeline": "2.1",
    "KandinskyPipeline": "2.1",
    "KandinskyCombinedPipeline": "2.1",
    "KandinskyImg2ImgCombinedPipeline": "2.1",
    "KandinskyInpaintCombinedPipeline": "2.1",
    "KandinskyV22PriorPipeline": "2.2",
    "KandinskyV22PriorEmb2EmbPipeline": "2.2",
    "KandinskyV22CombinedPipeline": "2.2",
    "KandinskyV22Img2ImgCombinedPipeline": "2.2",
    "KandinskyV22InpaintCombinedPipeline": "2.2",
    "Kandinsky3Pipeline": "3.1",
    "Kandinsky3Img2ImgPipeline": "3.1",
    "Kandinsky3InpaintPipeline": "3.1",
}


class Counting:
    """A beautifier that remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> list[str]:
        self.calls.append(prompts)
        return [f"{prompt} on a bed" for prompt in prompts]


@pytest.fixture(scope="module")
def components(converted_20: Path, converted_21: Path, converted_31: Path) -> Callable[[str], dict[str, Any]]:
    """All components of a version."""

    def of(repo: Path) -> dict[str, Any]:
        return DiffusionPipeline.from_pretrained(repo).components

    prior = {f"prior_{name}": part for name, part in of(converted_21 / "kandinsky-2-1-prior").items()}
    made = {
        "2.0": of(converted_20 / "kandinsky-2-0"),
        "2.1": {**of(converted_21 / "kandinsky-2-1"), **prior},
        "2.2": tiny22.tiny_components(),
        "3.1": of(converted_31 / "kandinsky-3-1"),
    }
    return made.__getitem__


@pytest.fixture
def make(components: Any) -> Callable[[str], Any]:
    """A quiet pipeline of that name."""

    def build(name: str) -> Any:
        cls: Any = getattr(kandinsky_diffusers, name)
        prefix = "prior_" if "Prior" in name else ""
        parts = components(PIPELINES[name])
        names = [key for key in inspect.signature(cls.__init__).parameters if prefix + key in parts]
        pipe = cls(**{key: parts[prefix + key] for key in names})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def inputs(pipe: Any, rows: int = 1) -> dict[str, Any]:
    """What a pipeline needs beside prompts to run quickly."""
    name = type(pipe).__name__
    given: dict[str, Any] = {
        "num_inference_steps": 2 if "Prior" in name else 1,
        "generator": torch.Generator().manual_seed(0),
    }
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    if "Prior" not in name:
        given |= {"height": 64, "width": 64, "output_type": "latent"}
    if "Combined" in name:
        given |= {"prior_num_inference_steps": 2}
    if "Img2Img" in name or "Emb2Emb" in name:
        given |= {"image": picture, "strength": 0.6, "num_inference_steps": 2}
    if "Inpaint" in name:
        given |= {"image": picture, "mask_image": PIL.Image.new("L", (64, 64), "white")}
    if name == "KandinskyPipeline":
        width = pipe.unet.config.cross_attention_dim
        given |= {key: torch.ones(rows, width) for key in ("image_embeds", "negative_image_embeds")}
    return given


def drawn(pipe: Any, prompt: Any, **options: Any) -> torch.Tensor:
    rows = len(prompt) if isinstance(prompt, list) else 1
    return pipe(prompt=prompt, negative_prompt="ugly", return_dict=False, **inputs(pipe, rows), **options)[0]


@pytest.mark.parametrize("cls", WITH_PROMPT, ids=lambda cls: cls.__name__)
def test_every_pipeline_with_prompts_takes_one(cls: type) -> None:
    parameter = inspect.signature(cls.__call__).parameters["prompt_beautifier"]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert parameter.default is None


@pytest.mark.parametrize("name", PIPELINES)
def test_the_better_prompts_are_drawn_and_the_negative_one_stays(make: Any, name: str) -> None:
    pipe, beautifier = make(name), Counting()
    better = drawn(pipe, ["a cat", "a dog"], prompt_beautifier=beautifier)
    assert beautifier.calls == [["a cat", "a dog"]]
    assert torch.equal(better, drawn(pipe, ["a cat on a bed", "a dog on a bed"]))
    assert not torch.equal(better, drawn(pipe, ["a cat", "a dog"]))


@pytest.mark.parametrize("name", ["KandinskyV20Pipeline", "KandinskyCombinedPipeline", "Kandinsky3Pipeline"])
def test_a_single_prompt_and_several_pictures_of_it(make: Any, name: str) -> None:
    pipe, beautifier = make(name), Counting()
    better = drawn(pipe, "a cat", num_images_per_prompt=2, prompt_beautifier=beautifier)
    assert beautifier.calls == [["a cat"]]
    assert torch.equal(better, drawn(pipe, "a cat on a bed", num_images_per_prompt=2))


FAULTS = [
    ("Beautiful!", TypeError, "`prompt_beautifier` is 'Beautiful!'"),
    (lambda prompts: prompts[0], TypeError, "`prompt_beautifier` has returned 'a cat'"),
    (lambda prompts: [None], TypeError, r"`prompt_beautifier` has returned \[None\]"),
    (lambda prompts: prompts * 2, ValueError, "`prompt_beautifier` has returned 2 prompts; .* each of 1"),
]


@pytest.mark.parametrize(("beautifier", "error", "message"), FAULTS)
@pytest.mark.parametrize("name", ["KandinskyV22PriorPipeline", "KandinskyCombinedPipeline", "Kandinsky3Pipeline"])
def test_bad_beautifiers_are_refused_before_a_model_runs(
    make: Any, monkeypatch: pytest.MonkeyPatch, name: str, beautifier: Any, error: type[Exception], message: str
) -> None:
    pipe = make(name)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            monkeypatch.setattr(part, "forward", lambda *args, **kwargs: pytest.fail("a model ran"))
    with pytest.raises(error, match=message):
        drawn(pipe, "a cat", prompt_beautifier=beautifier)


@pytest.mark.parametrize("name", ["KandinskyV20Pipeline", "KandinskyPipeline", "Kandinsky3Pipeline"])
def test_states_of_a_text_encoder_cannot_be_beautified(make: Any, name: str) -> None:
    pipe, beautifier = make(name), Counting()
    names = [key for key in inspect.signature(type(pipe).encode_prompt).parameters if "embeds" in key or "mask" in key]
    states = dict(zip(names, pipe.encode_prompt("a cat"), strict=True))
    with pytest.raises(ValueError, match="`prompt_beautifier` is given without `prompt`"):
        pipe(prompt_beautifier=beautifier, **{**inputs(pipe), **states})
    assert not beautifier.calls


@pytest.mark.parametrize("name", ["KandinskyCombinedPipeline", "KandinskyV22CombinedPipeline", "Kandinsky3Pipeline"])
def test_no_beautifier_runs_where_another_argument_is_wrong(make: Any, name: str) -> None:
    pipe, beautifier = make(name), Counting()
    wrong = {"prior_num_inference_steps": 0} if "Combined" in name else {"callback_steps": 0, "callback": print}
    with pytest.raises(ValueError, match=r"`(num_inference_steps|callback_steps)` is 0"):
        pipe("a cat", prompt_beautifier=beautifier, **{**inputs(pipe), **wrong})
    assert not beautifier.calls
