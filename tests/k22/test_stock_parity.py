"""Where stock diffusers is right, the 2.2 pipelines give what it gives; for 2.2 it is the only reference there is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UnCLIPScheduler
from diffusers.pipelines import kandinsky2_2

import kandinsky_diffusers
from tests.k22.conftest import COMBINED, DECODERS, STOCK_COMBINED, components_for, seeded
from tests.support.parity import SAMPLER, assert_close, assert_same_picture


Make = Callable[..., Any]
SINGLE_IN_BATCH = 1e-5  # of the maximum
SCHEDULERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "DDPM": DDPMScheduler.from_config,
    "DDPM with learned variance": lambda config: DDPMScheduler.from_config(config, variance_type="learned_range"),
    "DDIM": DDIMScheduler.from_config,
    "DPM++": DPMSolverMultistepScheduler.from_config,
    "UnCLIP": lambda config: UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
}


def scheduler_for(name: str, scheduler: str, components: Any) -> Any:
    """One of the schedulers, with the published betas of the repo that a class draws from."""
    return SCHEDULERS[scheduler](components_for(name, components("stock"))["scheduler"].config)


def draw(pipe: Any, **arguments: Any) -> tuple[torch.Tensor, np.ndarray]:
    """The latents after the last step, and the pictures."""
    seen: list[torch.Tensor] = []
    if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
        arguments["callback_on_step_end"] = lambda pipe, index, timestep, tensors: (
            seen.append(tensors["latents"]),
            tensors,
        )[1]
    else:
        arguments["callback"] = lambda index, timestep, latents: seen.append(latents)
    images = pipe(**arguments, generator=seeded(3)[0]).images
    return seen[-1], images


def assert_as_stock(name: str, make: Make, arguments: dict[str, Any], **replaced: Any) -> None:
    """Bit for bit with `exact_reference`, and within the tolerance of a sampler without."""
    latents, images = draw(make(getattr(kandinsky2_2, name), **replaced), **arguments)
    assert np.isfinite(images).all()
    pipe = make(getattr(kandinsky_diffusers, name), **replaced)
    for exact in (True, False):
        our_latents, our_images = draw(pipe.exact_reference(exact), **arguments)
        if exact:
            assert torch.equal(our_latents, latents)
            assert np.array_equal(our_images, images)
        else:
            assert_close(our_latents, latents, SAMPLER, "latents")
            assert_same_picture((our_images * 255).round(), (images * 255).round())


# ----------------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_draws_what_stock_draws(make: Make, inputs: Any, components: Any, name: str, scheduler: str) -> None:
    steps = 5 if "Img2Img" in name else 3
    arguments = inputs(name, num_inference_steps=steps)
    assert_as_stock(name, make, arguments, scheduler=scheduler_for(name, scheduler, components))


@pytest.mark.parametrize("scheduler", ["DDPM", "DPM++"])
@pytest.mark.parametrize("name", STOCK_COMBINED)
def test_a_combined_pipeline_draws_what_stock_draws(
    make: Make, inputs: Any, components: Any, name: str, scheduler: str
) -> None:
    arguments = inputs(name, num_inference_steps=4, negative_prompt="ugly" if scheduler == "DDPM" else None)
    assert_as_stock(name, make, arguments, scheduler=scheduler_for(name, scheduler, components))


@pytest.mark.parametrize("name", ["KandinskyV22Pipeline", "KandinskyV22InpaintPipeline"])
def test_a_decoder_without_guidance_draws_what_stock_draws(make: Make, inputs: Any, name: str) -> None:
    assert_as_stock(name, make, inputs(name, guidance_scale=1.0))


@pytest.mark.parametrize(
    "name", ["KandinskyV22Pipeline", "KandinskyV22InpaintPipeline", "KandinskyV22ControlnetPipeline"]
)
def test_a_picture_that_is_not_square_is_the_one_of_stock(make: Make, inputs: Any, name: str) -> None:
    """Image to image is left out: stock swaps the height and the width of the picture it starts from."""
    wide = {"height": 64, "width": 128}
    wide |= {"hint": torch.rand(1, 3, 64, 128)} if "Controlnet" in name else {}
    assert_as_stock(name, make, inputs(name, **wide))


def test_pictures_and_masks_of_another_size_are_resized_as_stock_does(make: Make, inputs: Any) -> None:
    rng = np.random.default_rng(2)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (90, 150, 3), dtype=np.uint8))
    mask = PIL.Image.new("L", (150, 90))
    mask.paste(255, (33, 17, 101, 59))
    for name in ("KandinskyV22Img2ImgPipeline", "KandinskyV22InpaintPipeline"):
        arguments = inputs(name, image=picture)
        assert_as_stock(name, make, arguments | ({"mask_image": mask} if "Inpaint" in name else {}))


def test_tensors_and_arrays_are_read_as_stock_reads_them(make: Make, inputs: Any, picture: Any, mask: Any) -> None:
    array, white = np.asarray(picture), np.asarray(mask, dtype=np.float32) / 255
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy())[None] / 127.5 - 1
    assert_as_stock("KandinskyV22Img2ImgPipeline", make, inputs("KandinskyV22Img2ImgPipeline", image=tensor))
    name = "KandinskyV22InpaintPipeline"
    assert_as_stock(name, make, inputs(name, image=array, mask_image=white.copy()))
    assert_as_stock(name, make, inputs(name, image=tensor, mask_image=torch.from_numpy(white.copy())[None, None]))


def test_given_latents_are_scaled_as_stock_does(make: Make, inputs: Any) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=seeded(5)[0])
    for name in ("KandinskyV22Pipeline", "KandinskyV22InpaintPipeline", "KandinskyV22ControlnetPipeline"):
        assert_as_stock(name, make, inputs(name, latents=latents))


def test_pil_pictures_are_the_ones_of_stock(make: Make, inputs: Any) -> None:
    name = "KandinskyV22CombinedPipeline"
    arguments = inputs(name, output_type="pil")
    stock = make(getattr(kandinsky2_2, name))(**arguments, generator=seeded(3)[0]).images[0]
    ours = make(getattr(kandinsky_diffusers, name)).exact_reference(True)(**arguments, generator=seeded(3)[0])
    assert np.array_equal(np.asarray(ours.images[0]), np.asarray(stock))


def test_a_callback_sees_and_changes_what_it_does_in_stock(make: Make, inputs: Any, embeds: Any) -> None:
    """`image_embeds` holds both halves; of what a callback returns, stock takes on embeddings and masks too."""
    other = torch.cat([embeds(2)["image_embeds"][:1], embeds(2)["negative_image_embeds"][:1]])
    names = ["latents", "image_embeds", "negative_image_embeds", "masked_image", "mask_image"]

    def run(cls: type) -> tuple[list[dict[str, torch.Tensor]], Any]:
        seen: list[dict[str, torch.Tensor]] = []

        def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
            seen.append({name: tensor.clone() for name, tensor in tensors.items()})
            whole = {"mask_image": torch.zeros_like(tensors["mask_image"])}  # from then on all is repainted
            return {0: {"image_embeds": other}, 1: whole}.get(index, {})

        arguments = inputs(cls.__name__, num_inference_steps=4, callback_on_step_end_tensor_inputs=names)
        pipe = make(cls)
        if cls is kandinsky_diffusers.KandinskyV22InpaintPipeline:
            pipe.exact_reference(True)
        return seen, pipe(**arguments, callback_on_step_end=callback, generator=seeded(3)[0]).images

    seen_by_stock, stock = run(kandinsky2_2.KandinskyV22InpaintPipeline)
    seen, ours = run(kandinsky_diffusers.KandinskyV22InpaintPipeline)
    assert np.array_equal(ours, stock)
    for tensors, in_stock in zip(seen, seen_by_stock, strict=True):
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in in_stock.items()
        }
        assert all(torch.equal(tensors[name], in_stock[name]) for name in names)


# --------------------------------------------------------------------------------------------------------- embeddings
def assert_embeddings_as_stock(name: str, make: Make, run: Callable[[Any], Any], negative: bool = True) -> None:
    stock = run(make(getattr(kandinsky2_2, name)))
    pipe = make(getattr(kandinsky_diffusers, name))
    for exact in (True, False):
        ours = run(pipe.exact_reference(exact))
        for kind in ("image_embeds", "negative_image_embeds") if negative else ("image_embeds",):
            if exact:
                assert torch.equal(ours[kind], stock[kind]), kind
            else:
                assert_close(ours[kind], stock[kind], SAMPLER, kind)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"negative_prompt": "ugly"},
        {"guidance_scale": 1.0},
        {"prompt": "A Cat,  in Unicode …" * 30, "negative_prompt": ""},
    ],
    ids=["prompt", "negative prompt", "no guidance", "long prompt"],
)
@pytest.mark.parametrize("name", ["KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"])
def test_a_prior_makes_what_stock_makes(make: Make, inputs: Any, name: str, changed: dict[str, Any]) -> None:
    arguments = inputs(name, **{"num_inference_steps": 6, **changed})
    assert_embeddings_as_stock(name, make, partial(_seeded, arguments=arguments))


def _seeded(pipe: Any, arguments: dict[str, Any]) -> Any:
    return pipe(**arguments, generator=seeded(1)[0])


def test_emb2emb_starts_from_embeddings_or_pictures_as_stock_does(make: Make, inputs: Any, embeds: Any) -> None:
    name = "KandinskyV22PriorEmb2EmbPipeline"
    odd = PIL.Image.fromarray(np.random.default_rng(3).integers(0, 256, (61, 97, 3), dtype=np.uint8))
    for image in (embeds()["image_embeds"], odd, [odd]):
        run = partial(_seeded, arguments=inputs(name, image=image, strength=0.8))
        assert_embeddings_as_stock(name, make, run)


@pytest.mark.parametrize(
    "negatives",
    [{}, {"negative_prompt": "ugly"}, {"negative_prior_prompt": "grey"}],
    ids=["none", "negative prompt", "negative prior prompt"],
)
def test_mixing_gives_what_stock_gives(make: Make, negatives: dict[str, str]) -> None:
    odd = PIL.Image.fromarray(np.random.default_rng(3).integers(0, 256, (61, 97, 3), dtype=np.uint8))
    items, weights = ["a cat", odd, "a dog"], [0.3, 0.4, 0.3]
    assert_embeddings_as_stock(
        "KandinskyV22PriorPipeline",
        make,
        lambda pipe: pipe.interpolate(items, weights, num_inference_steps=3, generator=seeded(1)[0], **negatives),
    )


def test_emb2emb_mixes_pictures_as_stock_does(make: Make, picture: Any, mask: Any) -> None:
    """Only the mixed embeddings: the negative ones of stock are noise."""
    items = [picture, mask.convert("RGB")]
    assert_embeddings_as_stock(
        "KandinskyV22PriorEmb2EmbPipeline", make, lambda pipe: pipe.interpolate(items, [0.3, 0.7]), negative=False
    )


# ------------------------------------------------------------------------------------------------------------ batches
@pytest.mark.parametrize("name", COMBINED)
def test_each_picture_of_a_batch_is_the_picture_made_alone(
    make: Make, inputs: Any, picture: Any, mask: Any, hint: torch.Tensor, name: str
) -> None:
    """In float64: in float32 the batch changes the order of sums, and random weights blow that up."""
    pipe = make(getattr(kandinsky_diffusers, name), dtype=torch.float64)
    given = inputs(name, output_type="latent")
    both: dict[str, Any] = {"prompt": ["a cat", "a dog"], "negative_prompt": ["ugly", "grey"]}
    if "image" in given:
        both["image"] = [picture, picture.transpose(PIL.Image.Transpose.ROTATE_90)]
    if "mask_image" in given:
        both["mask_image"] = [mask, mask.transpose(PIL.Image.Transpose.ROTATE_180)]
    if "hint" in given:
        both["hint"] = torch.cat([hint, hint.flip(-1) ** 2])

    together = pipe(**given | both, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3)).images
    assert len(together) == 4
    for index in (1, 2):
        single = {key: values[index // 2] for key, values in both.items()}
        alone = pipe(**given | single, generator=seeded(index)).images
        assert_close(together[index], alone[0], SINGLE_IN_BATCH, f"picture {index}")


@pytest.mark.parametrize("scheduler", ["DDIM", "DPM++", "UnCLIP"])
@pytest.mark.parametrize("name", ["KandinskyV22Pipeline", "KandinskyV22InpaintPipeline"])
def test_each_picture_of_a_batch_is_the_picture_made_alone_by_any_scheduler(
    make: Make, inputs: Any, embeds: Any, components: Any, name: str, scheduler: str
) -> None:
    pipe = make(
        getattr(kandinsky_diffusers, name),
        dtype=torch.float64,
        scheduler=scheduler_for(name, scheduler, components),
    )
    given, rows = inputs(name, output_type="latent"), embeds(2)
    together = pipe(**given | rows, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3)).images
    alone = pipe(**given | {key: row[1:] for key, row in rows.items()}, generator=seeded(2)).images
    assert_close(together[2], alone[0], SINGLE_IN_BATCH)


@pytest.mark.parametrize("negative", [None, "ugly", ["ugly", "grey"]])
@pytest.mark.parametrize("name", ["KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"])
def test_each_embedding_of_a_batch_is_the_embedding_made_alone(
    make: Make, inputs: Any, picture: Any, mask: Any, name: str, negative: Any
) -> None:
    pipe = make(getattr(kandinsky_diffusers, name), dtype=torch.float64)
    given = inputs(name)
    both: dict[str, Any] = {"prompt": ["a cat", "a dog"]}
    if "image" in given:
        both["image"] = [picture, mask.convert("RGB")]
    together = pipe(**given | both, negative_prompt=negative, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    assert len(together.image_embeds) == len(together.negative_image_embeds) == 4
    for index in (1, 2):
        single = {key: values[index // 2] for key, values in both.items()}
        own_negative = negative[index // 2] if isinstance(negative, list) else negative
        alone = pipe(**given | single, negative_prompt=own_negative, generator=seeded(index))
        for kind in ("image_embeds", "negative_image_embeds"):
            assert_close(together[kind][index], alone[kind][0], SINGLE_IN_BATCH, f"{kind} {index}")
