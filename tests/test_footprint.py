"""Memory of models: what is counted on a copy without numbers is what the model takes; text encoders in 8 bits."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import T5Config, T5EncoderModel

import kandinsky_diffusers
from kandinsky_diffusers import Kandinsky3ControlNetModel, Kandinsky3UNet
from kandinsky_diffusers.eight_bits import bytes_saved, in_eight_bits, largest_expanded
from kandinsky_diffusers.footprint import (
    UNKNOWN_SHARE,
    Load,
    run_once,
    running_bytes,
    streamed_bytes,
    twin_without_numbers,
    weight_bytes,
)
from kandinsky_diffusers.measuring import peak_bytes
from kandinsky_diffusers.memory_estimates import casting, models_of
from tests.support.tiny22 import tiny_components


SMALL = Load(pictures=1, rows=2, pixels=(64, 128), latents=(8, 16))


def as_it_is(name: str, tensor: torch.Tensor) -> torch.dtype:
    return tensor.dtype


def in_half(name: str, tensor: torch.Tensor) -> torch.dtype:
    return torch.float16 if tensor.is_floating_point() else tensor.dtype


def make_t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(vocab_size=300, d_model=128, d_kv=32, d_ff=256, num_layers=12, num_heads=4)
    return T5EncoderModel(T5Config(**{**config.to_dict(), "feed_forward_proj": "gated-gelu"})).eval()


@pytest.fixture(scope="module")
def pipes(converted_20: Path, converted_21: Path, tiny_repos: Path) -> dict[str, Any]:
    """One of each family."""
    flash = DiffusionPipeline.from_pretrained(tiny_repos / "kandisuperres-flash-x2")
    controlnet = Kandinsky3ControlNetModel.from_pretrained(tiny_repos / "kandinsky-3-controlnet-hed")
    parts = DiffusionPipeline.from_pretrained(tiny_repos / "kandinsky-3-1").components
    return {
        "2.0": DiffusionPipeline.from_pretrained(converted_20 / "kandinsky-2-0"),
        "2.1": DiffusionPipeline.from_pretrained(converted_21 / "kandinsky-2-1"),
        "2.2": kandinsky_diffusers.KandinskyV22CombinedPipeline(**tiny_components()),
        "2.2 depth": kandinsky_diffusers.KandinskyV22ControlnetCombinedPipeline(**tiny_components("controlnet")),
        "3.1": kandinsky_diffusers.Kandinsky3ControlNetPipeline(**parts, controlnet=controlnet),
        "superres": flash,
    }


# ------------------------------------------------------------------------------------------------ what is measured


MODELS = {
    "2.0": ("text_encoder", "text_encoder_2", "unet", "vae"),
    "2.1": ("unet",),
    "2.2": ("prior_text_encoder", "prior_prior", "prior_image_encoder", "unet", "movq"),
    "2.2 depth": ("unet",),
    "3.1": ("text_encoder", "unet", "controlnet"),
    "superres": ("unet", "context"),
}


@pytest.mark.parametrize("family", MODELS)
def test_a_copy_without_numbers_takes_what_the_model_takes(pipes: dict[str, Any], family: str) -> None:
    for name in MODELS[family]:
        model = models_of(pipes[family])[name]
        load = pipes[family]._load_of(name, (64, 64), 1)
        before = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
        measured = running_bytes(model, as_it_is, load)
        assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == before, name
        if name == "context":  # it only expands what is there
            assert measured == int(weight_bytes(model, as_it_is) * UNKNOWN_SHARE)
            continue
        with torch.no_grad():
            real = peak_bytes(partial(run_once, model, load, False))
        # a copy cannot see that a mask masks nothing, whereupon transformers leaves it out
        mask = 4 * 128 * 128 if "text_encoder" in name else 0
        assert abs(measured - real) <= 0.02 * real + 4096 + mask, name


def test_hooks_do_not_run_on_a_copy() -> None:
    model = tiny_components()["prior_text_encoder"]
    free = running_bytes(model, as_it_is, SMALL)
    kandinsky_diffusers.KandinskyV22CombinedPipeline(**{**tiny_components(), "prior_text_encoder": model})
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level")
    assert running_bytes(model, as_it_is, SMALL) == free


def test_half_precision_takes_half() -> None:
    unet = tiny_components()["unet"]
    assert weight_bytes(unet, in_half) * 2 == weight_bytes(unet, as_it_is) == sum(p.nbytes for p in unet.parameters())
    assert running_bytes(unet, in_half, SMALL) < 0.6 * running_bytes(unet, as_it_is, SMALL)


def test_half_precision_is_what_loading_in_it_gives(converted_31: Path) -> None:
    """T5 keeps some weights in float32, and so does the MoVQ of 3.x."""
    repo = converted_31 / "kandinsky-3-1"
    single, half = (DiffusionPipeline.from_pretrained(repo, dtype=dtype) for dtype in (torch.float32, torch.float16))
    for name, model in models_of(single).items():
        dtype_of = casting(single, name, model, half=True)
        wanted = {key: tensor.dtype for key, tensor in models_of(half)[name].named_parameters()}
        assert {key: dtype_of(key, tensor) for key, tensor in model.named_parameters()} == wanted


def test_layer_by_layer_the_largest_layer_counts() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 5))
    assert streamed_bytes(model, as_it_is) == 4 * (10 * 20 + 20) + 4 * 2 * 20


def test_a_copy_shares_nothing_and_keeps_what_is_tied() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = make_t5()
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = twin_without_numbers(model, in_half)
    assert twin.shared.weight is twin.encoder.embed_tokens.weight
    assert {tensor.dtype for tensor in twin.parameters()} == {torch.float16}
    assert not {id(part) for part in twin.modules()} & {id(part) for part in model.modules()}


def test_a_large_model_is_measured_without_its_memory() -> None:
    """The UNet of 3.x: 3.05 billion parameters (kandinsky3.pt of the release, with the projection)."""
    with torch.device("meta"):
        unet = Kandinsky3UNet()
    assert weight_bytes(unet, in_half) / 2 == pytest.approx(3.05e9, rel=0.01)


# ------------------------------------------------------------------------------------------------ 8 bits


def states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(300).view(4, 75)).last_hidden_state.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_change_the_states_of_t5_a_little(dtype: torch.dtype) -> None:
    model = make_t5()
    exact = states(model)
    model.to(dtype)
    in_eight_bits(model)
    assert ((states(model) - exact).pow(2).mean() / exact.pow(2).mean()).sqrt() <= 0.05


def test_eight_bits_save_what_is_said() -> None:
    model = make_t5()
    before, saved = weight_bytes(model, as_it_is), bytes_saved(model, as_it_is)
    largest = largest_expanded(model, as_it_is)
    in_eight_bits(model)
    assert before - saved == weight_bytes(model, as_it_is) < 0.4 * before
    assert largest == 4 * 128 * 256
    in_eight_bits(model)  # there is nothing left to do
    assert before - saved == weight_bytes(model, as_it_is)


def test_rows_with_nothing_in_them_stay_so() -> None:
    layer: Any = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False).half())
    layer[0].weight.data[1] = 0
    exact = deepcopy(layer[0].weight.data)
    in_eight_bits(layer)
    assert (layer[0].weight[1] == 0).all()
    assert (layer[0].weight - exact).abs().max() <= exact.abs().max() / 127


def test_a_pipeline_in_eight_bits_is_not_saved(tmp_path: Path) -> None:
    """Its files would load with random weights."""
    pipe = kandinsky_diffusers.KandinskyV22CombinedPipeline(**tiny_components())
    in_eight_bits(pipe.prior_text_encoder)
    with pytest.raises(ValueError, match="`prior_text_encoder` is in 8 bits"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
