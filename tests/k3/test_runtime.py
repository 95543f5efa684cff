"""The 3.x pipelines under half precision, offloading, adapters and compilation, where the numbers must stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoPipelineForText2Image, attention_backend
from peft import LoraConfig

from kandinsky_diffusers import Kandinsky3UNet
from tests.k3.conftest import QUICK, seeded
from tests.support.parity import assert_close


@pytest.fixture
def pipe(repo: Any) -> Any:
    pipe = AutoPipelineForText2Image.from_pretrained(repo("3.1"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **changed: Any) -> np.ndarray:
    return pipe(["a fox", "a lazy dog"], generator=seeded(0, 1), **{**QUICK, **changed}).images


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision_stays_near_single(pipe: Any, dtype: torch.dtype, allowed: float) -> None:
    """Mean difference of pixel values in [0, 1]; the noise is given, for it is drawn in the precision of the UNet."""
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, eta=0.0)
    noise = torch.randn(2, 4, 8, 8, generator=seeded(0)[0])
    single = draw(pipe, latents=noise)
    half = draw(pipe.to(dtype), latents=noise)
    assert np.isfinite(half).all()
    assert np.abs(half - single).mean() <= allowed


def test_model_cpu_offload_draws_the_same_twice(pipe: Any) -> None:
    before = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert_close(draw(pipe), before, 1e-4)


def test_sequential_offload_draws_the_same(pipe: Any) -> None:
    before = draw(pipe)
    for component in (pipe.text_encoder, pipe.unet, pipe.movq):
        cpu_offload(component, torch.device("cpu"), offload_buffers=len(component._parameters) > 0)
    assert_close(draw(pipe), before, 1e-4)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_of_the_whole_pipeline_draws_the_same(pipe: Any, tmp_path: Path, offload_type: str) -> None:
    before = draw(pipe)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=offload_type, offload_to_disk_path=str(tmp_path), **blocks
    )
    assert_close(draw(pipe), before, 1e-4)


def test_an_adapter_acts_and_can_be_switched_off(pipe: Any) -> None:
    before = draw(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not np.allclose(draw(pipe), before, atol=1e-3)
    pipe.unet.disable_adapters()
    assert_close(draw(pipe), before, 1e-4)


def test_a_compiled_unet_draws_the_same(pipe: Any) -> None:
    """One with fewer levels and blocks, which are all of the same kind, for tracing them takes long."""
    channels = pipe.unet.config.block_out_channels[:2]
    config = {**pipe.unet.config, "layers_per_block": 2, "block_out_channels": channels}
    pipe.unet = Kandinsky3UNet.from_config(config).eval()
    before = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    assert_close(draw(pipe), before, 1e-4)


def test_the_choice_of_an_attention_backend_acts(pipe: Any) -> None:
    before = draw(pipe)
    with attention_backend("native"):  # takes back that the choice becomes everybody's default
        pipe.unet.set_attention_backend("_native_math")
    assert {processor._attention_backend for processor in pipe.unet.attn_processors.values()} == {"_native_math"}
    assert_close(draw(pipe), before, 1e-4)


@pytest.mark.parametrize("backend", ["flash", "sage", "no such"])
def test_an_attention_backend_without_masks_is_refused(pipe: Any, backend: str) -> None:
    with pytest.raises(ValueError, match=f"`backend` is '{backend}'"):
        pipe.unet.set_attention_backend(backend)


def test_xformers_without_xformers_is_an_error_that_says_so(pipe: Any) -> None:
    for enable in (pipe, pipe.unet):
        with pytest.raises((ModuleNotFoundError, ValueError), match="xformers"):
            enable.enable_xformers_memory_efficient_attention()


def test_memory_savings_of_the_movq_draw_the_same_or_nearly(pipe: Any) -> None:
    arguments = {"height": 128, "width": 192}
    before = draw(pipe, **arguments)
    pipe.enable_movq_slicing()
    assert_close(draw(pipe, **arguments), before, 1e-4)
    pipe.enable_vae_tiling(64)
    tiled = draw(pipe, **arguments)
    assert tiled.shape == before.shape
    assert np.abs(tiled - before).mean() < 0.1
