"""Attention through diffusers' dispatcher: the same numbers, and a backend that can really be chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, attention_backend
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor2_0,
)

from kandinsky_diffusers import attention
from kandinsky_diffusers.attention import (
    DispatchedAttnAddedKVProcessor,
    DispatchedAttnProcessor,
    enable_xformers,
    use_dispatched_attention,
)


@pytest.fixture(autouse=True)
def own_default_backend() -> Iterator[None]:
    """`set_attention_backend` changes everybody's default; take it back after each test."""
    with attention_backend("native"):
        yield


def small_unet() -> UNet2DConditionModel:
    """A UNet of the kind of 2.x, with a level that attends to the conditions only."""
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=24,
        attention_head_dim=16,
        layers_per_block=1,
        resnet_time_scale_shift="scale_shift",
    ).eval()


@pytest.fixture(scope="module")
def unet_inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 12, 10),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.randn(2, 7, 24),
    }


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).sample


def backends(model: torch.nn.Module) -> set[Any]:
    return {p._attention_backend for p in model.attn_processors.values()}


# ------------------------------------------------------------------------------------------------ the same numbers


LAYERS: dict[str, dict[str, Any]] = {
    "self-attention": {"query_dim": 32},
    "biases": {"query_dim": 32, "bias": True, "rescale_output_factor": 2.0},
    "cross-attention": {"query_dim": 32, "cross_attention_dim": 20},
    "normed context": {"query_dim": 32, "cross_attention_dim": 20, "cross_attention_norm": "layer_norm"},
    "normed query": {"query_dim": 32, "qk_norm": "layer_norm"},
    "group norm": {"query_dim": 32, "norm_num_groups": 4, "residual_connection": True},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_stock_processor(name: str, masked: bool) -> None:
    layer = Attention(heads=4, dim_head=8, **LAYERS[name])
    hidden_states = torch.randn(3, 9, 32)
    other = torch.randn(3, 6, 20) if "cross_attention_dim" in LAYERS[name] else None
    keys = 9 if other is None else 6
    mask = torch.randn(3 * 4, 9, keys) if masked else None
    expected = layer(hidden_states, other, mask)
    use_dispatched_attention(layer)
    assert type(layer.processor) is DispatchedAttnProcessor
    assert torch.equal(layer(hidden_states, other, mask), expected)


def test_equals_the_stock_processor_on_pictures_with_a_spatial_norm() -> None:
    layer = Attention(32, heads=2, dim_head=16, spatial_norm_dim=4, residual_connection=True, bias=True)
    picture, latents = torch.randn(2, 32, 6, 10), torch.randn(2, 4, 3, 5)
    expected = layer(picture, temb=latents)
    use_dispatched_attention(layer)
    assert torch.equal(layer(picture, temb=latents), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("only_cross_attention", [False, True])
def test_equals_the_stock_processor_with_added_keys(only_cross_attention: bool, masked: bool) -> None:
    layer = Attention(
        32,
        cross_attention_dim=32,
        heads=4,
        dim_head=8,
        added_kv_proj_dim=20,
        norm_num_groups=4,
        bias=True,
        only_cross_attention=only_cross_attention,
    )
    stock: Any = AttnAddedKVProcessor2_0()
    layer.set_processor(stock)
    # stock pads a mask of the conditions with as many zeros as there are pixels
    mask = torch.randn(2, 1, 5) if masked and not only_cross_attention else None
    picture, conditions = torch.randn(2, 32, 6, 4), torch.randn(2, 5, 20)
    expected = layer(picture, conditions, mask)
    use_dispatched_attention(layer)
    assert type(layer.processor) is DispatchedAttnAddedKVProcessor
    assert torch.equal(layer(picture, conditions, mask), expected)


def test_unet_equals_stock_and_takes_a_backend(unet_inputs: dict[str, Any]) -> None:
    unet = small_unet()
    expected = run(unet, unet_inputs)
    use_dispatched_attention(unet)
    assert torch.equal(run(unet, unet_inputs), expected)
    unet.set_attention_backend("_native_math")
    assert backends(unet) == {AttentionBackendName._NATIVE_MATH}
    torch.testing.assert_close(run(unet, unet_inputs), expected, rtol=1e-4, atol=1e-5)
    unet.reset_attention_backend()
    assert backends(unet) == {None}


def test_the_chosen_backend_is_the_one_that_runs(unet_inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    unet = small_unet()
    use_dispatched_attention(unet)
    used = []
    dispatch = attention.dispatch_attention_fn

    def spy(*args: Any, backend: Any, **kwargs: Any) -> torch.Tensor:
        used.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention, "dispatch_attention_fn", spy)
    unet.set_attention_backend("_native_math")
    run(unet, unet_inputs)
    assert len(used) == len(unet.attn_processors)
    assert set(used) == {AttentionBackendName._NATIVE_MATH}


# ------------------------------------------------------------------------------------------------ which layers


def test_only_default_processors_are_replaced() -> None:
    class Custom(AttnProcessor2_0):
        pass

    model = torch.nn.ModuleList(Attention(8, heads=1, dim_head=8) for _ in range(3))
    older = AttnAddedKVProcessor()
    model[1].set_processor(Custom())
    model[2].set_processor(older)
    use_dispatched_attention(model)
    first = model[0].processor
    assert [type(layer.processor) for layer in model] == [DispatchedAttnProcessor, Custom, AttnAddedKVProcessor]
    use_dispatched_attention(model)
    assert model[0].processor is first
    assert model[2].processor is older


def test_stock_goes_on_recognising_them() -> None:
    unet = small_unet()
    use_dispatched_attention(unet)
    assert all(isinstance(p, AttnAddedKVProcessor2_0) for p in unet.attn_processors.values())
    with pytest.raises(ValueError, match="added KV"):
        unet.fuse_qkv_projections()


# ------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("backend", ["flash", "sage", "_native_flash", "flash_varlen"])
def test_a_backend_without_masks_refuses_one(backend: str) -> None:
    layer = Attention(16, heads=2, dim_head=8)
    use_dispatched_attention(layer)
    processor: Any = layer.get_processor()
    processor._attention_backend = AttentionBackendName(backend)
    with pytest.raises(ValueError, match=rf"'{backend}'.*mask.*native, xformers"):
        layer(torch.randn(1, 3, 16), attention_mask=torch.zeros(2, 3, 3))


def test_the_choice_of_another_model_does_not_reach_masked_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Attention(16, heads=2, dim_head=8)
    use_dispatched_attention(layer)
    inputs = {"hidden_states": torch.randn(1, 3, 16), "attention_mask": torch.zeros(2, 3, 3)}
    expected = layer(**inputs)
    # what `set_attention_backend("_native_flash")` on some model leaves as everybody's default
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName._NATIVE_FLASH)
    assert torch.equal(layer(**inputs), expected)


def test_xformers_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_xformers_available", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        enable_xformers(small_unet())
    monkeypatch.setattr(attention, "is_xformers_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="CUDA"):
        enable_xformers(small_unet())


def test_xformers_is_set_on_this_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_xformers_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("diffusers.models.attention_dispatch._CAN_USE_XFORMERS_ATTN", True)
    unet = small_unet()
    enable_xformers(unet)
    assert backends(unet) == {AttentionBackendName.XFORMERS}
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    enable_xformers(torch.nn.Linear(2, 2))  # a text encoder, say: nothing of diffusers in it


def test_xformers_refuses_processors_that_cannot_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_xformers_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    custom = small_unet()
    custom.set_attn_processor(AttnAddedKVProcessor())
    with pytest.raises(ValueError, match="AttnAddedKVProcessor"):
        enable_xformers(custom)
