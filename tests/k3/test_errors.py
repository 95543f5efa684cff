"""Wrong arguments of the 3.x pipelines are named before a model runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.k3.conftest import TASKS, Refused, seeded


STATES = torch.zeros(1, 5, 20)
MASK = torch.ones(1, 5)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompt": None}, "`prompt`"),
        ({"prompt": []}, "`prompt`"),
        ({"prompt": 3}, "`prompt`"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt`"),
        ({"prompt_embeds": STATES, "attention_mask": MASK}, "`prompt`"),
        ({"prompt": None, "prompt_embeds": STATES}, "`attention_mask`"),
        ({"prompt": None, "prompt_embeds": STATES, "attention_mask": torch.ones(1, 4)}, "`attention_mask`"),
        ({"negative_prompt_embeds": STATES}, "`negative_attention_mask`"),
        ({"negative_prompt": "a", "negative_prompt_embeds": STATES, "negative_attention_mask": MASK}, "`negative_pr"),
        ({"height": 0}, "`height`"),
        ({"width": 64.0}, "`width`"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"num_inference_steps": 1001}, "`num_inference_steps`"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
        ({"output_type": "jpg"}, "`output_type`"),
        ({"generator": seeded(0, 1)}, "`generator`"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, "`latents`"),
        ({"callback_on_step_end_tensor_inputs": ["image_embeds"]}, "`callback_on_step_end_tensor_inputs`"),
        ({"callback": print, "callback_on_step_end": print}, "`callback`"),
    ],
)
@pytest.mark.parametrize("name", TASKS)
def test_of_all_tasks(refused: Refused, name: str, changed: dict[str, Any], named: str) -> None:
    refused(name, changed, named)


@pytest.mark.parametrize("name", TASKS[1:])
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"image": None}, "`image`"),
        ({"image": "picture.png"}, "`image`"),
        ({"image": np.full((64, 64, 3), 300)}, "`image`"),
        ({"image": torch.zeros(3, 3, 64, 64), "prompt": ["a", "b"]}, "`image`"),
        ({"strength": 1.5}, "`strength`"),
    ],
)
def test_of_pictures(refused: Refused, name: str, changed: dict[str, Any], named: str) -> None:
    refused(name, changed, named)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"mask_image": None}, "`mask_image`"),
        ({"mask_image": np.full((64, 64), 2000)}, "`mask_image`"),
        ({"mask_image": torch.ones(3, 64, 64), "prompt": ["a", "b"]}, "`mask_image`"),
        ({"padding_mask_crop": -1, "output_type": "pil"}, "`padding_mask_crop`"),
        ({"preserve_unmasked": True, "output_type": "latent"}, "`preserve_unmasked`"),
        ({"blur_factor": -1}, "`blur_factor`"),
    ],
)
def test_of_masks(refused: Refused, changed: dict[str, Any], named: str) -> None:
    refused("Kandinsky3InpaintPipeline", changed, named)


def test_a_prompt_without_text_encoder(refused: Refused) -> None:
    refused("Kandinsky3Pipeline", {}, "no text encoder", text_encoder=None)


def test_more_steps_than_flash_has(refused: Refused) -> None:
    refused("Kandinsky3Pipeline", {"num_inference_steps": 5}, "`num_inference_steps`", kind="flash")


def test_states_of_another_width(refused: Refused) -> None:
    wrong = {"prompt": None, "prompt_embeds": torch.zeros(1, 5, 7), "attention_mask": MASK}
    refused("Kandinsky3Pipeline", wrong, "`prompt_embeds`")
