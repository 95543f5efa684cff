"""What stock diffusers gets wrong in 2.1: each test passes with our class, and is seen to fail with the stock one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DDIMScheduler
from diffusers.pipelines import kandinsky

import kandinsky_diffusers
from tests.k21.conftest import QUICK, SIZE, seeded
from tests.support.processes import PythonProcess


Make = Callable[..., Any]
COMBINED_QUICK = {**QUICK, "prior_num_inference_steps": 2, "output_type": "np"}


def ours_and_stock(name: str) -> Any:
    """Run a test with our class of this name, and see it fail with the stock one."""
    stock = pytest.param(getattr(kandinsky, name), marks=pytest.mark.xfail(strict=True), id="stock")
    return pytest.mark.parametrize("cls", [pytest.param(getattr(kandinsky_diffusers, name), id="ours"), stock])


@ours_and_stock("KandinskyPriorPipeline")
def test_one_negative_prompt_serves_many_prompts(cls: type, make: Make) -> None:
    embeds = make(cls, "prior")(["a cat", "a dog"], negative_prompt="ugly", num_inference_steps=2)
    assert embeds.image_embeds.shape == embeds.negative_image_embeds.shape
    assert len(embeds.image_embeds) == 2


@ours_and_stock("KandinskyPriorPipeline")
def test_negative_prompts_and_a_generator_for_each_prompt(cls: type, make: Make) -> None:
    pipe = make(cls, "prior")
    together = pipe(
        ["a cat", "a dog"], negative_prompt=["ugly", "grey"], num_inference_steps=2, generator=seeded(1, 2)
    )
    alone = pipe("a dog", negative_prompt="grey", num_inference_steps=2, generator=seeded(2)[0])
    torch.testing.assert_close(together.image_embeds[1:], alone.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.negative_image_embeds[1:], alone.negative_image_embeds, rtol=0, atol=1e-5)


@ours_and_stock("KandinskyPriorPipeline")
def test_the_prior_takes_a_single_step(cls: type, make: Make) -> None:
    assert make(cls, "prior")("a cat", num_inference_steps=1).image_embeds.isfinite().all()


@ours_and_stock("KandinskyPriorPipeline")
def test_mixing_makes_as_many_embeddings_as_asked_for(cls: type, make: Make) -> None:
    pipe, steps = make(cls, "prior"), {"num_inference_steps": 2}
    mixed = pipe.interpolate(["a cat", "a dog"], [0.5, 0.5], num_images_per_prompt=2, generator=seeded(1, 2), **steps)
    alone = pipe.interpolate(["a cat", "a dog"], [0.5, 0.5], generator=seeded(2)[0], **steps)
    assert len(mixed.image_embeds) == len(mixed.negative_image_embeds) == 2
    torch.testing.assert_close(mixed.image_embeds[1:], alone.image_embeds, rtol=0, atol=1e-5)


@ours_and_stock("KandinskyPriorPipeline")
def test_mixing_with_a_negative_prior_prompt_keeps_the_embedding_of_no_picture(cls: type, make: Make) -> None:
    pipe = make(cls, "prior")
    mixed = pipe.interpolate(["a cat"], [1.0], negative_prior_prompt="ugly", num_inference_steps=2)
    torch.testing.assert_close(mixed.negative_image_embeds, pipe.get_zero_embed())


@pytest.mark.parametrize("prompt", ["a cat", ["a cat", "a dog"]], ids=["one prompt", "two prompts"])
@ours_and_stock("KandinskyImg2ImgCombinedPipeline")
def test_combined_image_to_image_draws_several(cls: type, make: Make, picture: Any, prompt: Any) -> None:
    images = make(cls, "combined")(prompt, image=picture, num_images_per_prompt=2, strength=1.0, **COMBINED_QUICK)
    assert len(images.images) == (2 if prompt == "a cat" else 4)


@pytest.mark.parametrize("prompt", ["a cat", ["a cat", "a dog"]], ids=["one prompt", "two prompts"])
@ours_and_stock("KandinskyInpaintCombinedPipeline")
def test_combined_inpainting_draws_several(cls: type, make: Make, picture: Any, mask: Any, prompt: Any) -> None:
    pipe, mask = make(cls, "inpaint combined"), np.asarray(mask, dtype=np.float32) / 255
    images = pipe(prompt, image=picture, mask_image=mask, num_images_per_prompt=2, **COMBINED_QUICK)
    assert len(images.images) == (2 if prompt == "a cat" else 4)


@ours_and_stock("KandinskyPipeline")
def test_several_pictures_without_guidance(cls: type, make: Make, embeds: Any) -> None:
    pipe = make(cls, "decoder")
    images = pipe("a cat", **embeds(), guidance_scale=1.0, num_images_per_prompt=2, output_type="np", **QUICK).images
    assert len(images) == 2


@ours_and_stock("KandinskyPipeline")
def test_one_negative_prompt_serves_many_prompts_of_the_decoder(cls: type, make: Make, embeds: Any) -> None:
    pipe = make(cls, "decoder")
    images = pipe(["a cat", "a dog"], **embeds(2), negative_prompt="ugly", output_type="np", **QUICK).images
    assert len(images) == 2


@ours_and_stock("KandinskyPipeline")
def test_a_picture_has_the_size_asked_for(cls: type, make: Make, embeds: Any) -> None:
    pipe = make(cls, "decoder")
    image = pipe("a cat", **embeds(), height=72, width=50, num_inference_steps=2).images[0]
    assert image.size == (50, 72)


@ours_and_stock("KandinskyPipeline")
def test_tensors_come_out_in_the_range_of_pictures(cls: type, make: Make, embeds: Any) -> None:
    pipe = make(cls, "decoder")
    image = pipe("a cat", **embeds(), output_type="pt", **QUICK).images
    assert image.min() >= 0.0
    assert image.max() <= 1.0


@pytest.mark.parametrize("cls_name", ["KandinskyPipeline", "KandinskyImg2ImgPipeline", "KandinskyInpaintPipeline"])
@pytest.mark.parametrize("origin", ["ours", pytest.param("stock", marks=pytest.mark.xfail(strict=True))])
def test_step_end_callbacks_and_latents(
    make: Make, embeds: Any, picture: Any, mask: Any, cls_name: str, origin: str
) -> None:
    cls = getattr(kandinsky_diffusers if origin == "ours" else kandinsky, cls_name)
    inpainting = cls_name == "KandinskyInpaintPipeline"
    arguments: dict[str, Any] = {} if cls_name == "KandinskyPipeline" else {"image": picture}
    arguments |= {"mask_image": mask} if inpainting else {}
    arguments |= {"strength": 1.0} if cls_name == "KandinskyImg2ImgPipeline" else {}
    seen = []

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((index, int(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = make(cls, "inpaint" if inpainting else "decoder")(
        "a cat",
        **embeds(),
        **arguments,
        **QUICK,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "image_embeds"],
    ).images
    assert seen == [(0, 501, ["image_embeds", "latents"]), (1, 1, ["image_embeds", "latents"])]
    assert latents.shape == (1, 4, 8, 8)
    assert not latents.any()


@ours_and_stock("KandinskyCombinedPipeline")
def test_swapped_components_take_effect(cls: type, make: Make) -> None:
    pipe = make(cls, "combined")
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = scheduler
    pipe.prior_prior = other_prior = type(pipe.prior_prior).from_config(pipe.prior_prior.config)
    pipe("a cat", **COMBINED_QUICK)
    assert scheduler.num_inference_steps == 2
    assert pipe.decoder_pipe.scheduler is scheduler
    assert pipe.prior_pipe.prior is other_prior


@ours_and_stock("KandinskyCombinedPipeline")
def test_a_progress_bar_does_not_switch_on_offloading(cls: type, make: Make) -> None:
    pipe = make(cls, "combined")
    assert list(pipe.progress_bar([1, 2])) == [1, 2]
    assert not getattr(pipe.decoder_pipe, "_all_hooks", [])


@ours_and_stock("KandinskyCombinedPipeline")
def test_offloading_goes_through_the_models_in_the_order_of_use(cls: type) -> None:
    order = cls.model_cpu_offload_seq.split("->")
    assert order.index("prior_text_encoder") < order.index("prior_prior") < order.index("text_encoder")
    assert order.index("text_encoder") < order.index("unet") < order.index("movq")
    assert not cls._exclude_from_cpu_offload


@ours_and_stock("KandinskyCombinedPipeline")
def test_latents_are_for_the_decoder(cls: type, make: Make) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=seeded(0)[0])
    prior_seed, noise_seed = seeded(1, 1)
    pipe = make(cls, "combined")
    given = pipe("a cat", latents=latents, generator=prior_seed, **COMBINED_QUICK).images
    drawn = pipe("a cat", generator=noise_seed, **COMBINED_QUICK).images
    assert not np.array_equal(given, drawn)


@ours_and_stock("KandinskyImg2ImgPipeline")
def test_image_to_image_of_a_picture_that_is_not_square(cls: type, make: Make, embeds: Any) -> None:
    picture = PIL.Image.new("RGB", (100, 40), "red")
    pipe = make(cls, "decoder")
    image = pipe("a cat", picture, **embeds(), height=64, width=128, num_inference_steps=4, strength=0.5).images[0]
    assert image.size == (128, 64)


@ours_and_stock("KandinskyImg2ImgPipeline")
def test_image_to_image_starts_from_the_noise_level_of_its_first_step(
    cls: type, make: Make, embeds: Any, picture: Any
) -> None:
    """A UNet that predicts no noise lets the start through: the picture, scaled by the model's own noise schedule."""
    pipe = make(cls, "decoder")
    clean = pipe.movq.encode(pipe.image_processor.preprocess(picture, 64, 64)).latents
    seen = []
    forward = pipe.unet.forward

    def spy(sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((sample[:1], int(timestep)))
        return forward(sample, timestep, *args, **kwargs)

    pipe.unet.forward = spy
    try:
        generator, same = seeded(0, 0)
        pipe("a cat", picture, **embeds(), **SIZE, num_inference_steps=4, strength=0.5, generator=generator)
    finally:
        del pipe.unet.forward
    start, timestep = seen[0]
    noise = torch.randn(clean.shape, generator=same)
    expected = pipe.scheduler.add_noise(clean, noise, torch.tensor([timestep]))
    torch.testing.assert_close(start, expected, rtol=0, atol=1e-4)


@ours_and_stock("KandinskyInpaintPipeline")
def test_a_mask_is_not_changed(cls: type, make: Make, embeds: Any) -> None:
    mask = torch.linspace(0, 1, 64 * 64).reshape(1, 1, 64, 64)
    before = mask.clone()
    make(cls, "inpaint")("a cat", torch.zeros(1, 3, 64, 64), mask, **embeds(), **QUICK)
    assert torch.equal(mask, before)


@ours_and_stock("KandinskyInpaintPipeline")
def test_a_mask_of_another_kind_than_the_picture(cls: type, make: Make, embeds: Any, picture: Any) -> None:
    mask = torch.zeros(64, 64)
    mask[:32] = 1
    assert make(cls, "inpaint")("a cat", picture, mask, **embeds(), **QUICK).images[0].size == (64, 64)


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerDiscreteScheduler"])
@ours_and_stock("KandinskyPipeline")
def test_schedulers_of_every_kind(cls: type, make: Make, embeds: Any, scheduler: str) -> None:
    import diffusers

    pipe = make(cls, "decoder")
    config = {**pipe.scheduler.config, "skip_prk_steps": True}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    calls = []
    scale = pipe.scheduler.scale_model_input
    pipe.scheduler.scale_model_input = lambda *args: (calls.append(1), scale(*args))[1]
    latents = pipe("a cat", **embeds(), **SIZE, num_inference_steps=5, output_type="np").images
    assert np.isfinite(latents).all()
    assert len(calls) == len(pipe.scheduler.timesteps)


@ours_and_stock("KandinskyPipeline")
def test_group_offload(cls: type, make: Make, embeds: Any, tmp_path: Path, converted_21: Path) -> None:
    pipe = cls.from_pretrained(converted_21 / "kandinsky-2-1")
    pipe.set_progress_bar_config(disable=True)
    arguments = {**embeds(), **QUICK, "output_type": "np"}
    before = pipe("a cat", **arguments, generator=seeded(0)[0]).images
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    after = pipe("a cat", **arguments, generator=seeded(0)[0]).images
    assert np.abs(before - after).max() <= 1e-5  # at another address a sum may be made in another order


@ours_and_stock("KandinskyPipeline")
def test_slicing_and_tiling(cls: type, make: Make, embeds: Any, converted_21: Path) -> None:
    pipe = cls.from_pretrained(converted_21 / "kandinsky-2-1")
    pipe.set_progress_bar_config(disable=True)
    arguments = {**embeds(), **QUICK, "output_type": "np", "num_images_per_prompt": 2}
    before = pipe("a cat", **arguments, generator=seeded(0, 1)).images
    pipe.enable_movq_slicing()
    pipe.enable_movq_tiling()
    after = pipe("a cat", **arguments, generator=seeded(0, 1)).images
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
    assert pipe.movq.use_slicing
    assert pipe.movq.use_tiling


@pytest.fixture
def without_cards(converted_21: Path, tmp_path: Path) -> Path:
    """A decoder's folder with its prior's beside it."""
    for name in ("kandinsky-2-1", "kandinsky-2-1-prior"):
        shutil.copytree(converted_21 / name, tmp_path / name, ignore=shutil.ignore_patterns("README.md"))
    return tmp_path / "kandinsky-2-1"


LOAD_LOCAL = """
import sys
from diffusers import AutoPipelineForText2Image
assert AutoPipelineForText2Image.from_pretrained(sys.argv[1]).prior_prior is not None
"""


def test_a_decoder_folder_finds_the_prior_beside_it(without_cards: Path) -> None:
    assert AutoPipelineForText2Image.from_pretrained(without_cards).prior_prior is not None


@pytest.mark.xfail(strict=True)
def test_a_decoder_folder_finds_the_prior_beside_it_in_stock(without_cards: Path, stock: PythonProcess) -> None:
    stock.run(LOAD_LOCAL, without_cards)


def test_the_error_without_a_prior_says_how_to_give_one(converted_21: Path, tmp_path: Path) -> None:
    shutil.copytree(converted_21 / "kandinsky-2-1", tmp_path / "lonely", ignore=shutil.ignore_patterns("README.md"))
    with pytest.raises(ValueError, match=r"`prior=`.*lonely-prior.*README\.md"):
        AutoPipelineForText2Image.from_pretrained(tmp_path / "lonely")


def test_a_prior_can_be_given(converted_21: Path, tmp_path: Path, make: Make) -> None:
    shutil.copytree(converted_21 / "kandinsky-2-1", tmp_path / "lonely", ignore=shutil.ignore_patterns("README.md"))
    prior = make(kandinsky_diffusers.KandinskyPriorPipeline, "prior")
    by_pipeline = AutoPipelineForText2Image.from_pretrained(tmp_path / "lonely", prior=prior)
    assert by_pipeline.prior_prior is prior.prior
    by_folder = AutoPipelineForText2Image.from_pretrained(
        tmp_path / "lonely", prior=converted_21 / "kandinsky-2-1-prior"
    )
    assert type(by_folder) is type(by_pipeline)
    by_components = AutoPipelineForText2Image.from_pretrained(
        tmp_path / "lonely", **{f"prior_{name}": part for name, part in prior.components.items()}
    )
    assert by_components.prior_prior is prior.prior
