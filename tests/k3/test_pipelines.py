"""What the 3.x pipelines do with batches, sizes, texts, callbacks and components."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import kandinsky_diffusers
from kandinsky_diffusers import (
    Kandinsky3Img2ImgPipeline,
    Kandinsky3InpaintPipeline,
    Kandinsky3Pipeline,
    sampling,
)
from tests.k3.conftest import QUICK, SIZE, TASKS, float64, seeded
from tests.support.parity import assert_close


Make = Callable[..., Any]
PROMPTS = ["a red fox", "a very lazy dog jumps over the table of a sad cat", ""]


# ------------------------------------------------------------------------------------------------ batches
LIST = ["ugly", "a picture of low quality", "a cat"]


@pytest.mark.parametrize(
    ("name", "kind", "negative"),
    [
        ("Kandinsky3Pipeline", "3.1", None),
        ("Kandinsky3Pipeline", "3.1 inpaint", LIST),
        ("Kandinsky3Img2ImgPipeline", "flash", None),
        ("Kandinsky3Img2ImgPipeline", "3.1", LIST),
        ("Kandinsky3InpaintPipeline", "3.0", None),
        ("Kandinsky3InpaintPipeline", "3.1 inpaint", "ugly"),
    ],
)
def test_a_picture_of_a_batch_is_the_picture_made_alone(
    make: Make, inputs: Any, name: str, kind: str, negative: Any
) -> None:
    pipe = float64(make(getattr(kandinsky_diffusers, name), kind))
    guidance = {"guidance_scale": 3.0}
    batch = inputs(name, prompt=PROMPTS, negative_prompt=negative, num_images_per_prompt=2, **guidance)
    together = pipe(**batch, generator=seeded(*range(6))).images
    for number in (0, 3):
        prompt = number // 2
        own = negative[prompt] if isinstance(negative, list) else negative
        single = inputs(name, prompt=PROMPTS[prompt], negative_prompt=own, **guidance)
        alone = pipe(**single, generator=seeded(number)).images
        assert_close(together[number], alone[0], 1e-5, f"picture {number}")


@pytest.mark.parametrize("name", TASKS[:2])
def test_without_a_null_embedding_too(make: Make, inputs: Any, name: str) -> None:
    pipe = float64(make(getattr(kandinsky_diffusers, name), "stock"))
    together = pipe(**inputs(name, prompt=PROMPTS, num_images_per_prompt=2), generator=seeded(*range(6))).images
    for number in (3, 5):
        alone = pipe(**inputs(name, prompt=PROMPTS[number // 2]), generator=seeded(number)).images
        assert_close(together[number], alone[0], 1e-5, f"picture {number}")


def test_pictures_and_masks_may_come_one_for_each_prompt(make: Make, picture: Any, mask: Any) -> None:
    pipe = float64(make(Kandinsky3InpaintPipeline, "3.1 inpaint"))
    pictures, masks = [picture, picture.rotate(90)], [mask, mask.rotate(180)]
    together = pipe(PROMPTS[:2], pictures, masks, **QUICK, generator=seeded(0, 1)).images
    for number in range(2):
        alone = pipe(PROMPTS[number], pictures[number], masks[number], **QUICK, generator=seeded(number)).images
        assert_close(together[number], alone[0], 1e-5, f"picture {number}")


# ------------------------------------------------------------------------------------------------ sizes, output
@pytest.mark.parametrize(("height", "width"), [(64, 64), (70, 100), (33, 129)])
@pytest.mark.parametrize("name", TASKS)
def test_the_size_asked_for_comes_out(make: Make, inputs: Any, name: str, height: int, width: int) -> None:
    pipe = make(getattr(kandinsky_diffusers, name), "3.1")
    assert pipe(**inputs(name, height=height, width=width, output_type="pil")).images[0].size == (width, height)


def test_image_to_image_keeps_the_size_of_its_picture(make: Make, picture: Any) -> None:
    pipe = make(Kandinsky3Img2ImgPipeline, "3.1")
    image = picture.resize((90, 71))
    assert pipe("a red fox", image, num_inference_steps=4).images[0].size == (90, 71)
    array = np.asarray(image)
    assert pipe("a red fox", array, num_inference_steps=4, output_type="pt").images.shape == (1, 3, 71, 90)


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((150, 90), (128, 64)), ((20, 70), (64, 64)), ((1500, 1100), (1152, 832)), ((1024, 64), (1024, 64))],
)
def test_inpainting_takes_the_size_that_the_original_takes(
    make: Make, picture: Any, size: tuple[int, int], drawn: tuple[int, int]
) -> None:
    pipe = make(Kandinsky3InpaintPipeline, "3.1 inpaint")
    height, width = pipe._default_size({"image": picture.resize(size)})
    assert (width, height) == drawn


def test_text_to_image_is_1024_pixels_wide_and_high_by_default(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make(Kandinsky3Pipeline, "flash")
    monkeypatch.setattr(pipe, "predict_noise", lambda latents, *_: latents)
    assert pipe("a red fox", output_type="latent").images.shape == (1, 4, 128, 128)


@pytest.mark.parametrize(("output_type", "kind"), [("np", np.ndarray), ("pt", torch.Tensor), ("latent", torch.Tensor)])
def test_output_types(make: Make, output_type: str, kind: type) -> None:
    pipe = make(Kandinsky3Pipeline, "3.0")
    (images,) = pipe("a red fox", **{**QUICK, "output_type": output_type}, return_dict=False)
    assert isinstance(images, kind)
    assert output_type == "latent" or (images.min() >= 0 and images.max() <= 1)


@pytest.mark.parametrize(
    ("name", "mode"),
    [*(("Kandinsky3Img2ImgPipeline", mode) for mode in ("RGBA", "LA", "P", "1")), ("Kandinsky3InpaintPipeline", "P")],
)
def test_pictures_of_other_modes_are_made_rgb_before_they_are_resized(
    make: Make, inputs: Any, picture: Any, name: str, mode: str
) -> None:
    """As the original does: resized colours of a palette, or of pixels that are transparent, would be others."""
    image = picture.resize((120, 90)).convert(mode)
    images = [
        make(getattr(kandinsky_diffusers, name), "3.1")(**inputs(name, image=each), generator=seeded(0)[0]).images
        for each in (image, image.convert("RGB"))
    ]
    np.testing.assert_array_equal(*images)


def test_no_strength_gives_the_picture_back_through_the_movq(make: Make, picture: Any) -> None:
    pipe = make(Kandinsky3Img2ImgPipeline, "3.1")
    kept = pipe("a red fox", picture, strength=0.0, output_type="latent").images
    with torch.no_grad():
        assert_close(kept, pipe.movq.encode(pipe.image_processor.preprocess(picture, 64, 64)).latents, 1e-5)


def test_a_picture_may_be_given_as_latents(make: Make, picture: Any) -> None:
    pipe = make(Kandinsky3Img2ImgPipeline, "3.1")
    latents = pipe("a red fox", picture, strength=0.0, output_type="latent").images
    drawn = [pipe("a red fox", image, **QUICK, strength=1.0, generator=seeded(0)[0]) for image in (picture, latents)]
    assert_close(drawn[1].images, drawn[0].images, 1e-5)


# ------------------------------------------------------------------------------------------------ defaults
@pytest.mark.parametrize(
    ("kind", "steps", "guidance_scale"),
    [
        ("3.0", 50, 3.0),
        ("3.0 inpaint", 50, 4.0),
        ("3.1", 50, 3.0),
        ("flash", 4, 0.0),
        ("3.1 inpaint", 50, 4.0),
        ("stock", 25, 3.0),
    ],
)
def test_the_repo_decides_on_steps_and_guidance(
    make: Make, monkeypatch: pytest.MonkeyPatch, kind: str, steps: int, guidance_scale: float
) -> None:
    pipe = make(Kandinsky3Pipeline, kind)
    batches: list[int] = []

    def predict(latents: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        batches.append(len(conditions["context"]))
        return torch.zeros(len(conditions["context"]), *latents.shape[1:])

    monkeypatch.setattr(pipe, "predict_noise", predict)
    pipe("a red fox", **SIZE, output_type="latent")
    assert pipe.guidance_scale == guidance_scale
    assert batches == [2 if guidance_scale else 1] * steps


def test_without_guidance_the_unconditional_half_is_not_computed(make: Make) -> None:
    pipe = make(Kandinsky3Pipeline, "3.1")
    unguided = pipe("a red fox", **QUICK, guidance_scale=0.0, generator=seeded(0)[0]).images
    nearly = pipe("a red fox", **QUICK, guidance_scale=1e-6, generator=seeded(0)[0]).images
    assert_close(unguided, nearly, 1e-3)


def test_guidance_of_one_guides(make: Make) -> None:
    """Stock takes it for none, although its formula does not."""
    pipe = make(Kandinsky3Pipeline, "3.1")
    drawn = [pipe("a red fox", **QUICK, guidance_scale=g, generator=seeded(0)[0]).images for g in (0.0, 1.0)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


# ------------------------------------------------------------------------------------------------ texts
@pytest.mark.parametrize(
    ("kind", "negative"),
    [("3.1", None), ("3.1", ""), ("3.1", ["a very blurry picture", "b", "c"]), ("stock", None), ("stock", "ugly")],
)
def test_what_encode_prompt_returns_stands_for_the_prompts(make: Make, kind: str, negative: Any) -> None:
    """Also when tokenizer and text encoder are gone."""
    pipe = make(Kandinsky3Pipeline, kind)
    drawn = pipe(PROMPTS, negative_prompt=negative, **QUICK, generator=seeded(0, 1, 2)).images
    states, negative_states, mask, negative_mask = pipe.encode_prompt(PROMPTS, negative_prompt=negative)
    without = make(Kandinsky3Pipeline, kind, tokenizer=None, text_encoder=None)
    again = without(
        prompt_embeds=states,
        attention_mask=mask,
        negative_prompt_embeds=negative_states,
        negative_attention_mask=negative_mask,
        **QUICK,
        generator=seeded(0, 1, 2),
    ).images
    assert_close(again, drawn, 1e-4)


@pytest.mark.parametrize("kind", ["3.1", "stock"])
def test_a_pipeline_may_be_loaded_for_its_text_encoder_alone(make: Make, tmp_path: Path, kind: str) -> None:
    pipe = make(Kandinsky3Pipeline, kind)
    pipe.save_pretrained(tmp_path)
    texts = Kandinsky3Pipeline.from_pretrained(tmp_path, unet=None, movq=None)
    for ours, theirs in zip(texts.encode_prompt(PROMPTS), pipe.encode_prompt(PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_states_alone_are_guided_by_the_null_embedding(make: Make) -> None:
    pipe = make(Kandinsky3Pipeline, "3.1")
    states, _, mask, _ = pipe.encode_prompt("a red fox", do_classifier_free_guidance=False)
    drawn = [
        pipe(**text, **QUICK, generator=seeded(0)[0]).images
        for text in ({"prompt": "a red fox"}, {"prompt_embeds": states, "attention_mask": mask})
    ]
    assert_close(*drawn, 1e-4)


def test_states_that_were_not_cut_mean_the_same(make: Make) -> None:
    pipe = make(Kandinsky3Pipeline, "3.1")
    tokens = pipe.tokenizer("a red fox", padding="max_length", max_length=128, return_tensors="pt")
    with torch.no_grad():
        states = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    uncut = {"prompt_embeds": states, "attention_mask": tokens.attention_mask}
    drawn = [pipe(**text, **QUICK, generator=seeded(0)[0]).images for text in ({"prompt": "a red fox"}, uncut)]
    assert_close(drawn[1], drawn[0], 1e-4)


def test_a_prompt_that_is_too_long_is_cut_and_it_is_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    pipe = make(Kandinsky3Pipeline, "3.1")
    states, _, mask, _ = pipe.encode_prompt("a fox " * 200, do_classifier_free_guidance=False)
    assert states.shape[1] == 128
    assert mask.all()
    assert "longer than the 128 tokens" in caplog.text
    assert np.isfinite(pipe(["a fox " * 200, "a fox"], **QUICK).images).all()


def test_a_negative_prompt_longer_than_the_prompt_is_cut_and_it_is_said(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = make(Kandinsky3Pipeline, "3.1")
    pipe.encode_prompt("a fox", negative_prompt="a very blurry picture of low quality")
    assert "longer than its prompt" in caplog.text


def test_an_overflowing_text_encoder_is_no_text_and_it_is_said(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the original of 3.0 does; others of the batch are not touched."""
    pipe = make(Kandinsky3Pipeline, "3.0")
    forward = pipe.text_encoder.forward

    def overflowing(*given: Any, **named: Any) -> Any:
        output = forward(*given, **named)
        output.last_hidden_state[0, 0, 0] = float("inf")
        return output

    alone = pipe("a dog", **QUICK, generator=seeded(1)).images
    monkeypatch.setattr(pipe.text_encoder, "forward", overflowing)
    images = pipe(["a fox", "a dog"], **QUICK, generator=seeded(0, 1)).images
    assert np.isfinite(images).all()
    assert_close(images[1], alone[0], 1e-4)
    assert "overflowed" in caplog.text


def test_a_unet_without_null_embedding_is_spoken_of_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    pipe = make(Kandinsky3Pipeline, "stock")
    for _ in range(2):
        pipe("a red fox", **QUICK)
    assert caplog.text.count("no null embedding") == 1


# ------------------------------------------------------------------------------------------------ components
@pytest.mark.parametrize("kind", ["3.0", "3.1", "flash"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_schedulers_of_diffusers_can_be_put_in(make: Make, kind: str, scheduler: Any) -> None:
    pipe = make(Kandinsky3Pipeline, kind)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    assert type(pipe.scheduler) is scheduler
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert np.isfinite(pipe("a red fox", **QUICK).images).all()


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["3.0", "3.1", "flash", "3.1 inpaint"])
def test_known_pixels_come_back_untouched(make: Make, picture: Any, mask: Any, kind: str, strength: float) -> None:
    pipe = make(Kandinsky3InpaintPipeline, kind)
    arguments = {**QUICK, "output_type": "pil", "strength": strength, "preserve_unmasked": True}
    image = pipe("a red fox", picture, mask, **arguments).images[0]
    changed = (np.asarray(image) != np.asarray(picture)).any(axis=-1)
    assert not changed[np.asarray(mask) == 0].any()
    assert changed[np.asarray(mask) == 255].mean() > 0.9


def test_a_crop_around_the_mask_leaves_the_rest_of_a_large_picture_alone(make: Make, picture: Any, mask: Any) -> None:
    pipe = make(Kandinsky3InpaintPipeline, "3.1 inpaint")
    large, region = picture.resize((300, 200)), mask.resize((300, 200))
    region = region.point(lambda value: 255 if value > 127 else 0)
    arguments = {**SIZE, "num_inference_steps": 2, "padding_mask_crop": 8}
    image = pipe("a red fox", large, region, **arguments).images[0]
    changed = (np.asarray(image) != np.asarray(large)).any(axis=-1)
    assert image.size == large.size
    assert not changed[np.asarray(region) == 0].any()
    assert changed[np.asarray(region) == 255].mean() > 0.9


def test_a_unet_for_pictures_paints_around_what_is_known(make: Make, picture: Any, mask: Any) -> None:
    """After the last step the latents outside the mask are those of the picture."""
    pipe = make(Kandinsky3InpaintPipeline, "3.1")
    latents = pipe("a red fox", picture, mask, **{**QUICK, "output_type": "latent"}).images
    with torch.no_grad():
        known = pipe.movq.encode(pipe.image_processor.preprocess(picture, 64, 64)).latents
    keep = torch.from_numpy(np.asarray(mask.resize((8, 8))) == 0)
    assert_close(latents[..., keep], known[..., keep], 1e-5)
    assert not torch.allclose(latents[..., ~keep], known[..., ~keep])


@pytest.mark.parametrize(("strength", "expected"), [(0.25, [229]), (0.5, [479, 229]), (1.0, [979, 729, 479, 229])])
def test_flash_refines_from_the_timestep_that_strength_chooses(
    make: Make, picture: Any, monkeypatch: pytest.MonkeyPatch, strength: float, expected: list[int]
) -> None:
    pipe = make(Kandinsky3Img2ImgPipeline, "flash")
    seen: list[int] = []
    predict = pipe.predict_noise
    monkeypatch.setattr(pipe, "predict_noise", lambda x, t, c: seen.append(int(t)) or predict(x, t, c))
    pipe("a red fox", picture, strength=strength)
    assert seen == expected


# ------------------------------------------------------------------------------------------------ callbacks
@pytest.mark.parametrize("kind", ["3.1", "stock"])
def test_a_callback_can_change_the_text_between_steps(make: Make, kind: str) -> None:
    pipe = make(Kandinsky3Pipeline, kind)
    states, negative, mask, negative_mask = pipe.encode_prompt("a sad cat")
    other = {"prompt_embeds": torch.cat([negative, states]), "attention_mask": torch.cat([negative_mask, mask])}

    def swap(pipeline: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert tensors["prompt_embeds"].shape[0] == tensors["attention_mask"].shape[0] == 2
        return dict(other) if index == 0 else {}

    names = ["latents", "prompt_embeds", "attention_mask", "negative_prompt_embeds", "negative_attention_mask"]
    callback = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": names}
    swapped = pipe("a red fox", **QUICK, generator=seeded(0)[0], **callback).images
    kept = pipe("a red fox", **QUICK, generator=seeded(0)[0]).images
    assert np.abs(swapped - kept).max() > 1e-3


def test_a_callback_can_end_guidance(make: Make) -> None:
    pipe = make(Kandinsky3Pipeline, "3.1")
    halves = []

    def stop(pipeline: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pipeline._guidance_scale = 0.0
        return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()} if index == 0 else {}

    predict = pipe.predict_noise
    pipe.predict_noise = lambda x, t, c: halves.append(len(c["context"]) // len(x)) or predict(x, t, c)
    names = ["prompt_embeds", "attention_mask"]
    images = pipe(PROMPTS, **QUICK, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=names).images
    assert halves == [2, 1]
    assert np.isfinite(images).all()


def test_the_older_callback_works(make: Make) -> None:
    seen: list[int] = []
    make(Kandinsky3Pipeline, "3.1")("a red fox", **QUICK, callback=lambda i, t, x: seen.append(i))
    assert seen == [0, 1]


def test_every_pipeline_runs_the_one_loop(make: Make, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    denoise = sampling.denoise
    monkeypatch.setattr(sampling, "denoise", lambda *given, **named: calls.append("loop") or denoise(*given, **named))
    for name in TASKS:
        make(getattr(kandinsky_diffusers, name), "3.1")(**inputs(name))
    assert calls == ["loop"] * 3
