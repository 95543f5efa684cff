"""IP-Adapters of 3.x under offloading, compilation, half precision and another attention backend."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import attention_backend

from kandinsky_diffusers import Kandinsky3Pipeline
from tests.k3.conftest import SIZE, seeded
from tests.support.parity import assert_close


CLOSE = 1e-5


@pytest.fixture
def own(components: Any) -> Any:
    """A pipeline with copies of the models, which a test may put hooks on; it takes states instead of prompts."""
    parts = {name: deepcopy(part) for name, part in components("3.1").items()}
    pipe = Kandinsky3Pipeline(**{**parts, "text_encoder": None, "tokenizer": None})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **given: Any) -> torch.Tensor:
    states = torch.randn(1, 5, pipe.unet.config.encoder_hid_dim, generator=seeded(1)[0])
    text = {"prompt_embeds": states, "attention_mask": torch.ones(1, 5)}
    quick = {**SIZE, "num_inference_steps": 1, "output_type": "latent"}
    return pipe(**text, generator=seeded(0), **{**quick, **given}).images


def offload_sequentially(pipe: Any, device: Any) -> None:
    """As diffusers does, which cannot bring weights to a CPU."""
    pipe._offload_device = device
    for model in (model for model in pipe.components.values() if isinstance(model, torch.nn.Module)):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_loading_into_an_offloaded_pipeline_draws_the_same(
    own: Any, ip_adapter: Path, picture: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(type(own), "enable_sequential_cpu_offload", offload_sequentially)
    bare = draw(own)
    own.load_ip_adapter(ip_adapter)
    reference = draw(own, ip_adapter_image=picture)
    own.unload_ip_adapter()
    getattr(own, f"enable_{kind}_cpu_offload")(device="cpu")
    own.load_ip_adapter(ip_adapter)
    assert hasattr(own.image_encoder, "_hf_hook")
    for _ in range(2):
        assert_close(draw(own, ip_adapter_image=picture), reference, CLOSE)
    own.unload_ip_adapter()
    assert_close(draw(own), bare, CLOSE)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_comes_after_loading(
    own: Any, ip_adapter: Path, picture: Any, tmp_path: Path, offload_type: str
) -> None:
    own.load_ip_adapter(ip_adapter)
    reference = draw(own, ip_adapter_image=picture)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    own.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=offload_type, offload_to_disk_path=str(tmp_path), **blocks
    )
    assert_close(draw(own, ip_adapter_image=picture), reference, CLOSE)
    for change in (own.unload_ip_adapter, lambda: own.load_ip_adapter(ip_adapter)):
        with pytest.raises(ValueError, match="group offloading"):
            change()


@torch.no_grad()
def test_a_compiled_block_takes_adapters_too(own: Any, ip_adapter: Path) -> None:
    """One of the blocks with a cross-attention; the rest of the UNet does not change."""
    block, channels = own.unet.down_blocks[1].attentions[1], own.unet.config.block_out_channels[1]
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    width, time = own.unet.config.cross_attention_dim, torch.randn(1, own.unet.config.time_embedding_dim)
    sample, text = torch.randn(1, channels, 4, 4), torch.randn(1, 5, width)

    def check(context: torch.Tensor) -> None:
        given = (sample, time, context, torch.zeros(1, 1, 5))
        assert_close(compiled(*given), block(*given), CLOSE)

    check(text)
    own.load_ip_adapter(ip_adapter)
    pictures = torch.randn(1, own.unet.image_proj[0].num_image_text_embeds, width)
    for scale in (1.0, 0.5):
        own.load_ip_adapter(ip_adapter)
        own.set_ip_adapter_scale(scale)
        check(torch.cat([text, pictures], dim=1))


def test_the_attention_backend_is_that_of_the_pictures_too(own: Any, ip_adapter: Path, picture: Any) -> None:
    own.load_ip_adapter(ip_adapter)
    reference = draw(own, ip_adapter_image=picture)
    with attention_backend("native"):  # takes back that the choice becomes everybody's default
        own.unet.set_attention_backend("_native_math")
    assert {processor._attention_backend for processor in own.unet.attn_processors.values()} == {"_native_math"}
    assert_close(draw(own, ip_adapter_image=picture), reference, CLOSE)
    own.unload_ip_adapter()
    assert {processor._attention_backend for processor in own.unet.attn_processors.values()} == {"_native_math"}


def test_half_precision_stays_near_single(own: Any, ip_adapter: Path, picture: Any) -> None:
    own.load_ip_adapter(ip_adapter)
    given = {"ip_adapter_image": picture, "latents": torch.randn(1, 4, 8, 8), "num_inference_steps": 1}
    single = draw(own, **given)
    own.to(torch.bfloat16)
    own.load_ip_adapter(ip_adapter)
    half = draw(own, **given)
    assert own.unet.image_proj[0].norm.weight.dtype == own.image_encoder.dtype == torch.bfloat16
    assert (half.float() - single).abs().mean() <= 0.05
