"""The 2.2 pipelines do what their arguments say, and say so at once where they cannot."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from diffusers.pipelines import kandinsky2_2

import kandinsky_diffusers
from kandinsky_diffusers import (
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetCombinedPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintCombinedPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    sampling,
)
from tests.k22.conftest import COMBINED, DECODERS, PRIORS, STOCK_COMBINED, seeded
from tests.support.parity import assert_close


Make = Callable[..., Any]


def ours(name: str) -> Any:
    return getattr(kandinsky_diffusers, name)


# -------------------------------------------------------------------------------------------------- as stock is called
@pytest.mark.parametrize("name", [*PRIORS, *DECODERS, *STOCK_COMBINED])
def test_calls_written_for_stock_mean_the_same(name: str) -> None:
    """Every argument of stock is taken, at its place and with its default."""
    of_stock = inspect.signature(getattr(kandinsky2_2, name).__call__).parameters
    expected = [p for p in of_stock.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    own = list(inspect.signature(ours(name).__call__).parameters.values())
    for parameter, stock in zip(own, expected, strict=False):
        assert parameter.name == stock.name
        assert parameter.kind is stock.kind
        if stock.default is not inspect.Parameter.empty:
            default = parameter.default
            assert (list(default) if isinstance(default, tuple) else default) == stock.default, parameter.name
    assert issubclass(ours(name), getattr(kandinsky2_2, name))


def test_calls_by_position(make: Make, embeds: Any, picture: Any, mask: Any, hint: torch.Tensor) -> None:
    rows, quick = tuple(embeds().values()), {"num_inference_steps": 1, "output_type": "latent"}
    for name, between, after in (
        ("KandinskyV22Pipeline", (), ()),
        ("KandinskyV22ControlnetPipeline", (), (hint,)),
        ("KandinskyV22InpaintPipeline", (picture, mask), ()),
    ):
        latents = make(ours(name))(rows[0], *between, rows[1], *after, 64, 128, **quick).images
        assert latents.shape == (1, 4, 8, 16)


@pytest.mark.parametrize("name", COMBINED)
def test_every_task_draws_in_the_size_asked_for(make: Make, inputs: Any, name: str) -> None:
    arguments = inputs(name, height=72, width=50, output_type="pil", prompt=["a cat", "a dog"])
    assert [image.size for image in make(ours(name))(**arguments).images] == [(50, 72)] * 2


@pytest.mark.parametrize("name", ["KandinskyV22Pipeline", "KandinskyV22ControlnetImg2ImgPipeline"])
def test_outputs_of_every_kind_are_the_same_picture(make: Make, inputs: Any, name: str) -> None:
    pipe = make(ours(name))
    drawn = {
        kind: pipe(**inputs(name, output_type=kind), generator=seeded(0)).images
        for kind in ("pil", "np", "pt", "latent")
    }
    picture = drawn["np"][0]
    assert np.array_equal(np.asarray(drawn["pil"][0]), (picture * 255).round().astype(np.uint8))
    assert np.array_equal(drawn["pt"][0].permute(1, 2, 0).numpy(), picture)
    with torch.no_grad():
        decoded = pipe.decode_latents(drawn["latent"], 64, 64)
    assert_close((decoded[0] / 2 + 0.5).clamp(0, 1), drawn["pt"][0], 1e-5)
    by_tuple = pipe(**inputs(name, return_dict=False), generator=seeded(0))
    assert isinstance(by_tuple, tuple)
    assert np.array_equal(by_tuple[0], drawn["np"])


@pytest.mark.parametrize("name", [*DECODERS, *COMBINED])
def test_both_callbacks_are_called_at_each_step(make: Make, inputs: Any, name: str) -> None:
    pipe, seen, older = make(ours(name)), [], []
    arguments = inputs(name)
    pipe(
        **arguments,
        callback_on_step_end=lambda pipe, index, timestep, tensors: seen.append((index, sorted(tensors))),
        callback_on_step_end_tensor_inputs=["latents", "image_embeds", "negative_image_embeds"],
    )
    assert seen == [(index, ["image_embeds", "latents", "negative_image_embeds"]) for index in (0, 1)]
    pipe(**arguments, callback=lambda index, timestep, latents: older.append(index), callback_steps=2)
    assert older == [0]


def test_a_callback_can_swap_the_conditions(make: Make, inputs: Any, embeds: Any) -> None:
    pipe, given = make(KandinskyV22Pipeline), inputs("KandinskyV22Pipeline", num_inference_steps=3)
    other = torch.cat(list(embeds(2).values()))[:2]

    def swap(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"image_embeds": other} if index == 0 else {}

    swapped, plain = (
        pipe(**given, generator=seeded(0), callback_on_step_end=callback).images for callback in (swap, None)
    )
    assert not np.allclose(swapped, plain)


def test_callbacks_of_the_prior(make: Make, inputs: Any) -> None:
    seen: list[tuple[int, list[str]]] = []
    names = ["latents", "text_mask"]
    make(KandinskyV22CombinedPipeline)(
        **inputs("KandinskyV22CombinedPipeline", prior_num_inference_steps=3),
        prior_callback_on_step_end=lambda pipe, index, timestep, tensors: seen.append((index, sorted(tensors))) or {},
        prior_callback_on_step_end_tensor_inputs=names,
    )
    assert seen == [(index, names) for index in range(3)]


# ----------------------------------------------------------------------------------------------------------- guidance
def test_guidance_of_one_needs_no_negative_embeddings_and_runs_one_half(make: Make, inputs: Any) -> None:
    pipe, rows = make(KandinskyV22Pipeline), []
    forward = pipe.unet.forward
    given = inputs("KandinskyV22Pipeline", guidance_scale=1.0, negative_image_embeds=None)

    def spy(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = spy
    try:
        assert np.isfinite(pipe(**given).images).all()
    finally:
        del pipe.unet.forward
    assert rows == [1, 1]


def test_guidance_below_one_mixes_as_its_formula_says(make: Make, inputs: Any) -> None:
    """u + g (c - u) with g = 0 is u: what a call draws that is given the negative embeddings alone."""
    pipe, given = make(KandinskyV22Pipeline), inputs("KandinskyV22Pipeline", output_type="latent")
    given["num_inference_steps"] = 1
    unguided = pipe(**given, guidance_scale=0.0, generator=seeded(0)).images
    given |= {"image_embeds": given["negative_image_embeds"]}
    negative = pipe(**given, guidance_scale=1.0, generator=seeded(0)).images
    assert_close(unguided, negative, 1e-4)


# --------------------------------------------------------------------------------------------------------------- hint
def test_hints_of_every_kind_are_the_same_depth_map(make: Make, inputs: Any, hint: torch.Tensor) -> None:
    pipe = make(KandinskyV22ControlnetPipeline)
    grey = (hint[0, 0].numpy() * 255).round().astype(np.uint8)
    kinds = [
        hint,
        hint[0],
        hint[0, :1],
        [hint],
        hint[0].permute(1, 2, 0).numpy(),
        hint[0, 0].numpy(),
        grey,
        np.stack([grey] * 3, axis=-1),
        np.stack([grey] * 3, axis=-1)[None],
        PIL.Image.fromarray(grey),
        PIL.Image.fromarray(grey).convert("RGB"),
    ]
    drawn = [
        pipe(**inputs("KandinskyV22ControlnetPipeline", hint=kind, output_type="latent"), generator=seeded(0)).images
        for kind in kinds
    ]
    for latents in drawn[1:]:
        assert_close(latents, drawn[0], 1e-4)
    flat = pipe(
        **inputs("KandinskyV22ControlnetPipeline", hint=torch.zeros_like(hint), output_type="latent"),
        generator=seeded(0),
    ).images
    assert not torch.allclose(flat, drawn[0], atol=1e-2)


def test_hints_of_another_size_are_resized(make: Make, inputs: Any, hint: torch.Tensor) -> None:
    pipe, name = make(KandinskyV22ControlnetPipeline), "KandinskyV22ControlnetPipeline"
    large = torch.nn.functional.interpolate(hint, scale_factor=2, mode="nearest")
    same, other = (
        pipe(**inputs(name, hint=kind, output_type="latent"), generator=seeded(0)).images for kind in (large, hint)
    )
    assert_close(same, other, 0.05)
    wide = pipe(**inputs(name, hint=large, height=72, width=130, output_type="pil")).images[0]
    assert wide.size == (130, 72)


# --------------------------------------------------------------------------------------------------------- inpainting
def test_known_pixels_come_back_untouched(make: Make, inputs: Any, picture: Any, mask: Any) -> None:
    pipe, name = make(KandinskyV22InpaintPipeline), "KandinskyV22InpaintPipeline"
    for strength in (1.0, 0.5):
        given = inputs(name, strength=strength, preserve_unmasked=True, output_type="pil")
        changed = (np.asarray(pipe(**given).images[0]) != np.asarray(picture)).any(axis=-1)
        assert not changed[np.asarray(mask) == 0].any()
        assert changed[np.asarray(mask) == 255].mean() > 0.9


def test_blurring_the_mask_blends_around_its_edge(make: Make, inputs: Any, picture: Any, mask: Any) -> None:
    pipe, name = make(KandinskyV22InpaintPipeline), "KandinskyV22InpaintPipeline"
    given = inputs(name, preserve_unmasked=True, output_type="pil")
    sharp, blurred = (
        (np.asarray(pipe(**given, blur_factor=radius).images[0]) != np.asarray(picture)).any(axis=-1)
        for radius in (None, 2)
    )
    reach = np.asarray(mask.filter(PIL.ImageFilter.GaussianBlur(2)))
    around = (np.asarray(mask) == 0) & (reach > 25)
    assert not sharp[around].any()
    assert blurred[around].mean() > 0.9
    assert not blurred[reach == 0].any()


@pytest.mark.parametrize("blur_factor", [None, 3])
def test_a_crop_around_the_mask_leaves_the_rest_of_a_large_picture_alone(
    make: Make, inputs: Any, blur_factor: int | None
) -> None:
    picture = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    mask = PIL.Image.new("L", picture.size)
    mask.paste(255, (100, 50, 160, 90))
    arguments = {"image": picture, "mask_image": mask, "padding_mask_crop": 16, "output_type": "pil"}
    image = make(KandinskyV22InpaintPipeline)(
        **inputs("KandinskyV22InpaintPipeline", **arguments, blur_factor=blur_factor)
    ).images[0]
    changed = (np.asarray(image) != np.asarray(picture)).any(axis=-1)
    assert image.size == picture.size
    untouched = np.asarray(mask) == 0
    if blur_factor:
        untouched = np.asarray(mask.filter(PIL.ImageFilter.GaussianBlur(blur_factor))) == 0
    assert not changed[untouched].any()
    assert changed[np.asarray(mask) == 255].mean() > 0.9


def test_strength_below_one_starts_from_the_picture(make: Make, inputs: Any) -> None:
    """A flat picture, hardly noised, stays flatter in the repainted region than noise does."""
    pipe, name = make(KandinskyV22InpaintPipeline), "KandinskyV22InpaintPipeline"
    steps: list[int] = []
    count = lambda pipe, index, timestep, tensors: steps.append(int(timestep)) or {}  # noqa: E731
    grey = PIL.Image.new("RGB", (64, 64), (128, 128, 128))
    given = inputs(name, image=grey, num_inference_steps=10, output_type="latent", callback_on_step_end=count)
    pipe(**given, strength=0.2)
    assert len(steps) == 2
    pipe(**given)
    assert len(steps) == 12


@pytest.mark.parametrize(
    ("white", "warns"), [((0, 0, 64, 48), True), ((0, 0, 64, 64), False), ((0, 0, 64, 16), False)]
)
def test_a_mask_that_looks_inverted_is_spoken_of_once(
    make: Make, inputs: Any, caplog: pytest.LogCaptureFixture, white: tuple[int, int, int, int], warns: bool
) -> None:
    """Up to diffusers 0.18 black was repainted: masks from that time are mostly white."""
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(255, white)
    pipe = make(KandinskyV22InpaintCombinedPipeline)
    for _ in range(2):
        pipe(**inputs("KandinskyV22InpaintCombinedPipeline", mask_image=mask, num_inference_steps=1))
    spoken = [record for record in caplog.records if "mask_image" in record.getMessage()]
    assert len(spoken) == warns
    make(KandinskyV22InpaintCombinedPipeline)(**inputs("KandinskyV22InpaintCombinedPipeline", mask_image=mask))
    assert len([record for record in caplog.records if "mask_image" in record.getMessage()]) == 2 * warns


# --------------------------------------------------------------------------------------------------- between pipelines
def test_from_pipe_leads_between_tasks_with_the_same_components(make: Make, inputs: Any) -> None:
    for name in ("KandinskyV22CombinedPipeline", "KandinskyV22InpaintCombinedPipeline"):
        pipe = make(ours(name))
        for auto, expected in (
            (AutoPipelineForImage2Image, "KandinskyV22Img2ImgCombinedPipeline"),
            (AutoPipelineForInpainting, "KandinskyV22InpaintCombinedPipeline"),
            (AutoPipelineForText2Image, "KandinskyV22CombinedPipeline"),
        ):
            other = auto.from_pipe(pipe)
            assert type(other) is ours(expected)
            assert all(other.components[key] is component for key, component in pipe.components.items())
            other.set_progress_bar_config(disable=True)
            assert np.isfinite(other(**inputs(expected)).images).all()
            pipe = other


def test_from_pipe_leads_from_controlnet_to_controlnet(make: Make, inputs: Any) -> None:
    pipe = AutoPipelineForImage2Image.from_pipe(make(KandinskyV22ControlnetCombinedPipeline))
    assert type(pipe).__name__ == "KandinskyV22ControlnetImg2ImgCombinedPipeline"
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe(**inputs(type(pipe).__name__)).images).all()
    assert type(AutoPipelineForText2Image.from_pipe(pipe)) is KandinskyV22ControlnetCombinedPipeline


def test_a_users_subclass_changes_one_part(make: Make, inputs: Any) -> None:
    class Unconditional(KandinskyV22Pipeline):
        """Forgets what it is asked to draw."""

        def predict_noise(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Any) -> torch.Tensor:
            flat = {name: torch.zeros_like(tensor) for name, tensor in conditions.items()}
            return super().predict_noise(latents, timestep, flat)

    given = inputs("KandinskyV22Pipeline", output_type="latent")
    forgetful = make(Unconditional)(**given, generator=seeded(0)).images
    nothing = {name: torch.zeros_like(given[name]) for name in ("image_embeds", "negative_image_embeds")}
    plain = make(KandinskyV22Pipeline)(**given | nothing, generator=seeded(0)).images
    assert torch.equal(forgetful, plain)


def test_stock_pipelines_still_work_on_what_our_pipelines_were_given(make: Make, inputs: Any) -> None:
    pipe = make(KandinskyV22Pipeline)
    stock = kandinsky2_2.KandinskyV22Pipeline(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    stock(**inputs("KandinskyV22Pipeline"))


def test_noise_comes_from_one_place(make: Make, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `draw_noise`, but for what stock's schedulers draw in their steps."""
    draws = []

    def zeros(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> torch.Tensor:
        draws.append(tuple(shape))
        return torch.zeros(shape, device=device, dtype=dtype)

    monkeypatch.setattr(sampling, "draw_noise", zeros)
    name = "KandinskyV22InpaintCombinedPipeline"
    make(ours(name))(**inputs(name, negative_prompt="ugly"))
    width = make(KandinskyV22PriorPipeline).prior.config.embedding_dim
    assert draws == [(2, width), (1, 4, 8, 8)]


def test_a_silent_pipeline_is_silent(make: Make, inputs: Any, capfd: pytest.CaptureFixture) -> None:
    make(KandinskyV22CombinedPipeline)(**inputs("KandinskyV22CombinedPipeline"))
    assert capfd.readouterr().err == ""
