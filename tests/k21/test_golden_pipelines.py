"""Whole runs of the converted 2.1 repos, with the random draws that the original made, give its pictures."""

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
    KandinskyPriorPipeline,
    sampling,
)
from tests.support.goldens import GoldenCase, GoldenFamily
from tests.support.parity import SAMPLER, Replay, assert_close, assert_same_picture


SAMPLERS = {
    "ddim_sampler": KandinskyDDIMScheduler,
    "plms_sampler": KandinskyPNDMScheduler,
    "p_sampler": KandinskyAncestralScheduler,
}

# the settings with which the schedulers do what the original does, its bugs among it
AS_ORIGINAL = {"noise_beta_start": 1e-4, "noise_beta_end": 0.02, "start_timestep": "original"}

PRIOR_TOLERANCE = 1e-4  # of the recorded cases; measured 7e-6


def scheduler_for(case: GoldenCase, repo: Path) -> Any:
    cls = SAMPLERS[case.parameters["sampler"]]
    subfolder = "ancestral_scheduler" if cls is KandinskyAncestralScheduler else "scheduler"
    settings: dict[str, Any] = dict(AS_ORIGINAL)
    if cls is KandinskyAncestralScheduler:
        settings["threshold_reference"] = "first"
    config: Any = cls.load_config(repo, subfolder=subfolder)
    return cls.from_config(config, **settings)


def prior_draws(case: GoldenCase) -> list[torch.Tensor]:
    """Draws of the prior; a second run, for the negative prompt, is the second half of our one batch."""
    runs = [name.removesuffix(".initial") for name in case.tensors if name.endswith(".initial") and "prior." in name]
    initial = torch.cat([case[f"{run}.initial"] for run in sorted(runs)])
    steps = [case[f"{run}.steps"] for run in sorted(runs) if f"{run}.steps" in case.tensors]  # none with DDIM
    return [initial, *(torch.cat(steps, dim=1)[:-1] if steps else [])]


def decoder_draws(case: GoldenCase) -> list[torch.Tensor]:
    start = [case.tensors[name] for name in ("noise.initial", "noise.add") if name in case.tensors]
    return [*start, *case.tensors.get("noise.steps", torch.empty(1))[:-1]]


def arguments(case: GoldenCase) -> dict[str, Any]:
    parameters = case.parameters
    batch = {"num_images_per_prompt": parameters.get("batch_size", 1)}
    return {
        "height": parameters["h"],
        "width": parameters["w"],
        "num_inference_steps": parameters["num_steps"],
        "guidance_scale": parameters["guidance_scale"],
        **batch,
    }


def prior_arguments(case: GoldenCase) -> dict[str, Any]:
    """An empty negative prompt of the original's decoder stands for the embedding of no picture, as None does here."""
    negative = case.parameters.get("negative_decoder_prompt", "")
    return {
        "prompt": case.parameters["prompt"],
        "prior_guidance_scale": case.parameters["prior_cf_scale"],
        "prior_num_inference_steps": int(case.parameters["prior_steps"].removeprefix("ddim")),
        "negative_prompt": negative or None,
        "negative_prior_prompt": case.parameters.get("negative_prior_prompt", ""),
    }


def prior_scheduler(steps: str, pipe: Any, component: str = "scheduler") -> None:
    """The original's "ddim25" asks for DDIM in the prior, "25" for its ancestral sampler."""
    if steps.startswith("ddim"):
        ddim = KandinskyDDIMScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",
            clip_sample=True,
            clip_sample_range=10.0,
            set_alpha_to_one=True,
        )
        setattr(pipe, component, ddim)


class Seen:
    """What went through the loops: the prior's, then the decoder's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.starts: list[torch.Tensor] = []
        self.ends: list[torch.Tensor] = []
        self.timesteps: list[list[int]] = []
        denoise = sampling.denoise

        def recording(latents: torch.Tensor, timesteps: Any, *rest: Any, **named: Any) -> torch.Tensor:
            self.starts.append(latents)
            steps = list(timesteps)
            self.timesteps.append([int(t) for t in steps])
            self.ends.append(denoise(latents, steps, *rest, **named))
            return self.ends[-1]

        monkeypatch.setattr(sampling, "denoise", recording)

    def image_embeds(self, pipe: Any) -> torch.Tensor:
        """What the prior made of the prompts (rows of a negative prompt come after them)."""
        wanted = len(self.ends[1])
        return pipe.prior_pipe.decode_latents(self.ends[0])[:wanted]


def check(case: GoldenCase, pipe: Any, latents: torch.Tensor) -> None:
    assert_close(latents, case["latents_over_scale"], SAMPLER, "latents")
    height, width = case.parameters["h"], case.parameters["w"]
    pixels = pipe.decoder_pipe.decode_latents(latents, height, width)
    if "decoded" in case.tensors:
        assert_close(pixels, case["decoded"][..., :height, :width], SAMPLER, "pixels")
    levels = ((pixels + 1.0) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert_same_picture(levels, case["image"])


def source(goldens: GoldenFamily, name: str = "image") -> Any:
    array = goldens.case("source_image")[name].numpy()
    return PIL.Image.fromarray(array) if name == "image" else array


@pytest.mark.parametrize("name", ["text2img_ddim", "text2img_plms", "text2img_p", "text2img_p_neg"])
@torch.no_grad()
def test_golden_text_to_image(
    goldens_21: GoldenFamily, converted_21: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, repo = goldens_21.case(name), converted_21 / "kandinsky-2-1"
    pipe = AutoPipelineForText2Image.from_pretrained(repo, scheduler=scheduler_for(case, repo))
    prior_scheduler(case.parameters["prior_steps"], pipe, "prior_scheduler")
    seen = Seen(monkeypatch)
    replay = Replay.into(monkeypatch, [*prior_draws(case), *decoder_draws(case)])
    latents = pipe(**prior_arguments(case), **arguments(case), output_type="latent").images
    assert not replay.draws
    assert seen.timesteps[-1] == case.timesteps
    assert_close(seen.image_embeds(pipe), case["image_embeds"], PRIOR_TOLERANCE, "image embedding")
    check(case, pipe, latents)


@pytest.mark.parametrize("name", ["img2img_ddim", "img2img_p"])
@torch.no_grad()
def test_golden_image_to_image(
    goldens_21: GoldenFamily, converted_21: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, repo = goldens_21.case(name), converted_21 / "kandinsky-2-1"
    pipe = AutoPipelineForImage2Image.from_pretrained(repo, scheduler=scheduler_for(case, repo))
    prior_scheduler(case.parameters["prior_steps"], pipe, "prior_scheduler")
    seen = Seen(monkeypatch)
    replay = Replay.into(monkeypatch, [*prior_draws(case), *decoder_draws(case)])
    latents = pipe(
        image=source(goldens_21),
        strength=1.0 - case.parameters["strength"],  # the original's is the share that is skipped
        **prior_arguments(case),
        **arguments(case),
        output_type="latent",
    ).images
    assert not replay.draws
    assert seen.timesteps[-1] == case.timesteps
    assert_close(seen.image_embeds(pipe), case["image_embeds"], PRIOR_TOLERANCE, "image embedding")
    assert_close(seen.starts[-1], case["start_latents"], SAMPLER, "noised picture")
    check(case, pipe, latents)


@pytest.mark.parametrize("name", ["inpaint_ddim", "inpaint_p"])
@torch.no_grad()
def test_golden_inpainting(
    goldens_21: GoldenFamily, converted_21: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, repo = goldens_21.case(name), converted_21 / "kandinsky-2-1-inpaint"
    pipe = AutoPipelineForInpainting.from_pretrained(repo, scheduler=scheduler_for(case, repo))
    prior_scheduler(case.parameters["prior_steps"], pipe, "prior_scheduler")
    seen = Seen(monkeypatch)
    replay = Replay.into(monkeypatch, [*prior_draws(case), *decoder_draws(case)])
    latents = pipe(
        image=source(goldens_21),
        mask_image=1 - source(goldens_21, "mask"),  # the original's 1 keeps
        **prior_arguments(case),
        **arguments(case),
        output_type="latent",
    ).images
    assert not replay.draws
    assert seen.timesteps[-1] == case.timesteps
    assert_close(seen.image_embeds(pipe), case["image_embeds"], PRIOR_TOLERANCE, "image embedding")
    check(case, pipe, latents)


@torch.no_grad()
def test_golden_mix(goldens_21: GoldenFamily, converted_21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, repo = goldens_21.case("mix_images_p"), converted_21 / "kandinsky-2-1"
    pipe = AutoPipelineForText2Image.from_pretrained(repo, scheduler=scheduler_for(case, repo))
    runs = sorted({name.rsplit(".", 1)[0] for name in case.tensors if name.startswith("prior.")})
    draws = [draw for run in runs for draw in (case[f"{run}.initial"], *case[f"{run}.steps"][:-1])]
    replay = Replay.into(monkeypatch, [*draws, *decoder_draws(case)])
    picture = source(goldens_21)
    embeds = pipe.prior_pipe.interpolate(
        [picture if item == "image of case source_image" else item for item in case.parameters["images_texts"]],
        case.parameters["weights"],
        num_inference_steps=int(case.parameters["prior_steps"]),
        guidance_scale=case.parameters["prior_cf_scale"],
        negative_prior_prompt=case.parameters.get("negative_prior_prompt", ""),
        negative_prompt=case.parameters.get("negative_decoder_prompt", ""),
    )
    for name in ("image_embeds", "negative_image_embeds"):
        every_picture = embeds[name].expand_as(case[name])  # the original mixes once for a whole batch
        assert_close(every_picture, case[name], PRIOR_TOLERANCE, name)
    latents = pipe.decoder_pipe("", **embeds, **arguments(case), output_type="latent").images
    assert not replay.draws
    check(case, pipe, latents)


@pytest.mark.parametrize("exact", [False, True], ids=["cached", "uncached"])
@pytest.mark.parametrize("name", ["prior_sample", "prior_sample_25", "prior_sample_ddim"])
def test_golden_prior_sampling(
    goldens_21: GoldenFamily, converted_21: Path, monkeypatch: pytest.MonkeyPatch, name: str, exact: bool
) -> None:
    case, features = goldens_21.case(name), goldens_21.case("prior")

    class WithRecordedText(KandinskyPriorPipeline):
        def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            halves = (features[key].chunk(2) for key in ("text_emb", "text_enc", "mask"))
            return tuple(torch.cat([unconditional, conditional]) for conditional, unconditional in halves)

    pipe = WithRecordedText.from_pretrained(converted_21 / "kandinsky-2-1-prior").exact_reference(exact)
    steps = case.parameters["steps"]
    prior_scheduler(steps, pipe)
    draws = [case["prior.0.initial"], *case.tensors.get("prior.0.steps", torch.empty(1))[:-1]]
    Replay.into(monkeypatch, draws)
    scales = case["cf_guidance_scales"]
    embeds = pipe(
        ["a prompt"] * len(scales),
        num_inference_steps=int(steps.removeprefix("ddim")),
        guidance_scale=scales.tolist(),
    )
    assert_close(embeds.image_embeds, case["out"], PRIOR_TOLERANCE, "image embedding")
