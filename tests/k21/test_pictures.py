"""Pictures and masks as input: what image-to-image and inpainting make of them, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from kandinsky_diffusers import (
    KandinskyAncestralScheduler,
    KandinskyImg2ImgPipeline,
    KandinskyInpaintPipeline,
)
from tests.k21.conftest import QUICK, seeded
from tests.support.parity import assert_close


Make = Callable[..., Any]


def test_no_strength_gives_the_picture_back_through_the_movq(make: Make, embeds: Any, picture: Any) -> None:
    pipe = make(KandinskyImg2ImgPipeline, "decoder")
    kept = pipe("a cat", picture, **embeds(), **QUICK, strength=0.0, output_type="latent").images
    with torch.no_grad():
        assert_close(kept, pipe.movq.encode(pipe.image_processor.preprocess(picture, 64, 64)).latents, 1e-5)


def test_too_little_strength_for_a_step_is_said(make: Make, embeds: Any, picture: Any) -> None:
    with pytest.raises(ValueError, match=r"`strength` of 0\.1"):
        make(KandinskyImg2ImgPipeline, "decoder")("a cat", picture, **embeds(), **QUICK, strength=0.1)


@pytest.mark.parametrize("kind", ["decoder", "inpaint"], ids=["4 channels", "9 channels"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_known_pixels_come_back_untouched(
    make: Make, embeds: Any, picture: Any, mask: Any, kind: str, strength: float
) -> None:
    pipe = make(KandinskyInpaintPipeline, kind)
    image = pipe("a cat", picture, mask, **embeds(), **QUICK, strength=strength, preserve_unmasked=True).images[0]
    changed = (np.asarray(image) != np.asarray(picture)).any(axis=-1)
    assert not changed[np.asarray(mask) == 0].any()
    assert changed[np.asarray(mask) == 255].mean() > 0.9


def test_a_crop_around_the_mask_leaves_the_rest_of_a_large_picture_alone(make: Make, embeds: Any) -> None:
    picture = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    mask = PIL.Image.new("L", picture.size)
    mask.paste(255, (100, 50, 160, 90))
    pipe = make(KandinskyInpaintPipeline, "inpaint")
    image = pipe("a cat", picture, mask, **embeds(), **QUICK, padding_mask_crop=8).images[0]
    changed = (np.asarray(image) != np.asarray(picture)).any(axis=-1)
    assert image.size == picture.size
    assert not changed[np.asarray(mask) == 0].any()
    assert changed[np.asarray(mask) == 255].mean() > 0.9


def test_without_a_mask_channel_the_known_region_is_put_back_at_each_step(
    make: Make, embeds: Any, picture: Any, mask: Any
) -> None:
    pipe = make(KandinskyInpaintPipeline, "decoder")
    latents = pipe("a cat", picture, mask, **embeds(), **QUICK, output_type="latent").images
    with torch.no_grad():
        clean = pipe.movq.encode(pipe.image_processor.preprocess(picture, 64, 64)).latents
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[0:6, 1:7] = False  # the mask of latents 1..4 by 2..5, grown by one
    torch.testing.assert_close(latents[..., keep], clean[..., keep], rtol=0, atol=1e-5)
    assert not torch.allclose(latents[..., 2:4, 3:5], clean[..., 2:4, 3:5])


def test_a_mask_can_be_left_ungrown(make: Make, embeds: Any, picture: Any, mask: Any) -> None:
    scheduler = KandinskyAncestralScheduler(grow_mask=False)
    grown = make(KandinskyInpaintPipeline, "inpaint", scheduler=KandinskyAncestralScheduler())
    ungrown = make(KandinskyInpaintPipeline, "inpaint", scheduler=scheduler)
    masks = []
    for pipe in (grown, ungrown):
        seen: dict[str, torch.Tensor] = {}
        predict = pipe.predict_noise
        pipe.predict_noise = lambda x, t, conditions, seen=seen, predict=predict: (
            seen.update(conditions),
            predict(x, t, conditions),
        )[1]
        pipe("a cat", picture, mask, **embeds(), **QUICK)
        masks.append(seen["keep_mask"])
    assert (1 - masks[1]).sum() == 4 * 4
    assert (1 - masks[0]).sum() > 4 * 4


def test_pictures_of_every_kind_are_the_same_picture(make: Make, embeds: Any, picture: Any) -> None:
    pipe = make(KandinskyImg2ImgPipeline, "decoder")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)[None]
    kinds = [picture, array, array / 255.0, tensor, tensor / 255.0, tensor / 127.5 - 1.0, [picture], array[None]]
    results = [
        pipe("a cat", kind, **embeds(), **QUICK, strength=0.5, generator=seeded(0)[0], output_type="latent").images
        for kind in kinds
    ]
    for result in results[1:]:
        assert_close(result, results[0], 1e-5)


def test_latents_are_taken_as_a_picture(make: Make, embeds: Any, picture: Any) -> None:
    pipe = make(KandinskyImg2ImgPipeline, "decoder")
    with torch.no_grad():
        latents = pipe.movq.encode(pipe.image_processor.preprocess(picture, 64, 64)).latents
    by_latents, by_picture = (
        pipe("a cat", kind, **embeds(), **QUICK, strength=0.5, generator=seeded(0)[0], output_type="latent").images
        for kind in (latents, picture)
    )
    assert_close(by_latents, by_picture, 1e-5)
