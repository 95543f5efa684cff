"""The 2.0 pipelines do what their arguments say, in every batch and language, and under the savings of diffusers."""

from __future__ import annotations

import functools
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig

from kandinsky_diffusers import (
    KandinskyAncestralScheduler,
    KandinskyV20Img2ImgPipeline,
    KandinskyV20InpaintPipeline,
    KandinskyV20Pipeline,
    KandinskyV20UNet,
)
from tests.support.counting import calls_of, filled_ahead, rows_of
from tests.support.shallow import shallow


QUICK = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
RUSSIAN, MIXED = "красная кошка", "красная cat"
TASKS = {
    "text2image": (AutoPipelineForText2Image, KandinskyV20Pipeline, "kandinsky-2-0"),
    "image2image": (AutoPipelineForImage2Image, KandinskyV20Img2ImgPipeline, "kandinsky-2-0"),
    "inpainting": (AutoPipelineForInpainting, KandinskyV20InpaintPipeline, "kandinsky-2-0-inpaint"),
}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def inputs_of(task: str) -> dict[str, Any]:
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 40))
    extra = {"image2image": {"image": picture, "strength": 0.6}, "inpainting": {"image": picture, "mask_image": mask}}
    return extra.get(task, {})


def load(converted: Path, task: str = "text2image", **options: Any) -> Any:
    """A copy of what is loaded once."""
    return deepcopy(_load(converted, task, **options))


@functools.cache
def _load(converted: Path, task: str, **options: Any) -> Any:
    auto, _, repo = TASKS[task]
    pipe = auto.from_pretrained(converted / repo, **options)
    pipe.unet = shallow(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(converted_20: Path) -> Any:
    return load(converted_20)


def draw(pipe: Any, prompt: Any = "a red cat") -> np.ndarray:
    return pipe(prompt, negative_prompt="ugly", generator=seeded(0)[0], **QUICK).images


@pytest.fixture
def warnings_of_diffusers(caplog: pytest.LogCaptureFixture) -> Any:
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    diffusers_logging.disable_propagation()


# ------------------------------------------------------------------------------------------------------------ batches
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("ancestral", [False, True], ids=["ddim", "ancestral"])
def test_each_picture_of_a_batch_is_the_picture_made_alone(converted_20: Path, task: str, ancestral: bool) -> None:
    """In float64: in float32 the batch changes the order of sums. The posterior is sampled for each picture, too."""
    pipe = load(converted_20, task, dtype=torch.float64)
    if ancestral:
        pipe.scheduler = KandinskyAncestralScheduler(beta_start=1e-4, beta_end=0.02, denoised_range=None)
    arguments = {**QUICK, **inputs_of(task), "output_type": "latent", "negative_prompt": "ugly"}
    prompts = [RUSSIAN, MIXED]
    together = pipe(prompts, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), **arguments).images
    for index, row in enumerate(together):
        alone = pipe(prompts[index // 2], generator=seeded(index), **arguments).images[0]
        assert (row - alone).abs().max() <= 1e-5 * alone.abs().max()


# --------------------------------------------------------------------------------------------------------------- texts
def test_every_language_reaches_the_picture(pipe: Any) -> None:
    pictures = [draw(pipe, prompt) for prompt in ("a red cat", RUSSIAN, MIXED)]
    for index, one in enumerate(pictures):
        for other in pictures[index + 1 :]:
            assert not np.allclose(one, other)


def test_a_long_text_is_cut_with_a_warning_that_shows_what_was_cut(pipe: Any, warnings_of_diffusers: Any) -> None:
    pipe.encode_prompt("a red cat " * 60 + "кошка")
    cuts = [record.message for record in warnings_of_diffusers.records if "cut:" in record.message]
    assert len(cuts) == 2, "one for each text encoder"
    assert all("77" in message and "кошка" in message for message in cuts)


def test_no_negative_prompt_is_the_empty_one(pipe: Any) -> None:
    quiet = [pipe("a cat", negative_prompt=n, generator=seeded(0)[0], **QUICK).images for n in (None, "", "ugly")]
    assert np.array_equal(quiet[0], quiet[1])
    assert not np.allclose(quiet[0], quiet[2])


def test_states_stand_for_the_prompt(pipe: Any) -> None:
    states = pipe.encode_prompt("a red cat", negative_prompt="ugly")
    named = dict(zip(type(pipe)._text_inputs.state_names(), states, strict=True))
    drawn = pipe(**named, generator=seeded(0)[0], **QUICK).images
    np.testing.assert_allclose(drawn, draw(pipe), rtol=0, atol=1e-5)
    del named["prompt_embeds_2"]
    with pytest.raises(ValueError, match="prompt_embeds_2"):
        pipe(**named, **QUICK)


def test_without_guidance_the_negative_prompt_does_not_count(pipe: Any) -> None:
    with rows_of(pipe.unet) as rows:
        one, other = (
            pipe("a cat", negative_prompt=n, guidance_scale=1.0, generator=seeded(0)[0], **QUICK).images
            for n in ("ugly", None)
        )
    assert np.array_equal(one, other)
    assert rows == [1] * 4


def test_conditions_are_read_once(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("encoder_hid_proj", "add_embedding", "add_k_proj", "add_v_proj")
    with calls_of(pipe.unet, *names) as calls:
        drawn = draw(pipe)
    assert calls == {name: {1} for name in names}
    with filled_ahead(pipe.unet) as caches:
        assert np.array_equal(draw(pipe), drawn)
    assert len(caches) == 1
    monkeypatch.setattr(KandinskyV20UNet, "supports_context_cache", False)
    assert np.array_equal(draw(pipe), drawn)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a", "height": 0}, "height"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "a", "output_type": "jpeg"}, "output_type"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c", "d", "e"]}, "negative_prompt"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 3, 3)}, "latents"),
    ],
)
def test_a_bad_argument_is_named_before_anything_runs(pipe: Any, arguments: dict[str, Any], named: str) -> None:
    pipe.text_encoder.forward = pipe.unet.forward = None  # would fail otherwise
    with pytest.raises((TypeError, ValueError), match=f"`{named}`"):
        pipe(**{**QUICK, **arguments})


def test_the_unet_names_what_it_lacks(pipe: Any) -> None:
    with pytest.raises(ValueError, match="text_embeds_2"):
        pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, 8), added_cond_kwargs={"text_embeds": torch.zeros(1)})


# ------------------------------------------------------------------------------------------------------------- loading
@pytest.mark.parametrize("task", TASKS)
def test_the_auto_pipelines_find_saved_repositories_and_each_other(
    converted_20: Path, tmp_path: Path, task: str
) -> None:
    load(converted_20, task).save_pretrained(tmp_path)
    auto, cls, _ = TASKS[task]
    again = auto.from_pretrained(tmp_path)
    assert type(again) is cls
    assert sorted(path.name for path in tmp_path.glob("*_scheduler")) == ["ancestral_scheduler", "ddpm_scheduler"]
    for other_auto, other, _ in TASKS.values():
        assert type(other_auto.from_pipe(again)) is other


def test_the_unet_is_saved_and_loaded_without_warnings(pipe: Any, tmp_path: Path, warnings_of_diffusers: Any) -> None:
    pipe.unet.save_pretrained(tmp_path)
    again = KandinskyV20UNet.from_pretrained(tmp_path)
    from_config = KandinskyV20UNet.from_config(pipe.unet.config)
    assert not warnings_of_diffusers.records
    for unet in (again, from_config):
        assert {**unet.config, "_name_or_path": ""} == {**pipe.unet.config, "_name_or_path": ""}
    for name, weight in pipe.unet.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


# ------------------------------------------------------------------------------------------------------------- runtime
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision_stays_near_single(pipe: Any, dtype: torch.dtype, allowed: float) -> None:
    """Mean difference of pixel values in [0, 1]; the random weights make it larger than trained ones would."""
    single = draw(pipe)
    half = draw(pipe.to(dtype))
    assert np.isfinite(half).all()
    assert np.abs(half - single).mean() <= allowed


def test_offloading_draws_the_same(pipe: Any, tmp_path: Path) -> None:
    before = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_allclose(draw(pipe), before, rtol=0, atol=1e-5)
    pipe.remove_all_hooks()
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    np.testing.assert_allclose(draw(pipe), before, rtol=0, atol=1e-5)


def test_an_adapter_acts_and_can_be_switched_off(pipe: Any) -> None:
    before = draw(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not np.allclose(draw(pipe), before)
    pipe.unet.disable_adapters()
    np.testing.assert_allclose(draw(pipe), before, rtol=0, atol=1e-5)


def test_a_compiled_unet_draws_the_same(pipe: Any) -> None:
    before = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    np.testing.assert_allclose(draw(pipe), before, rtol=0, atol=1e-5)


def test_slicing_draws_the_same_and_is_reached_by_both_names(pipe: Any) -> None:
    prompts = ["a cat", "a dog"]
    before = draw(pipe, prompts)
    for name in ("movq", "vae"):
        getattr(pipe, f"enable_{name}_slicing")()
        getattr(pipe, f"enable_{name}_tiling")()
        assert pipe.vae.use_slicing
        assert pipe.vae.use_tiling
        np.testing.assert_allclose(draw(pipe, prompts), before, rtol=0, atol=1e-4)
        getattr(pipe, f"disable_{name}_slicing")()
        getattr(pipe, f"disable_{name}_tiling")()
        assert not pipe.vae.use_slicing
        assert not pipe.vae.use_tiling


def test_the_steps_of_the_original_and_the_default_guidance(pipe: Any) -> None:
    seen: list[float] = []

    def callback(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(pipeline.guidance_scale)
        return {}

    pipe("a cat", **{**QUICK, "num_inference_steps": 7}, callback_on_step_end=callback)
    assert set(seen) == {7.0}
    assert len(seen) == 7
