"""Whole runs with the converted ControlNet, with the random draws that the original made, give its latents."""

from __future__ import annotations

from typing import Any

import PIL.Image
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image

from kandinsky_diffusers import Kandinsky3ControlNetModel
from tests.fixtures import Recorded
from tests.k3.test_golden_pipelines import check, fork_arguments, fork_regions, fork_replay, fork_states
from tests.support.goldens import GoldenFamily
from tests.support.parity import SAMPLER, assert_close


@pytest.fixture
def controlnet(recorded: Recorded) -> Any:
    return Kandinsky3ControlNetModel.from_pretrained(recorded("3-controlnet") / "kandinsky-3-controlnet-hed")


@pytest.mark.parametrize("run", ["", "second_run"])
@torch.no_grad()
def test_golden_text_to_image(
    goldens_controlnet: GoldenFamily, recorded: Recorded, controlnet: Any, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    """Text is cut after one token of padding, and the negative prompt is cut or padded to that length."""
    case = goldens_controlnet.case("e2e_controlnet")
    pipe = AutoPipelineForText2Image.from_pretrained(recorded("3.1") / "kandinsky-3-1", controlnet=controlnet)
    draws = fork_replay(case, pipe, monkeypatch)
    states, mask = fork_states(pipe, case.parameters["prompt"])
    length = min(int(mask.sum()) + 1, mask.shape[1])
    negative = fork_states(pipe, case.parameters.get("negative_prompt", ""), length)
    arguments = fork_arguments(case, pipe, negative)
    arguments |= {"prompt_embeds": states[:, :length], "attention_mask": mask[:, :length]}
    settings = case.parameters[run] if run else {"k": 1.0}
    arguments["controlnet_conditioning_scale"] = settings["k"]
    arguments |= {name: value for name, value in settings.items() if name.startswith("control_guidance")}
    latents = pipe(image=case["hint"], **arguments).images
    assert not draws.draws
    check(case, pipe, latents, "latents_k06_start_end" if run else "latents")


@torch.no_grad()
def test_golden_image_to_image(
    goldens_controlnet: GoldenFamily, recorded: Recorded, controlnet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = goldens_controlnet.case("e2e_controlnet_img2img")
    pipe = AutoPipelineForImage2Image.from_pretrained(recorded("3.1") / "kandinsky-3-1", controlnet=controlnet)
    draws = fork_replay(case, pipe, monkeypatch)
    encoded, encode = [], pipe.encode_pixels
    monkeypatch.setattr(pipe, "encode_pixels", lambda *given: encoded.append(encode(*given)) or encoded[-1])
    picture = PIL.Image.fromarray(case["image_in_uint8"].numpy())
    negative = fork_states(pipe, case.parameters.get("negative_prompt", ""))
    arguments = fork_arguments(case, pipe, negative)
    latents = pipe(image=picture, control_image=case["hint"], **arguments).images
    assert not draws.draws
    assert_close(encoded[0], case["init_latents"], SAMPLER, "latents of the picture")
    check(case, pipe, latents)


@torch.no_grad()
def test_golden_regional_prompting(
    goldens_controlnet: GoldenFamily, recorded: Recorded, controlnet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ControlNet sees the prompt of the whole picture alone."""
    case = goldens_controlnet.case("e2e_controlnet_regional")
    pipe = AutoPipelineForText2Image.from_pretrained(recorded("3.1") / "kandinsky-3-1", controlnet=controlnet)
    draws = fork_replay(case, pipe, monkeypatch)
    negative = fork_states(pipe, case.parameters["negative_prompt"])
    latents = pipe(
        **fork_arguments(case, pipe, negative),
        image=case["hint"],
        controlnet_conditioning_scale=case.parameters["k"],
        regions=fork_regions(case, pipe),
        regional_base_ratio=case.parameters["base_ratio"],
    ).images
    assert not draws.draws
    check(case, pipe, latents)
