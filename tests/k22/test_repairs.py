"""What stock diffusers gets wrong in 2.2: each test passes with our class, and is seen to fail with the stock one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines import kandinsky2_2

import kandinsky_diffusers
from tests.k22.conftest import DECODERS, PRIORS, STOCK_COMBINED, components_for, seeded


Make = Callable[..., Any]
WITH_LEGACY_CALLBACK = [*DECODERS[:3], "KandinskyV22InpaintCombinedPipeline"]


def ours_and_stock(*names: str) -> Any:
    """Run a test with our classes of these names, and see it fail with the stock ones."""
    ours = [pytest.param(getattr(kandinsky_diffusers, name), id=f"ours {name}") for name in names]
    marks = pytest.mark.xfail(strict=True)
    stock = [pytest.param(getattr(kandinsky2_2, name), marks=marks, id=f"stock {name}") for name in names]
    return pytest.mark.parametrize("cls", [*ours, *stock])


# ------------------------------------------------------------------------------------------------------------- priors
@ours_and_stock(*PRIORS)
def test_one_negative_prompt_serves_many_prompts(cls: type, make: Make, inputs: Any) -> None:
    embeds = make(cls)(**inputs(cls.__name__, prompt=["a cat", "a dog"], negative_prompt="ugly"))
    assert embeds.image_embeds.shape == embeds.negative_image_embeds.shape
    assert len(embeds.image_embeds) == 2


@ours_and_stock(*PRIORS)
def test_negative_prompts_and_a_generator_for_each_prompt(cls: type, make: Make, inputs: Any) -> None:
    pipe, given = make(cls), inputs(cls.__name__)
    prompts, negatives = ["a cat", "a dog"], ["ugly", "grey"]
    together = pipe(**given | {"prompt": prompts}, negative_prompt=negatives, generator=seeded(1, 2))
    alone = pipe(**given | {"prompt": prompts[1]}, negative_prompt=negatives[1], generator=seeded(2))
    for kind in ("image_embeds", "negative_image_embeds"):
        torch.testing.assert_close(together[kind][1:], alone[kind], rtol=0, atol=1e-4)


@ours_and_stock("KandinskyV22PriorEmb2EmbPipeline")
def test_embeddings_to_embeddings_can_mix_in_texts(cls: type, make: Make, picture: Any) -> None:
    mixed = make(cls).interpolate(["a cat", picture], [0.5, 0.5], num_inference_steps=2, num_images_per_prompt=2)
    assert len(mixed.image_embeds) == len(mixed.negative_image_embeds) == 2
    assert mixed.image_embeds.isfinite().all()


@ours_and_stock("KandinskyV22PriorEmb2EmbPipeline")
def test_mixed_embeddings_come_with_the_embedding_of_no_picture(cls: type, make: Make, picture: Any) -> None:
    pipe = make(cls)
    mixed = pipe.interpolate([picture], [1.0])
    torch.testing.assert_close(mixed.negative_image_embeds, pipe.get_zero_embed(), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- batches of decoders
@ours_and_stock("KandinskyV22InpaintPipeline")
def test_each_picture_of_a_batch_keeps_its_own_known_region(
    cls: type, make: Make, inputs: Any, embeds: Any, picture: Any, mask: Any
) -> None:
    turned = picture.transpose(PIL.Image.Transpose.ROTATE_90)
    pipe, rows = make(cls), embeds(2)
    arguments = {**rows, "image": [picture, turned], "mask_image": [mask, mask], "output_type": "latent"}
    latents = pipe(**inputs(cls.__name__, **arguments)).images
    pixels = torch.from_numpy(np.array(turned)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        clean = pipe.movq.encode(pixels).latents
    torch.testing.assert_close(latents[1:, :, 6:], clean[:, :, 6:], rtol=0, atol=1e-4)


@ours_and_stock("KandinskyV22InpaintPipeline")
def test_each_picture_of_a_batch_is_painted_where_its_own_mask_says(
    cls: type, make: Make, inputs: Any, embeds: Any, picture: Any, mask: Any
) -> None:
    turned = mask.transpose(PIL.Image.Transpose.ROTATE_180)
    pipe = make(cls)
    arguments = {"image": [picture] * 2, "output_type": "latent"}
    together = pipe(**inputs(cls.__name__, **embeds(2), **arguments, mask_image=[mask, turned])).images
    with torch.no_grad():
        clean = pipe.movq.encode(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1).latents
    torch.testing.assert_close(together[1:, :, :2], clean[:, :, :2], rtol=0, atol=1e-4)
    assert not torch.allclose(together[1:, :, 5:7, 3:5], clean[:, :, 5:7, 3:5], atol=1e-2)


@ours_and_stock("KandinskyV22Img2ImgPipeline", "KandinskyV22ControlnetImg2ImgPipeline")
def test_one_picture_serves_many_embeddings_each_with_its_own_noise(
    cls: type, make: Make, inputs: Any, embeds: Any
) -> None:
    pipe, rows = make(cls), embeds(2)
    changed = {"hint": torch.zeros(2, 3, 64, 64)} if "Controlnet" in cls.__name__ else {}
    together = pipe(**inputs(cls.__name__, **rows, **changed), generator=seeded(1, 2)).images
    second = {name: row[1:] for name, row in (rows | changed).items()}
    alone = pipe(**inputs(cls.__name__, **second), generator=seeded(2)).images
    np.testing.assert_allclose(together[1], alone[0], rtol=0, atol=1e-2)


@ours_and_stock(*DECODERS)
def test_several_pictures_without_guidance(cls: type, make: Make, inputs: Any) -> None:
    images = make(cls)(**inputs(cls.__name__, guidance_scale=1.0, num_images_per_prompt=2)).images
    assert len(images) == 2


@ours_and_stock("KandinskyV22ControlnetPipeline")
def test_one_hint_serves_many_embeddings(cls: type, make: Make, inputs: Any, embeds: Any) -> None:
    assert len(make(cls)(**inputs(cls.__name__, **embeds(2))).images) == 2


# ----------------------------------------------------------------------------------------------- arguments of decoders
@ours_and_stock(*WITH_LEGACY_CALLBACK)
def test_the_older_callback_needs_no_number_of_steps(cls: type, make: Make, inputs: Any) -> None:
    seen: list[tuple[int, ...]] = []
    arguments = inputs(cls.__name__, callback=lambda index, timestep, latents: seen.append((index, *latents.shape)))
    make(cls)(**arguments)
    assert seen == [(0, 1, 4, 8, 8), (1, 1, 4, 8, 8)]


@ours_and_stock("KandinskyV22ControlnetPipeline", "KandinskyV22ControlnetImg2ImgPipeline")
def test_step_end_callbacks_and_latents_of_controlnet(cls: type, make: Make, inputs: Any) -> None:
    seen = []

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((index, {name: len(tensor) for name, tensor in tensors.items()}))
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "image_embeds"]
    latents = make(cls)(
        **inputs(cls.__name__, output_type="latent"),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    ).images
    assert seen == [(index, {"latents": 1, "image_embeds": 2}) for index in (0, 1)]
    assert latents.shape == (1, 4, 8, 8)
    assert not latents.any()


@ours_and_stock("KandinskyV22Pipeline", "KandinskyV22InpaintPipeline", "KandinskyV22ControlnetPipeline")
def test_latents_are_cast_to_the_type_of_the_model(cls: type, make: Make, inputs: Any, components: Any) -> None:
    pipe = make(cls, unet=_half(cls, components, "unet"), movq=_half(cls, components, "movq"))
    images = pipe(**inputs(cls.__name__, latents=torch.zeros(1, 4, 8, 8))).images
    assert np.isfinite(images).all()


def _half(cls: type, components: Any, name: str) -> torch.nn.Module:
    original = components_for(cls.__name__, components("stock"))[name]
    half = type(original).from_config(original.config)
    half.load_state_dict(original.state_dict())
    return half.to(torch.bfloat16)


@ours_and_stock("KandinskyV22Pipeline", "KandinskyV22InpaintPipeline", "KandinskyV22ControlnetPipeline")
def test_tensors_come_out_in_the_range_of_pictures(cls: type, make: Make, inputs: Any) -> None:
    image = make(cls)(**inputs(cls.__name__, output_type="pt")).images
    assert image.min() >= 0.0
    assert image.max() <= 1.0


@ours_and_stock(*DECODERS)
def test_a_picture_has_the_size_asked_for(cls: type, make: Make, inputs: Any) -> None:
    image = make(cls)(**inputs(cls.__name__, height=72, width=50, output_type="pil")).images[0]
    assert image.size == (50, 72)


@ours_and_stock("KandinskyV22Img2ImgPipeline", "KandinskyV22ControlnetImg2ImgPipeline")
def test_image_to_image_of_a_picture_that_is_not_square(cls: type, make: Make, inputs: Any) -> None:
    wide = {"height": 64, "width": 128, "image": PIL.Image.new("RGB", (100, 40), "red"), "output_type": "pil"}
    wide |= {"hint": torch.zeros(1, 3, 64, 128)} if "Controlnet" in cls.__name__ else {}
    assert make(cls)(**inputs(cls.__name__, **wide)).images[0].size == (128, 64)


@ours_and_stock("KandinskyV22Img2ImgPipeline", "KandinskyV22ControlnetImg2ImgPipeline")
def test_latents_are_taken_as_a_picture(cls: type, make: Make, inputs: Any) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=seeded(0)[0])
    assert np.isfinite(make(cls)(**inputs(cls.__name__, image=latents)).images).all()


@ours_and_stock("KandinskyV22InpaintPipeline")
def test_a_mask_is_not_changed(cls: type, make: Make, inputs: Any) -> None:
    mask = torch.linspace(0, 1, 64 * 64).reshape(1, 1, 64, 64)
    before = mask.clone()
    make(cls)(**inputs(cls.__name__, image=torch.zeros(1, 3, 64, 64), mask_image=mask))
    assert torch.equal(mask, before)


@ours_and_stock("KandinskyV22InpaintPipeline")
def test_a_mask_of_another_kind_than_the_picture(cls: type, make: Make, inputs: Any, mask: Any) -> None:
    white = torch.from_numpy(np.array(mask)) / 255
    assert len(make(cls)(**inputs(cls.__name__, mask_image=white)).images) == 1


@ours_and_stock(*DECODERS)
def test_latents_are_scaled_for_the_model_as_the_scheduler_wants(cls: type, make: Make, inputs: Any) -> None:
    pipe = make(cls)
    calls = []
    scale = pipe.scheduler.scale_model_input
    pipe.scheduler.scale_model_input = lambda *args: (calls.append(1), scale(*args))[1]
    pipe(**inputs(cls.__name__))
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------ combined pipelines
@pytest.mark.parametrize("prompt", ["a cat", ["a cat", "a dog"]], ids=["one prompt", "two prompts"])
@ours_and_stock("KandinskyV22InpaintCombinedPipeline")
def test_combined_inpainting_draws_several(cls: type, make: Make, inputs: Any, mask: Any, prompt: Any) -> None:
    white = np.asarray(mask, dtype=np.float32) / 255
    images = make(cls)(**inputs(cls.__name__, prompt=prompt, mask_image=white, num_images_per_prompt=2)).images
    assert len(images) == (2 if prompt == "a cat" else 4)


@ours_and_stock("KandinskyV22Img2ImgCombinedPipeline")
def test_combined_image_to_image_from_a_tensor_draws_several(cls: type, make: Make, inputs: Any) -> None:
    given = inputs(cls.__name__, image=torch.zeros(1, 3, 64, 64), strength=1.0)
    together = make(cls)(**given, num_images_per_prompt=2, generator=seeded(1, 2)).images
    alone = make(cls)(**given, generator=seeded(2)).images
    np.testing.assert_allclose(together[1], alone[0], rtol=0, atol=1e-3)


@ours_and_stock(*STOCK_COMBINED)
def test_one_negative_prompt_serves_many_prompts_of_combined(cls: type, make: Make, inputs: Any) -> None:
    prompts = ["a cat", "a dog"]
    assert len(make(cls)(**inputs(cls.__name__, prompt=prompts, negative_prompt="ugly")).images) == 2


@ours_and_stock(*STOCK_COMBINED)
def test_swapped_components_take_effect(cls: type, make: Make, inputs: Any) -> None:
    pipe = make(cls)
    pipe.scheduler = scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.prior_prior = other_prior = type(pipe.prior_prior).from_config(pipe.prior_prior.config)
    pipe(**inputs(cls.__name__))
    assert scheduler.num_inference_steps is not None
    assert pipe.decoder_pipe.scheduler is scheduler
    assert pipe.prior_pipe.prior is other_prior


@ours_and_stock(*STOCK_COMBINED)
def test_a_progress_bar_does_not_switch_on_offloading(cls: type, make: Make) -> None:
    pipe = make(cls)
    assert list(pipe.progress_bar([1, 2])) == [1, 2]
    assert not getattr(pipe.decoder_pipe, "_all_hooks", [])


@ours_and_stock(*STOCK_COMBINED)
def test_offloading_goes_through_the_models_in_the_order_of_use(cls: type) -> None:
    order = cls.model_cpu_offload_seq.split("->")
    assert order.index("prior_text_encoder") < order.index("prior_prior") < order.index("unet") < order.index("movq")
    assert "prior_image_encoder" in order
    assert not cls._exclude_from_cpu_offload


@ours_and_stock(*PRIORS)
def test_a_prior_is_offloaded_like_any_model(cls: type) -> None:
    assert not cls._exclude_from_cpu_offload


@ours_and_stock("KandinskyV22CombinedPipeline", "KandinskyV22InpaintCombinedPipeline")
def test_latents_are_for_the_decoder(cls: type, make: Make, inputs: Any) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=seeded(0)[0])
    given, drawn = (
        make(cls)(**inputs(cls.__name__, latents=start), generator=seeded(1)[0]).images for start in (latents, None)
    )
    assert not np.array_equal(given, drawn)


# ------------------------------------------------------------------------------------------------- loading and memory
@ours_and_stock(*STOCK_COMBINED)
def test_a_decoder_folder_finds_the_prior_beside_it(cls: type, repos_22: Path) -> None:
    repo = "kandinsky-2-2-decoder-inpaint" if "Inpaint" in cls.__name__ else "kandinsky-2-2-decoder"
    assert cls.from_pretrained(repos_22 / repo).prior_prior is not None


@ours_and_stock("KandinskyV22Pipeline")
def test_group_offload(cls: type, inputs: Any, tmp_path: Path, repos_22: Path) -> None:
    pipe = cls.from_pretrained(repos_22 / "kandinsky-2-2-decoder")
    pipe.set_progress_bar_config(disable=True)
    before = pipe(**inputs(cls.__name__), generator=seeded(0)[0]).images
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    after = pipe(**inputs(cls.__name__), generator=seeded(0)[0]).images
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


@ours_and_stock("KandinskyV22Pipeline")
def test_slicing_and_tiling(cls: type, inputs: Any, repos_22: Path) -> None:
    pipe = cls.from_pretrained(repos_22 / "kandinsky-2-2-decoder")
    pipe.set_progress_bar_config(disable=True)
    given = inputs(cls.__name__, num_images_per_prompt=2)
    before = pipe(**given, generator=seeded(0, 1)).images
    pipe.movq.enable_slicing()
    pipe.movq.enable_tiling()
    after = pipe(**given, generator=seeded(0, 1)).images
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4)
    assert pipe.movq.use_slicing
    assert pipe.movq.use_tiling
