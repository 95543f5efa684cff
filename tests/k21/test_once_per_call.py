"""What no step changes is computed once in a call of 2.1."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from kandinsky_diffusers import KandinskyPipeline, unet
from tests.k21.conftest import QUICK, seeded
from tests.support.counting import calls_of, filled_ahead, rows_of
from tests.support.far_device import moved_far, waits_in_the_loop


STEPS = 3
READ_ONCE = ("encoder_hid_proj", "add_embedding", "add_k_proj", "add_v_proj")


def drop_unconditional(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
    if index == 0:
        pipe._guidance_scale = 1.0
    return {}


@pytest.mark.parametrize("callback", [None, drop_unconditional])
def test_conditions_are_read_once_for_each_number_of_rows(
    make: Any, embeds: Any, callback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make(KandinskyPipeline, "decoder")
    quick = {**QUICK, **embeds(), "num_inference_steps": STEPS, "output_type": "latent"}

    def draw() -> torch.Tensor:
        return pipe("a cat", generator=seeded(0)[0], callback_on_step_end=callback, **quick).images

    with calls_of(pipe.unet, *READ_ONCE) as calls, rows_of(pipe.unet) as rows:
        latents = draw()
    assert rows == ([2, 2, 2] if callback is None else [2, 1, 1])
    assert calls == {name: {1 if callback is None else 2} for name in READ_ONCE}
    with filled_ahead(pipe.unet) as caches:
        assert torch.equal(draw(), latents)
    assert len(caches) == len(set(rows))
    monkeypatch.setattr(unet.UNet2DConditionModel, "supports_context_cache", False)
    assert torch.equal(draw(), latents)


def test_the_host_waits_for_nothing_in_the_loop(make: Any, components: Any, embeds: Any) -> None:
    """See the test of the same name for 2.2."""
    models = {name: deepcopy(components["decoder"][name]) for name in ("unet", "movq", "text_encoder")}
    pipe = make(KandinskyPipeline, "decoder", **models)
    for model in models.values():
        moved_far(model)
    given = {**QUICK, **embeds(), "prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    assert waits_in_the_loop(pipe, **given) == []
