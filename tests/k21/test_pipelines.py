"""The 2.1 pipelines do what their arguments say, in every batch, and say so at once where they cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from diffusers.pipelines import kandinsky
from diffusers.utils import logging as diffusers_logging

import kandinsky_diffusers
from kandinsky_diffusers import (
    KandinskyAncestralScheduler,
    KandinskyCombinedPipeline,
    KandinskyImg2ImgCombinedPipeline,
    KandinskyInpaintCombinedPipeline,
    KandinskyInpaintPipeline,
    KandinskyPipeline,
    KandinskyPriorPipeline,
    sampling,
)
from tests.k21.conftest import QUICK, SIZE, seeded
from tests.support.parity import assert_close
from tests.support.shallow import shallow


Make = Callable[..., Any]
SINGLE_IN_BATCH = 1e-5  # of the maximum
LATENT = {**QUICK, "output_type": "latent"}


# ------------------------------------------------------------------------------------------------------------ batches
@pytest.mark.parametrize(
    ("task", "scheduler", "negative"),
    [
        ("text2image", "ddim", None),
        ("text2image", "ancestral", ["ugly", "grey"]),
        ("image2image", "ddim", ["ugly", "grey"]),
        ("image2image", "ancestral", None),
        ("inpainting", "ddim", "ugly"),
        ("inpainting", "ancestral", ["ugly", "grey"]),
    ],
)
def test_each_picture_of_a_batch_is_the_picture_made_alone(
    converted_21: Path, picture: Any, mask: Any, task: str, scheduler: str, negative: Any
) -> None:
    """In float64: in float32 the batch changes the order of sums, and random weights blow that up to 6e-5."""
    auto, repo, extra = {
        "text2image": (AutoPipelineForText2Image, "kandinsky-2-1", {}),
        "image2image": (AutoPipelineForImage2Image, "kandinsky-2-1", {"image": picture, "strength": 0.6}),
        "inpainting": (
            AutoPipelineForInpainting,
            "kandinsky-2-1-inpaint",
            {"image": picture, "mask_image": mask},
        ),
    }[task]
    pipe = auto.from_pretrained(converted_21 / repo, dtype=torch.float64)
    pipe.unet = shallow(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    if scheduler == "ancestral":
        pipe.scheduler = KandinskyAncestralScheduler()
    arguments = {**SIZE, **extra, "num_inference_steps": 3, "prior_num_inference_steps": 2, "output_type": "pt"}

    prompts = ["a cat", "a dog"]
    together = pipe(
        prompts, negative_prompt=negative, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), **arguments
    ).images
    assert len(together) == 4
    for index in (1, 2):  # the second of the first prompt, and the first of the second
        alone = pipe(
            prompts[index // 2],
            negative_prompt=negative[index // 2] if isinstance(negative, list) else negative,
            generator=seeded(index),
            **arguments,
        ).images
        assert_close(together[index], alone[0], SINGLE_IN_BATCH, f"picture {index}")


def test_one_prompt_serves_many_image_embeddings(make: Make, embeds: Any) -> None:
    pipe, rows = make(KandinskyPipeline, "decoder"), embeds(3)
    together = pipe("a cat", **rows, generator=seeded(0, 1, 2), **LATENT).images
    alone = pipe("a cat", **{name: row[1:2] for name, row in rows.items()}, generator=seeded(1), **LATENT).images
    assert_close(together[1], alone[0], SINGLE_IN_BATCH)


def test_a_picture_and_a_mask_for_each_prompt(make: Make, embeds: Any, picture: Any, mask: Any) -> None:
    pipe = make(KandinskyInpaintPipeline, "inpaint")
    other_picture, other_mask = (
        picture.transpose(PIL.Image.Transpose.ROTATE_90),
        mask.transpose(PIL.Image.Transpose.ROTATE_180),
    )
    together = pipe(
        ["a cat", "a dog"], [picture, other_picture], [mask, other_mask], **embeds(2), generator=seeded(0, 1), **LATENT
    ).images
    rows = {name: row[1:] for name, row in embeds(2).items()}
    alone = pipe("a dog", other_picture, other_mask, **rows, generator=seeded(1), **LATENT).images
    assert_close(together[1], alone[0], SINGLE_IN_BATCH)


# ---------------------------------------- equal to stock where it is right
def test_where_stock_is_right_the_decoder_equals_it(make: Make, embeds: Any) -> None:
    arguments = {**embeds(), **SIZE, "num_inference_steps": 5, "output_type": "np", "negative_prompt": "ugly"}
    stock = make(kandinsky.KandinskyPipeline, "decoder")("a cat", **arguments, generator=seeded(3)[0]).images
    pipe = make(KandinskyPipeline, "decoder").exact_reference(True)
    ours = pipe("a cat", **arguments, generator=seeded(3)[0]).images
    assert np.array_equal(ours, stock)


def test_the_decoder_of_an_inpainting_repo_equals_stock(make: Make, embeds: Any, picture: Any, mask: Any) -> None:
    arguments = {**embeds(), **SIZE, "num_inference_steps": 5, "output_type": "np"}
    given = ("a cat", picture, mask)
    stock = make(kandinsky.KandinskyInpaintPipeline, "inpaint")(*given, **arguments, generator=seeded(3)[0]).images
    pipe = make(KandinskyInpaintPipeline, "inpaint").exact_reference(True)
    ours = pipe(*given, **arguments, generator=seeded(3)[0]).images
    assert np.array_equal(ours, stock)


def test_the_prior_makes_what_stock_makes_up_to_its_float32_tables(make: Make) -> None:
    stock = make(kandinsky.KandinskyPriorPipeline, "prior")("a cat", generator=seeded(0)[0], negative_prompt="ugly")
    ours = make(KandinskyPriorPipeline, "prior")("a cat", generator=seeded(0)[0], negative_prompt="ugly")
    for name in ("image_embeds", "negative_image_embeds"):
        assert_close(ours[name], stock[name], 2e-3, name)  # stock's last step is 5e-4 to 1e-3 off the original


# ---------------------------------------------------------------------------------------------------------- arguments
def test_prompt_embeds_stand_for_prompts(make: Make, embeds: Any) -> None:
    pipe = make(KandinskyPipeline, "decoder")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    states = dict(zip(names, pipe.encode_prompt(["a cat", "a dog"], negative_prompt="ugly"), strict=True))
    by_states = pipe(**states, **embeds(2), num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), **LATENT).images
    by_text = pipe(
        ["a cat", "a dog"],
        negative_prompt="ugly",
        **embeds(2),
        num_images_per_prompt=2,
        generator=seeded(0, 1, 2, 3),
        **LATENT,
    ).images
    assert torch.equal(by_states, by_text)


def test_guidance_of_one_needs_no_negative_embeddings_and_runs_one_half(make: Make, embeds: Any) -> None:
    pipe = make(KandinskyPipeline, "decoder")
    image_embeds = embeds()["image_embeds"]
    rows: list[int] = []

    def half(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
        rows.append(len(pipe.predict_noise(tensors["latents"], timestep, conditions)))
        return {}

    hidden, _, pooled, _ = pipe.encode_prompt("a cat")
    conditions = {"prompt_embeds": hidden, "pooled_prompt_embeds": pooled, "image_embeds": image_embeds}
    latents = pipe("a cat", image_embeds, guidance_scale=1.0, callback_on_step_end=half, **LATENT).images
    assert latents.isfinite().all()
    assert rows == [1, 1]


def test_the_negative_prior_prompt_acts_beside_the_negative_prompt(make: Make) -> None:
    pipe, steps = make(KandinskyPriorPipeline, "prior"), {"num_inference_steps": 3}

    def run(**negatives: Any) -> Any:
        return pipe("a cat", generator=seeded(0)[0], **negatives, **steps)

    plain, prior_only = run(), run(negative_prior_prompt="grey")
    assert torch.equal(plain.negative_image_embeds, prior_only.negative_image_embeds)
    assert not torch.allclose(plain.image_embeds, prior_only.image_embeds)

    both, negative_only = run(negative_prompt="ugly", negative_prior_prompt="grey"), run(negative_prompt="ugly")
    swapped = run(negative_prompt="ugly", negative_prior_prompt="ugly")
    assert torch.equal(negative_only.image_embeds, swapped.image_embeds)  # stock's meaning: it is used for both
    assert not torch.allclose(both.image_embeds, negative_only.image_embeds)


def test_a_callback_can_swap_the_conditions(make: Make, embeds: Any) -> None:
    pipe, arguments = make(KandinskyPipeline, "decoder"), {**embeds(), **SIZE, "num_inference_steps": 3}
    other = torch.full_like(arguments["image_embeds"], 2.0)

    def swap(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"image_embeds": other} if index == 0 else {}

    swapped, plain = (
        pipe("a cat", **arguments, generator=seeded(0)[0], output_type="latent", callback_on_step_end=callback).images
        for callback in (swap, None)
    )
    assert not torch.allclose(swapped, plain)


def test_a_callback_can_swap_the_text_of_the_cached_prior(make: Make) -> None:
    pipe, steps = make(KandinskyPriorPipeline, "prior"), {"num_inference_steps": 4}
    other = pipe.encode_prompt("a dog")

    def swap(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = ("prompt_embeds", "text_encoder_hidden_states", "text_mask")
        return dict(zip(names, other, strict=True)) if index == 1 else {}

    cached, uncached = (
        pipe.exact_reference(exact)("a cat", generator=seeded(0)[0], callback_on_step_end=swap, **steps).image_embeds
        for exact in (False, True)
    )
    plain = pipe.exact_reference(False)("a cat", generator=seeded(0)[0], **steps).image_embeds
    torch.testing.assert_close(cached, uncached, rtol=0, atol=1e-5)
    assert not torch.allclose(cached, plain)


def test_the_older_callback_is_called_as_stock_calls_it(make: Make, embeds: Any) -> None:
    seen = []
    make(KandinskyPipeline, "decoder")(
        "a cat",
        **embeds(),
        **SIZE,
        num_inference_steps=4,
        callback=lambda index, timestep, latents: seen.append((index, int(timestep), tuple(latents.shape))),
        callback_steps=2,
    )
    assert seen == [(0, 751, (1, 4, 8, 8)), (2, 251, (1, 4, 8, 8))]


def test_a_long_prompt_is_cut_and_what_is_cut_is_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    logger = diffusers_logging.get_logger("kandinsky_diffusers.text")
    logger.addHandler(caplog.handler)
    try:
        make(KandinskyPipeline, "decoder").encode_prompt("a cat " * 80 + "дом")
    finally:
        logger.removeHandler(caplog.handler)
    assert "77 tokens" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def text2image(**changed: Any) -> dict[str, Any]:
    return {"prompt": "a cat", **QUICK, **changed}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompt": 5}, "`prompt`"),
        ({"prompt": []}, "`prompt`"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt`"),
        ({"height": 0}, "`height`"),
        ({"width": 64.5}, "`width`"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
        ({"generator": seeded(0, 1)}, "`generator`"),
        ({"latents": torch.zeros(1, 4, 9, 9)}, "`latents`"),
        ({"output_type": "jpg"}, "`output_type`"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs`"),
        ({"callback": print, "callback_on_step_end": print}, "`callback`"),
    ],
)
def test_wrong_arguments_are_named_before_a_model_runs(
    make: Make, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], named: str
) -> None:
    pipe = make(KandinskyCombinedPipeline, "combined")
    for name in ("unet", "movq", "text_encoder", "prior_text_encoder", "prior_prior", "prior_image_encoder"):
        monkeypatch.setattr(getattr(pipe, name), "forward", lambda *args, **kwargs: pytest.fail("a model ran"))
    with pytest.raises((ValueError, TypeError), match=named):
        pipe(**text2image(**changed))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompt": None}, "`prompt`"),
        ({"negative_prior_prompt": ["a", "b"]}, "`negative_prior_prompt`"),
        ({"guidance_scale": [1.0, 2.0]}, "`guidance_scale`"),
        ({"latents": torch.zeros(3, 5)}, "`latents`"),
        ({"generator": seeded(0, 1)}, "`generator`"),
        ({"output_type": "pil"}, "`output_type`"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"callback_on_step_end_tensor_inputs": ["image_embeds"]}, "`callback_on_step_end_tensor_inputs`"),
    ],
)
def test_wrong_arguments_of_the_prior_are_named_before_a_model_runs(
    make: Make, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], named: str
) -> None:
    pipe = make(KandinskyPriorPipeline, "prior")
    for name in ("text_encoder", "prior", "image_encoder"):
        monkeypatch.setattr(getattr(pipe, name), "forward", lambda *args, **kwargs: pytest.fail("a model ran"))
    with pytest.raises((ValueError, TypeError), match=named):
        pipe(**{"prompt": "a cat", **changed})


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"image": None}, "`image`"),
        ({"image": "cat.png"}, "`image`"),
        ({"image": np.zeros((8, 8))}, "`image`"),
        ({"image": np.full((8, 8, 3), 700.0)}, "`image`"),
        ({"image": []}, "`image`"),
        ({"mask_image": None}, "`mask_image`"),
        ({"mask_image": np.zeros((4, 8, 8, 3))}, "`mask_image`"),
        ({"strength": 1.5}, "`strength`"),
        ({"padding_mask_crop": 8, "mask_image": np.ones((64, 64))}, "`padding_mask_crop`"),
        ({"padding_mask_crop": 8, "mask_image": PIL.Image.new("L", (64, 64))}, "`mask_image`"),
        ({"padding_mask_crop": 8, "output_type": "np"}, "`output_type`"),
        ({"preserve_unmasked": True, "output_type": "latent"}, "`preserve_unmasked`"),
    ],
)
def test_wrong_pictures_are_named_before_a_model_runs(
    make: Make, monkeypatch: pytest.MonkeyPatch, picture: Any, mask: Any, changed: dict[str, Any], named: str
) -> None:
    pipe = make(KandinskyInpaintCombinedPipeline, "inpaint combined")
    for name in ("unet", "movq", "text_encoder", "prior_text_encoder", "prior_prior", "prior_image_encoder"):
        monkeypatch.setattr(getattr(pipe, name), "forward", lambda *args, **kwargs: pytest.fail("a model ran"))
    with pytest.raises((ValueError, TypeError), match=named):
        pipe(**{"prompt": "a cat", "image": picture, "mask_image": mask, **QUICK, **changed})


@pytest.mark.parametrize("embeddings", [{}, {"image_embeds": "x"}, {"image_embeds": torch.zeros(1, 2, 3)}])
def test_missing_or_wrong_embeddings_are_named(make: Make, embeddings: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match="`image_embeds`"):
        make(KandinskyPipeline, "decoder")("a cat", **embeddings, **QUICK)


# ------------------------------------------------------------------------------------------------- from pipe to pipe
@pytest.mark.parametrize("repo", ["kandinsky-2-1", "kandinsky-2-1-inpaint"])
def test_every_task_runs_on_either_unet(converted_21: Path, picture: Any, mask: Any, repo: str) -> None:
    pipe = AutoPipelineForText2Image.from_pretrained(converted_21 / repo)
    quick = {**QUICK, "prior_num_inference_steps": 1, "output_type": "np"}
    for auto, extra in (
        (AutoPipelineForText2Image, {}),
        (AutoPipelineForImage2Image, {"image": picture, "strength": 0.5}),
        (AutoPipelineForInpainting, {"image": picture, "mask_image": mask}),
    ):
        pipe = auto.from_pipe(pipe)
        pipe.set_progress_bar_config(disable=True)
        assert np.isfinite(pipe("a cat", **extra, **quick).images).all()


def test_a_silent_combined_pipeline_is_silent(make: Make, capfd: pytest.CaptureFixture) -> None:
    make(KandinskyCombinedPipeline, "combined")("a cat", prior_num_inference_steps=1, **QUICK)
    assert capfd.readouterr().err == ""


def test_stock_pipelines_still_work_on_what_our_pipelines_were_given(make: Make, embeds: Any) -> None:
    ours = make(KandinskyPipeline, "decoder")
    stock = make(kandinsky.KandinskyPipeline, "decoder")
    assert type(stock.movq).__module__.startswith("diffusers.")
    assert next(ours.movq.parameters()) is next(stock.movq.parameters())
    stock("a cat", **embeds(), **QUICK)


def test_noise_comes_from_one_place(make: Make, monkeypatch: pytest.MonkeyPatch, picture: Any) -> None:
    draws = []

    def zeros(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> torch.Tensor:
        draws.append(tuple(shape))
        return torch.zeros(shape, device=device, dtype=dtype)

    monkeypatch.setattr(sampling, "draw_noise", zeros)
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: pytest.fail("noise from elsewhere"))
    pipe = make(KandinskyImg2ImgCombinedPipeline, "combined", scheduler=KandinskyAncestralScheduler())
    pipe("a cat", image=picture, strength=1.0, prior_num_inference_steps=2, **QUICK)
    width = pipe.prior_prior.config.embedding_dim
    assert draws == [(1, width), (1, width), (1, 4, 8, 8), (1, 4, 8, 8)]


def test_public_names_are_where_the_documentation_says() -> None:
    assert all(hasattr(kandinsky_diffusers, name) for name in kandinsky_diffusers.__all__)
