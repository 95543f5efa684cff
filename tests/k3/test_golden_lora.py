"""The LoRA of the fork, as it is and converted, makes of the converted 3.1 what it makes of the fork's model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image

from tests.fixtures import Built, Recorded, release_3
from tests.k3.test_golden_pipelines import check, fork_arguments, fork_replay, fork_states
from tests.support.goldens import GoldenFamily
from tests.support.parity import MODULE, assert_close


@pytest.fixture(scope="module")
def loaded(recorded: Recorded) -> Any:
    pipe = AutoPipelineForText2Image.from_pretrained(recorded("3.1") / "kandinsky-3-1")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["as it is", "converted"])
def pipe(request: pytest.FixtureRequest, loaded: Any, built: Built, recorded: Recorded) -> Any:
    loaded.load_lora_weights(
        release_3(built, "3-lora", shallow=False)
        if request.param == "as it is"
        else recorded("3-lora") / "kandinsky-3-lora"
    )
    yield loaded
    loaded.unload_lora_weights()


@pytest.mark.parametrize(("weight", "out"), [(1.0, "out"), (0.5, "out_lora_weight_0_5")])
@torch.no_grad()
def test_golden_unet_with_lora(goldens_lora: GoldenFamily, pipe: Any, weight: float, out: str) -> None:
    case = goldens_lora.case("lora_unet")
    pipe.set_adapters("default_0", weight)
    inputs = (case[name] for name in ("x", "t", "context", "context_mask"))
    assert_close(pipe.unet(*inputs, projected=True).sample, case[out], MODULE)


@torch.no_grad()
def test_golden_text_to_image_with_lora(
    goldens_lora: GoldenFamily, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = goldens_lora.case("e2e_lora_t2i")
    pipe.set_adapters("default_0", case.parameters["lora_weight"])
    draws = fork_replay(case, pipe, monkeypatch)
    negative = fork_states(pipe, case.parameters.get("negative_prompt", ""))
    latents = pipe(**fork_arguments(case, pipe, negative)).images
    assert not draws.draws
    check(case, pipe, latents)
