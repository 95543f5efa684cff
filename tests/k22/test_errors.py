"""Wrong arguments of the 2.2 pipelines are named before a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import kandinsky_diffusers
from tests.k22.conftest import seeded


MODELS = ("unet", "movq", "prior", "text_encoder", "image_encoder")
Refused = Callable[..., None]


@pytest.fixture
def refused(make: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """`refused(class name, changed arguments, name in the message)`."""

    def check(name: str, changed: dict[str, Any], named: str) -> None:
        pipe = make(getattr(kandinsky_diffusers, name))
        for model in (*MODELS, *(f"prior_{model}" for model in MODELS)):
            for method in ("forward", "encode", "decode"):
                if hasattr(getattr(pipe, model, None), method):
                    monkeypatch.setattr(getattr(pipe, model), method, lambda *_, **__: pytest.fail("a model ran"))
        with pytest.raises((ValueError, TypeError), match=named):
            pipe(**inputs(name, **changed))

    return check


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompt": None}, "`prompt`"),
        ({"prompt": []}, "`prompt`"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt`"),
        ({"negative_prior_prompt": ["a", "b"]}, "`negative_prior_prompt`"),
        ({"guidance_scale": [1.0, 2.0]}, "`guidance_scale`"),
        ({"latents": torch.zeros(3, 5)}, "`latents`"),
        ({"generator": seeded(0, 1)}, "`generator`"),
        ({"output_type": "pil"}, "`output_type`"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"num_inference_steps": 1001}, "`num_inference_steps`"),
        ({"callback_on_step_end_tensor_inputs": ["image_embeds"]}, "`callback_on_step_end_tensor_inputs`"),
    ],
)
@pytest.mark.parametrize("name", ["KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"])
def test_of_priors(refused: Refused, name: str, changed: dict[str, Any], named: str) -> None:
    refused(name, changed, named)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"image": None}, "`image`"),
        ({"image": "cat.png"}, "`image`"),
        ({"image": torch.zeros(1, 5)}, "`image`"),
        ({"image": []}, "`image`"),
        ({"prompt": ["a", "b", "c"], "image": torch.zeros(2, 32)}, "`image`"),
        ({"strength": 0.0}, "`strength`"),
        ({"strength": 1.5}, "`strength`"),
    ],
)
def test_of_emb2emb(refused: Refused, changed: dict[str, Any], named: str) -> None:
    refused("KandinskyV22PriorEmb2EmbPipeline", changed, named)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompt": 5}, "`prompt`"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt`"),
        ({"prior_num_inference_steps": 0}, "`num_inference_steps`"),
        ({"prior_guidance_scale": [1.0, 2.0]}, "`guidance_scale`"),
        ({"height": 0}, "`height`"),
        ({"width": 64.5}, "`width`"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
        ({"generator": seeded(0, 1)}, "`generator`"),
        ({"latents": torch.zeros(1, 4, 9, 9)}, "`latents`"),
        ({"output_type": "jpg"}, "`output_type`"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs`"),
        ({"prior_callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs`"),
        ({"callback": print, "callback_on_step_end": print}, "`callback`"),
        ({"callback": print, "callback_steps": 0}, "`callback_steps`"),
        ({"guidance_scal": 4.0}, "guidance_scal"),
    ],
)
def test_of_combined_pipelines(refused: Refused, changed: dict[str, Any], named: str) -> None:
    refused("KandinskyV22CombinedPipeline", changed, named)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"image": None}, "`image`"),
        ({"image": np.zeros((8, 8))}, "`image`"),
        ({"image": np.full((8, 8, 3), 700.0)}, "`image`"),
        ({"mask_image": None}, "`mask_image`"),
        ({"mask_image": np.zeros((4, 8, 8, 3))}, "`mask_image`"),
        ({"strength": 1.5}, "`strength`"),
        ({"strength": 0.01}, "`strength`"),
        ({"padding_mask_crop": -1}, "`padding_mask_crop`"),
        ({"padding_mask_crop": 8, "mask_image": np.ones((64, 64))}, "`padding_mask_crop`"),
        ({"padding_mask_crop": 8, "mask_image": PIL.Image.new("L", (64, 64))}, "`mask_image`"),
        ({"padding_mask_crop": 8, "output_type": "np"}, "`output_type`"),
        ({"preserve_unmasked": True, "output_type": "latent"}, "`preserve_unmasked`"),
        ({"blur_factor": -1, "preserve_unmasked": True}, "`blur_factor`"),
    ],
)
def test_of_inpainting(refused: Refused, changed: dict[str, Any], named: str) -> None:
    refused("KandinskyV22InpaintCombinedPipeline", {"output_type": "pil", **changed}, named)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"hint": None}, "`hint`"),
        ({"hint": "depth.png"}, "`hint`"),
        ({"hint": torch.zeros(2, 5, 64, 64)}, "`hint`"),
        ({"hint": torch.full((1, 3, 64, 64), 3.0)}, "`hint`"),
        ({"hint": torch.full((1, 3, 64, 64), -1.0)}, "`hint`"),
        ({"hint": torch.zeros(3, 3, 64, 64)}, "`hint`"),
        ({"hint": []}, "`hint`"),
    ],
)
@pytest.mark.parametrize("name", ["KandinskyV22ControlnetPipeline", "KandinskyV22ControlnetImg2ImgCombinedPipeline"])
def test_of_hints(refused: Refused, name: str, changed: dict[str, Any], named: str) -> None:
    refused(name, changed, named)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"image_embeds": None}, "`image_embeds`"),
        ({"image_embeds": "x"}, "`image_embeds`"),
        ({"image_embeds": torch.zeros(1, 2, 3)}, "`image_embeds`"),
        ({"image_embeds": torch.zeros(1, 5)}, "`image_embeds`"),
        ({"negative_image_embeds": None}, "`negative_image_embeds`"),
        ({"negative_image_embeds": torch.zeros(3, 32)}, "`negative_image_embeds`"),
        ({"hint": torch.zeros(1, 3, 64, 64)}, "hint"),
    ],
)
def test_of_decoders(refused: Refused, changed: dict[str, Any], named: str) -> None:
    refused("KandinskyV22Pipeline", changed, named)


@pytest.mark.parametrize(
    ("items", "weights", "named"),
    [
        (["a cat", "a dog"], [1.0], "`weights`"),
        (["a cat", "a dog"], [[0.5, 0.5], [1.0]], "`weights`"),
        ([], [], "`weights`|`images_and_prompts`"),
        (["a cat"], [], "`weights`"),
        (["a cat"], 1.0, "`weights`"),
        (["a cat", 5], [0.5, 0.5], "`images_and_prompts`"),
    ],
)
def test_of_mixing(make: Any, monkeypatch: pytest.MonkeyPatch, items: Any, weights: Any, named: str) -> None:
    pipe = make(kandinsky_diffusers.KandinskyV22CombinedPipeline)
    for model in ("unet", "movq", *(f"prior_{model}" for model in MODELS[2:])):
        monkeypatch.setattr(getattr(pipe, model), "forward", lambda *_, **__: pytest.fail("a model ran"))
    with pytest.raises((ValueError, TypeError), match=named):
        pipe.prior_pipe.interpolate(items, weights)
    with pytest.raises((ValueError, TypeError), match=named):
        pipe.mix(items, weights)
    with pytest.raises((ValueError, TypeError), match="`height`"):
        pipe.mix(["a cat"], [1.0], height=0)


def test_a_call_can_be_checked_without_being_made(make: Any, inputs: Any) -> None:
    pipe = make(kandinsky_diffusers.KandinskyV22InpaintCombinedPipeline)
    arguments = inputs("KandinskyV22InpaintCombinedPipeline")

    assert pipe.check_call(**arguments)["guidance_scale"] == 4.0
    with pytest.raises(ValueError, match="`strength`"):
        pipe.check_call(**arguments | {"strength": 0.01})
    with pytest.raises(TypeError, match="stregnth"):
        pipe.check_call(**arguments, stregnth=1.0)
