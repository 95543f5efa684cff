"""Whole runs of the converted 2.0 repos, with the random draws that the original made, give its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

from kandinsky_diffusers import (
    KandinskyAncestralScheduler,
    KandinskyDDIMScheduler,
    KandinskyPNDMScheduler,
    sampling,
)
from tests.support.goldens import GoldenCase, GoldenFamily
from tests.support.parity import SAMPLER, Replay, assert_close, assert_same_picture


SAMPLERS = {
    "ddim_sampler": KandinskyDDIMScheduler,
    "plms_sampler": KandinskyPNDMScheduler,
    "p_sampler": KandinskyAncestralScheduler,
}


def scheduler_for(case: GoldenCase, repo: Path) -> Any:
    """With the settings with which it does what the original does, its bugs among it."""
    cls = SAMPLERS[case.parameters["sampler"]]
    settings: dict[str, Any] = {"start_timestep": "original"}
    subfolder = "scheduler"
    if cls is KandinskyAncestralScheduler:
        subfolder = "ancestral_scheduler"
        settings["threshold_reference"] = "first"
        if case.parameters.get("denoised_type") == "clip_denoised":
            settings |= {"denoised_range": 1.0, "denoised_thresholding": False}
    config: Any = cls.load_config(repo, subfolder=subfolder)
    return cls.from_config(config, **settings)


def draws(case: GoldenCase) -> list[torch.Tensor]:
    starts = ("noise.posterior", "noise.initial", "noise.add")
    start = [case.tensors[name] for name in starts if name in case.tensors]
    return [*start, *case.tensors.get("noise.steps", torch.empty(1))[:-1]]


def run(pipe: Any, case: GoldenCase, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> None:
    timesteps: list[int] = []
    denoise = sampling.denoise

    def recording(latents: torch.Tensor, steps: Any, *rest: Any, **named: Any) -> torch.Tensor:
        steps = list(steps)
        timesteps.extend(int(step) for step in steps)
        return denoise(latents, steps, *rest, **named)

    monkeypatch.setattr(sampling, "denoise", recording)
    replay = Replay.into(monkeypatch, draws(case))
    parameters = case.parameters
    side = parameters.get("image_size")
    height, width = parameters.get("h", side), parameters.get("w", side)
    latents = pipe(
        prompt=parameters["prompt"],
        height=height,
        width=width,
        num_inference_steps=parameters["num_steps"],
        guidance_scale=parameters["guidance_scale"],
        num_images_per_prompt=parameters.get("batch_size", 1),
        output_type="latent",
        **inputs,
    ).images
    assert not replay.draws
    assert timesteps == case.timesteps
    assert_close(latents / pipe.vae.config.scaling_factor, case["latents_over_scale"], SAMPLER, "latents")
    pixels = pipe.decode_latents(latents, height, width)
    if "decoded" in case.tensors:
        assert_close(pixels, case["decoded"][..., :height, :width], SAMPLER, "pixels")
    levels = ((pixels + 1.0) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert_same_picture(levels, case["image"])


def source(goldens: GoldenFamily, name: str = "image") -> Any:
    array = goldens.case("source_image")[name].numpy()
    return PIL.Image.fromarray(array) if name == "image" else array


@pytest.mark.parametrize("name", ["text2img_ddim", "text2img_ddim_n7", "text2img_plms", "text2img_p"])
@torch.no_grad()
def test_golden_text_to_image(
    goldens_20: GoldenFamily, converted_20: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, repo = goldens_20.case(name), converted_20 / "kandinsky-2-0"
    pipe = AutoPipelineForText2Image.from_pretrained(repo, scheduler=scheduler_for(case, repo))
    run(pipe, case, monkeypatch)


@pytest.mark.parametrize("name", ["img2img_ddim", "img2img_plms", "img2img_p"])
@torch.no_grad()
def test_golden_image_to_image(
    goldens_20: GoldenFamily, converted_20: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, repo = goldens_20.case(name), converted_20 / "kandinsky-2-0"
    pipe = AutoPipelineForImage2Image.from_pretrained(repo, scheduler=scheduler_for(case, repo))
    # the original's strength is the share that is skipped
    run(pipe, case, monkeypatch, image=source(goldens_20), strength=1.0 - case.parameters["strength"])


@pytest.mark.parametrize("name", ["inpaint_ddim", "inpaint_p", "inpaint_p_clip"])
@torch.no_grad()
def test_golden_inpainting(
    goldens_20: GoldenFamily, converted_20: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, repo = goldens_20.case(name), converted_20 / "kandinsky-2-0-inpaint"
    pipe = AutoPipelineForInpainting.from_pretrained(repo, scheduler=scheduler_for(case, repo))
    run(pipe, case, monkeypatch, image=source(goldens_20), mask_image=1 - source(goldens_20, "mask"))
