"""The 2.1 pipelines under half precision, offloading, adapters and compilation, where the numbers must stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoPipelineForText2Image, attention_backend
from peft import LoraConfig

from kandinsky_diffusers import KandinskyAncestralScheduler
from tests.k21.conftest import QUICK, seeded
from tests.support.shallow import shallow


QUICK_COMBINED = {**QUICK, "prior_num_inference_steps": 3, "negative_prompt": "ugly", "output_type": "np"}


@pytest.fixture
def pipe(converted_21: Path) -> Any:
    pipe = AutoPipelineForText2Image.from_pretrained(converted_21 / "kandinsky-2-1")
    pipe.unet = shallow(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> np.ndarray:
    return pipe("a cat", generator=seeded(0)[0], **QUICK_COMBINED).images


@pytest.mark.parametrize("scheduler", ["ddim", "ancestral"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision_stays_near_single(pipe: Any, dtype: torch.dtype, allowed: float, scheduler: str) -> None:
    """Mean difference of pixel values in [0, 1]; the random weights make it larger than trained ones would."""
    if scheduler == "ancestral":
        pipe.scheduler = KandinskyAncestralScheduler()
    generator, latents = seeded(0, 1)
    embeds = pipe.prior_pipe("a cat", generator=generator, num_inference_steps=2)
    noise = torch.randn(1, 4, 8, 8, generator=latents)
    arguments = {**QUICK, **embeds, "latents": noise, "output_type": "np"}
    single = pipe.decoder_pipe("a cat", generator=seeded(2)[0], **arguments).images
    half = pipe.to(dtype).decoder_pipe("a cat", generator=seeded(2)[0], **arguments).images
    assert np.isfinite(half).all()
    assert np.abs(half - single).mean() <= allowed * (20 if scheduler == "ancestral" else 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cached_prior_is_as_near_in_half_precision_as_the_uncached(pipe: Any, dtype: torch.dtype) -> None:
    def embed(exact: bool) -> torch.Tensor:
        prior_pipe = pipe.prior_pipe.exact_reference(exact)
        many = {"num_images_per_prompt": 16, "guidance_scale": 2.0, "num_inference_steps": 1}
        return prior_pipe(["a cat", "a dog"], latents=noise, **many).image_embeds

    noise = torch.randn(32, pipe.prior_prior.config.embedding_dim, generator=seeded(0)[0])
    single = embed(exact=True)
    pipe.to(dtype)
    cached, uncached = ((embed(exact).float() - single).square().mean().sqrt() for exact in (False, True))
    assert cached <= 1.1 * uncached


def test_model_cpu_offload_draws_the_same_twice(pipe: Any) -> None:
    before = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert np.abs(draw(pipe) - before).max() <= 1e-5  # at another address a sum may be made in another order


def test_sequential_offload_draws_the_same(pipe: Any) -> None:
    """By accelerate itself: `enable_sequential_cpu_offload` names the CPU "cpu:0", which accelerate does not take."""
    before = draw(pipe)
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            cpu_offload(component, torch.device("cpu"), offload_buffers=len(component._parameters) > 0)
            assert next(component.parameters()).device.type == "meta", name
    np.testing.assert_allclose(draw(pipe), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_of_the_whole_pipeline_draws_the_same(pipe: Any, tmp_path: Path, offload_type: str) -> None:
    before = draw(pipe)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=offload_type, offload_to_disk_path=str(tmp_path), **blocks
    )
    np.testing.assert_allclose(draw(pipe), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("component", ["unet", "prior_prior"])
def test_an_adapter_acts_and_can_be_switched_off(pipe: Any, component: str) -> None:
    before = draw(pipe)
    model = getattr(pipe, component)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = draw(pipe)
    assert not np.allclose(adapted, before)
    model.disable_adapters()
    np.testing.assert_allclose(draw(pipe), before, rtol=0, atol=1e-5)


def test_a_compiled_decoder_draws_the_same(pipe: Any) -> None:
    """Of the decoder; tests/test_lora.py has a compiled prior."""
    before = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    np.testing.assert_allclose(draw(pipe), before, rtol=0, atol=1e-5)


def test_compiled_components_are_saved_under_their_stock_names(pipe: Any, tmp_path: Path) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe.prior_prior = torch.compile(pipe.prior_prior, backend="eager")
    pipe.save_pretrained(tmp_path)
    again = AutoPipelineForText2Image.from_pretrained(tmp_path)
    assert again.config["unet"] == ("diffusers", "UNet2DConditionModel")
    assert again.config["prior_prior"] == ("diffusers", "PriorTransformer")


def test_the_choice_of_an_attention_backend_acts(pipe: Any) -> None:
    before = draw(pipe)
    with attention_backend("native"):  # takes back that the choice becomes everybody's default
        pipe.unet.set_attention_backend("_native_math")
    assert {processor._attention_backend for processor in pipe.unet.attn_processors.values()} == {"_native_math"}
    np.testing.assert_allclose(draw(pipe), before, rtol=0, atol=1e-4)


def test_xformers_without_xformers_is_an_error_that_says_so(pipe: Any) -> None:
    with pytest.raises((ModuleNotFoundError, ValueError), match="xformers"):
        pipe.enable_xformers_memory_efficient_attention()


def test_memory_savings_of_the_movq_are_reached_by_both_names(pipe: Any) -> None:
    for name in ("movq", "vae"):
        getattr(pipe, f"enable_{name}_slicing")()
        getattr(pipe, f"enable_{name}_tiling")()
        assert pipe.movq.use_slicing
        assert pipe.movq.use_tiling
        getattr(pipe, f"disable_{name}_slicing")()
        getattr(pipe, f"disable_{name}_tiling")()
        assert not pipe.movq.use_slicing
        assert not pipe.movq.use_tiling
