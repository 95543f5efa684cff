"""Whole runs of the converted 3.0 and 3.1 repos, with the random draws that the original made, give its pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDPMScheduler,
    DiffusionPipeline,
)
from diffusers.schedulers import scheduling_ddpm

from kandinsky_diffusers import Region, sampling
from tests.fixtures import Recorded
from tests.support.goldens import GoldenCase, GoldenFamily
from tests.support.parity import SAMPLER, Replay, assert_close, assert_same_picture


Load = Callable[[Any, str, str], Any]


@pytest.fixture(scope="module")
def load(recorded: Recorded) -> Load:
    """`load(AutoPipelineForText2Image, "3.1", "kandinsky-3-1")`: a new pipeline, on models that are loaded once."""
    loaded = functools.cache(lambda version, name: DiffusionPipeline.from_pretrained(recorded(version) / name))
    return lambda auto, version, name: auto.from_pipe(loaded(version, name))


def replay(case: GoldenCase, monkeypatch: pytest.MonkeyPatch) -> Replay:
    draws = case.random()
    return Replay.into(monkeypatch, [draws[name] for name in sorted(draws)])


def timesteps_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The timesteps of the loop that runs next."""
    seen: list[int] = []
    denoise = sampling.denoise

    def recording(latents: torch.Tensor, timesteps: Any, *rest: Any, **named: Any) -> torch.Tensor:
        seen.extend(int(t) for t in timesteps)
        return denoise(latents, timesteps, *rest, **named)

    monkeypatch.setattr(sampling, "denoise", recording)
    return seen


def check(case: GoldenCase, pipe: Any, latents: torch.Tensor, reference: str = "latents") -> None:
    assert_close(latents, case[reference], SAMPLER, reference)
    if "image_uint8" in case.tensors and reference == "latents":  # made of these
        height, width = case["image_uint8"].shape[-3:-1]
        pixels = pipe.decode_latents(latents, height, width)
        if "decoded" in case.tensors:
            assert_close(pixels, case["decoded"], SAMPLER, "pixels")
        levels = (((pixels + 1.0) / 2.0).clamp(0, 1) * 255).floor().permute(0, 2, 3, 1)  # the original cuts off
        assert_same_picture(levels, case["image_uint8"])


def arguments(case: GoldenCase) -> dict[str, Any]:
    names = {"text": "prompt", "negative_text": "negative_prompt", "steps": "num_inference_steps"}
    same = ("guidance_scale", "width", "height")
    given = {names.get(name, name): value for name, value in case.parameters.items() if name in (*names, *same)}
    return {**given, "num_images_per_prompt": case.parameters.get("images_num", 1), "output_type": "latent"}


@pytest.mark.parametrize("name", ["e2e_t2i", "e2e_t2i_negative"])
@torch.no_grad()
def test_golden_text_to_image_30(
    goldens_30: GoldenFamily, load: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, pipe = goldens_30.case(name), load(AutoPipelineForText2Image, "3.0", "kandinsky-3")
    draws, timesteps = replay(case, monkeypatch), timesteps_of(monkeypatch)
    latents = pipe(**arguments(case)).images
    assert not draws.draws
    assert timesteps == case.timesteps
    check(case, pipe, latents)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounded"])
@pytest.mark.parametrize("name", ["e2e_t2i", "e2e_t2i_negative", "e2e_t2i_nondividing_steps"])
@torch.no_grad()
def test_golden_text_to_image_31(
    goldens_31: GoldenFamily, load: Load, monkeypatch: pytest.MonkeyPatch, name: str, exact: bool
) -> None:
    """The original rounds the sampler's coefficients to float32, which a setting does, too."""
    case, pipe = goldens_31.case(name), load(AutoPipelineForText2Image, "3.1", "kandinsky-3-1")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, exact_coefficients=exact)
    draws, timesteps = replay(case, monkeypatch), timesteps_of(monkeypatch)
    latents = pipe(**arguments(case)).images
    assert not draws.draws
    assert timesteps == case.timesteps
    check(case, pipe, latents, "latents_exact_coefficients" if exact else "latents")


@torch.no_grad()
def test_golden_eta_and_two_pictures(goldens_31: GoldenFamily, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    case = goldens_31.case("e2e_t2i_eta05_bs2")
    pipe = load(AutoPipelineForText2Image, "3.1", "kandinsky-3-1")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, eta=case.parameters["eta"])
    draws = replay(case, monkeypatch)
    latents = pipe(**arguments(case)).images
    assert not draws.draws
    check(case, pipe, latents)


@torch.no_grad()
def test_golden_flash(goldens_31: GoldenFamily, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    case = goldens_31.case("e2e_flash")
    pipe = load(AutoPipelineForText2Image, "3.1", "kandinsky-3-1-flash")
    draws, timesteps = replay(case, monkeypatch), timesteps_of(monkeypatch)
    latents = pipe(**arguments(case)).images
    assert not draws.draws
    assert timesteps == case.timesteps
    check(case, pipe, latents)


@pytest.mark.parametrize(("version", "name"), [("30", "e2e_inpaint_negative"), ("31", "e2e_inpaint")])
@pytest.mark.parametrize("sized", [True, False], ids=["size given", "size of the original"])
@torch.no_grad()
def test_golden_inpainting(
    request: pytest.FixtureRequest,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    name: str,
    sized: bool,
) -> None:
    case = request.getfixturevalue(f"goldens_{version}").case(name)
    repo = {"30": "kandinsky-3-inpaint", "31": "kandinsky-3-1-inpaint"}[version]
    pipe = load(AutoPipelineForInpainting, f"3.{version[-1]}", repo)
    size = dict(zip(("height", "width"), case["image_uint8"].shape[1:3], strict=True)) if sized else {}
    draws, timesteps = replay(case, monkeypatch), timesteps_of(monkeypatch)
    latents = pipe(
        **arguments(case),
        **size,
        image=PIL.Image.fromarray(case["image_in_uint8"].numpy()),
        mask_image=case["mask_in_uint8"].double().numpy(),
    ).images
    assert not draws.draws
    assert timesteps == case.timesteps
    exact = "latents_exact_coefficients"
    check(case, pipe, latents, exact if exact in case.tensors else "latents")


@torch.no_grad()
def test_golden_preparation_for_inpainting(
    goldens_31: GoldenFamily, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = goldens_31.case("e2e_inpaint")
    pipe = load(AutoPipelineForInpainting, "3.1", "kandinsky-3-1-inpaint")
    seen: dict[str, torch.Tensor] = {}

    def predict(latents: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.update(conditions)
        return torch.zeros(2 * len(latents), *latents.shape[1:])

    monkeypatch.setattr(pipe, "predict_noise", predict)
    picture = PIL.Image.fromarray(case["image_in_uint8"].numpy())
    pipe("a hat", image=picture, mask_image=case["mask_in_uint8"].double().numpy(), num_inference_steps=1)
    assert_close(seen["mask_image"], case["latent_mask"], 2e-5, "mask")
    assert_close(seen["masked_image"], case["masked_latent"], 2e-5, "latents of the masked picture")


# ------------------------------------------------------------------------------------------------ the fork
def fork_states(pipe: Any, text: str, length: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """All states, those of padding zero, as the diffusers-based code base of 3.1 makes them."""
    tokens = pipe.tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    states = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask[..., None], tokens.attention_mask


def fork_arguments(case: GoldenCase, pipe: Any, negative: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    states, mask = fork_states(pipe, case.parameters["prompt"])
    same = ("width", "height", "num_inference_steps", "guidance_scale", "strength")
    return {
        **{name: value for name, value in case.parameters.items() if name in same},
        "prompt_embeds": states,
        "attention_mask": mask,
        "negative_prompt_embeds": negative[0],
        "negative_attention_mask": negative[1],
        "output_type": "latent",
    }


def fork_regions(case: GoldenCase, pipe: Any) -> list[Region]:
    """Its regions; that of the first covers all, whatever its mask."""
    texts = zip(case.parameters["regional_prompts"], case.parameters["regional_negative_prompts"], strict=True)
    regions = []
    for index, (prompt, negative) in enumerate(texts):
        mask = case[f"mask_{index}"] if index else torch.ones_like(case["mask_0"])
        regions.append(Region(None, mask, None, *fork_states(pipe, prompt), *fork_states(pipe, negative)))
    return regions


def fork_replay(case: GoldenCase, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Replay:
    """It drew with a scheduler of diffusers, which draws by itself."""
    pipe.scheduler = DDPMScheduler(**case.parameters["scheduler"])
    draws = replay(case, monkeypatch)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", draws)
    return draws


@pytest.mark.parametrize("name", ["fork_t2i", "fork_t2i_negative"])
@torch.no_grad()
def test_golden_text_to_image_of_the_fork(
    goldens_31: GoldenFamily, load: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, pipe = goldens_31.case(name), load(AutoPipelineForText2Image, "3.1", "kandinsky-3-1")
    draws = fork_replay(case, pipe, monkeypatch)
    negative = fork_states(pipe, case.parameters.get("negative_prompt", ""))
    latents = pipe(**fork_arguments(case, pipe, negative)).images
    assert not draws.draws
    check(case, pipe, latents)


@torch.no_grad()
def test_golden_image_to_image_of_the_fork(
    goldens_31: GoldenFamily, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = goldens_31.case("fork_img2img")
    pipe = load(AutoPipelineForImage2Image, "3.1", "kandinsky-3-1")
    draws = fork_replay(case, pipe, monkeypatch)
    states, mask = fork_states(pipe, case.parameters["prompt"])
    nothing = torch.zeros_like(states), torch.zeros_like(mask)
    encoded, encode = [], pipe.encode_pixels
    monkeypatch.setattr(pipe, "encode_pixels", lambda *given: encoded.append(encode(*given)) or encoded[-1])
    picture = PIL.Image.fromarray(case["image_in_uint8"].numpy())
    latents = pipe(image=picture, **fork_arguments(case, pipe, nothing)).images
    assert not draws.draws
    assert_close(encoded[0], case["init_latents"], SAMPLER, "latents of the picture")
    check(case, pipe, latents)


@torch.no_grad()
def test_golden_regional_prompting_of_the_fork(
    goldens_31: GoldenFamily, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = goldens_31.case("fork_regional")
    pipe = load(AutoPipelineForText2Image, "3.1", "kandinsky-3-1")
    draws = fork_replay(case, pipe, monkeypatch)
    negative = fork_states(pipe, case.parameters["negative_prompt"])
    latents = pipe(
        **fork_arguments(case, pipe, negative),
        regions=fork_regions(case, pipe),
        regional_base_ratio=case.parameters["base_ratio"],
    ).images
    assert not draws.draws
    check(case, pipe, latents)
