"""The 2.2 pipelines in half precision, and offloaded, where the numbers must stay."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DDIMScheduler
from diffusers.pipelines import kandinsky2_2

from kandinsky_diffusers import KandinskyV22Pipeline
from tests.k22.conftest import QUICK, seeded
from tests.support.parity import MODULE, assert_close


QUICK_COMBINED = {**QUICK, "prior_num_inference_steps": 3, "negative_prompt": "ugly", "output_type": "np"}


@pytest.fixture
def load(repos_22: Path) -> Callable[[str], Any]:
    """A pipeline of its own from a repository: `load("decoder")`."""

    def from_folder(short: str) -> Any:
        pipe = AutoPipelineForText2Image.from_pretrained(repos_22 / f"kandinsky-2-2-{short}")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return from_folder


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    return pipe("a cat", generator=seeded(0)[0], **QUICK_COMBINED, **arguments).images


@pytest.mark.parametrize(
    ("short", "dtype", "allowed"), [("decoder", torch.float16, 0.01), ("controlnet-depth", torch.bfloat16, 0.05)]
)
def test_half_precision_stays_near_single(
    load: Any, hint: torch.Tensor, short: str, dtype: torch.dtype, allowed: float
) -> None:
    """Mean difference of pixel values in [0, 1]; the random weights make it larger than trained ones would."""
    pipe = load(short)
    embeds = pipe.prior_pipe("a cat", generator=seeded(0)[0], num_inference_steps=2)
    arguments = {**QUICK, **embeds, "latents": torch.randn(1, 4, 8, 8, generator=seeded(1)[0]), "output_type": "np"}
    arguments |= {"hint": hint} if short == "controlnet-depth" else {}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    single = pipe.decoder_pipe(**arguments).images
    half = pipe.to(dtype).decoder_pipe(**arguments).images
    assert np.isfinite(half).all()
    assert np.abs(half - single).mean() <= allowed
    assert np.isfinite(draw(pipe, **({"hint": hint} if "hint" in arguments else {}))).all()


def test_model_cpu_offload_draws_the_same_twice(load: Any) -> None:
    pipe = load("decoder")
    before = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(draw(pipe), before)
    assert np.array_equal(draw(pipe), before)
    assert len(pipe._all_hooks) == 5  # text encoder, image encoder, prior, UNet, MoVQ


def test_group_offload_of_the_whole_pipeline_draws_the_same(load: Any, tmp_path: Path, hint: torch.Tensor) -> None:
    pipe = load("controlnet-depth")
    before = draw(pipe, hint=hint)
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    np.testing.assert_allclose(draw(pipe, hint=hint), before, rtol=0, atol=1e-5)


def test_the_exact_reference_is_passed_on_to_prior_and_decoder(load: Any) -> None:
    """The cache of the prior is off with it: its prefill is never called."""
    pipe = load("decoder")
    calls = []
    forward = pipe.prior_prior.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(bool(kwargs.get("prefill")))
        return forward(*args, **kwargs)

    pipe.prior_prior.forward = spy
    draw(pipe.exact_reference(True))
    assert not any(calls)
    draw(pipe.exact_reference(False))
    assert any(calls)


@torch.no_grad()
def test_pipelines_that_share_a_movq_are_exact_or_not_at_each_call(make: Any) -> None:
    stock = make(kandinsky2_2.KandinskyV22Pipeline).movq
    latents = torch.randn(1, 4, 8, 8)
    expected = stock.decode(latents, force_not_quantize=True).sample
    exact, fast = (make(KandinskyV22Pipeline).exact_reference(value) for value in (True, False))
    assert exact.movq.decoder is fast.movq.decoder, "or this would show nothing"
    for _ in range(2):
        assert torch.equal(exact.decode_latents(latents, 64, 64), expected)
        pixels = fast.decode_latents(latents, 64, 64)
        assert not torch.equal(pixels, expected), "the saving is off"
        assert_close(pixels, expected, MODULE)
    fast.exact_reference(True).movq = deepcopy(stock)
    assert torch.equal(fast.decode_latents(latents, 64, 64), expected)
    exact.movq = torch.compile(exact.movq, backend="eager")  # `decode` is the model's own
    assert torch.equal(exact.decode_latents(latents, 64, 64), expected)


def test_channels_lie_in_memory_as_those_of_the_weights(make: Any, inputs: Any) -> None:
    """On the CPU a convolution whose weights lie otherwise than its input copies them first, at every step."""
    pipe = make(KandinskyV22Pipeline)
    convolutions = [module for module in pipe.unet.modules() if isinstance(module, torch.nn.Conv2d)]
    alike: list[bool] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: alike.append(inputs[0].is_contiguous()))
        for module in convolutions
    ]
    pipe(**inputs("KandinskyV22Pipeline"))
    assert len(alike) >= len(convolutions)
    assert all(alike)
    alike.clear()
    pipe.exact_reference(True)(**inputs("KandinskyV22Pipeline"))
    assert not all(alike), "stock's last bits need stock's layout"
    for hook in hooks:
        hook.remove()
