"""Stock components taken on as better classes: shared state, stock names on disk, no forgotten hooks."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from diffusers import DDIMScheduler, PriorTransformer, UnCLIPScheduler, VQModel
from diffusers import UNet2DConditionModel as StockUNet2DConditionModel
from safetensors.torch import load_file

from kandinsky_diffusers.components import adopt, stock_identity, view_as
from kandinsky_diffusers.movq import MoVQ
from kandinsky_diffusers.prior import CachedPriorTransformer
from kandinsky_diffusers.schedulers import KandinskyUnCLIPScheduler
from kandinsky_diffusers.unet import UNet2DConditionModel
from tests.support.processes import PythonProcess
from tests.support.tiny22 import make_unet


def small_prior() -> PriorTransformer:
    return PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=6, num_embeddings=3
    ).eval()


def small_vq() -> VQModel:
    return VQModel(block_out_channels=(32,), latent_channels=4, num_vq_embeddings=8).eval()


def small_unet() -> StockUNet2DConditionModel:
    return make_unet("text2image").eval()


MODELS: list[tuple[Callable[[], Any], type, str]] = [
    (small_prior, CachedPriorTransformer, "PriorTransformer"),
    (small_vq, MoVQ, "VQModel"),
    (small_unet, UNet2DConditionModel, "UNet2DConditionModel"),
]
models = pytest.mark.parametrize(("build", "better", "stock_name"), MODELS, ids=[name for _, _, name in MODELS])


# ------------------------------------------------------------------------------------------------ what is taken on


@models
def test_a_view_shares_everything(build: Callable[[], Any], better: type, stock_name: str) -> None:
    stock = build()
    view = adopt(stock)
    assert type(view) is better
    assert isinstance(view, type(stock))
    assert view.config is stock.config
    for name, tensor in stock.state_dict().items():
        assert view.state_dict()[name].data_ptr() == tensor.data_ptr()
    view.to(torch.float64)
    assert stock.dtype is torch.float64
    stock.train()
    assert view.training
    assert adopt(view) is view


def test_adapters_are_shared() -> None:
    peft = pytest.importorskip("peft")
    stock = small_prior()
    view = adopt(stock)
    view.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    assert stock.active_adapters() == view.active_adapters() == ["default"]
    stock.delete_adapters("default")
    assert not any("lora" in name for name in view.state_dict())


def test_the_scheduler_is_built_anew() -> None:
    stock = UnCLIPScheduler(variance_type="fixed_small_log", clip_sample_range=5.0, prediction_type="sample")
    ours = adopt(stock)
    assert type(ours) is KandinskyUnCLIPScheduler
    assert ours.config.clip_sample_range == 5.0
    assert ours.alphas_cumprod.dtype is torch.float64


def test_everything_else_stays_as_it_is() -> None:
    class CustomVQ(VQModel):
        pass

    for component in (None, "text", 3, DDIMScheduler(), torch.nn.Linear(2, 2), CustomVQ(block_out_channels=(32,))):
        assert adopt(component) is component
        assert stock_identity(component) is None


def test_a_unet_of_another_family_stays_as_it_is() -> None:
    other = StockUNet2DConditionModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    assert adopt(other) is other


def test_a_view_of_an_unrelated_class_is_refused() -> None:
    with pytest.raises(TypeError, match="extend VQModel"):
        view_as(small_vq(), CachedPriorTransformer)


# ------------------------------------------------------------------------------------------------ names on disk


def test_identities() -> None:
    assert stock_identity(adopt(small_vq())) == ("diffusers", "VQModel")
    assert stock_identity(adopt(small_prior())) == ("diffusers", "PriorTransformer")
    scheduler = adopt(UnCLIPScheduler(variance_type="fixed_small_log"))
    assert stock_identity(scheduler) == ("diffusers", "UnCLIPScheduler")
    assert stock_identity(small_vq()) is None, "diffusers records it rightly"


def test_a_compiled_model_is_saved_as_the_model() -> None:
    assert stock_identity(torch.compile(adopt(small_prior()))) == ("diffusers", "PriorTransformer")


@pytest.mark.skipif(not hasattr(transformers, "CLIPImageProcessorPil"), reason="older transformers have no such class")
def test_the_pil_image_processor_gets_its_usual_name() -> None:
    assert stock_identity(transformers.CLIPImageProcessorPil()) == ("transformers", "CLIPImageProcessor")


def test_a_users_subclass_keeps_its_name(tmp_path: Path) -> None:
    class UsersMoVQ(MoVQ):
        pass

    model = UsersMoVQ(block_out_channels=(32,))
    assert stock_identity(model) is None
    model.save_config(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UsersMoVQ"


STOCK_ONLY = """
import sys
import diffusers
from safetensors.torch import save_file
_, name, folder, output = sys.argv
model = getattr(diffusers, name).from_pretrained(folder)
assert type(model).__name__ == name and model.config["_class_name"] == name
save_file(dict(model.state_dict()), output)
"""


@models
def test_a_saved_model_loads_without_us(
    build: Callable[[], Any], better: type, stock_name: str, tmp_path: Path, stock: PythonProcess
) -> None:
    build().save_pretrained(tmp_path / "from stock")
    ours = better.from_pretrained(tmp_path / "from stock")
    ours.save_pretrained(tmp_path / "from us")
    config = json.loads((tmp_path / "from us/config.json").read_text())
    assert config["_class_name"] == stock_name
    assert config == json.loads((tmp_path / "from stock/config.json").read_text()) | {
        "_name_or_path": str(tmp_path / "from stock")
    }
    stock.run(STOCK_ONLY, stock_name, tmp_path / "from us", tmp_path / "loaded.safetensors")
    loaded = load_file(tmp_path / "loaded.safetensors")
    assert loaded.keys() == ours.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in ours.state_dict().items())


def test_a_saved_scheduler_loads_without_us(tmp_path: Path) -> None:
    ours = adopt(UnCLIPScheduler(variance_type="fixed_small_log", clip_sample_range=5.0))
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "UnCLIPScheduler"
    assert UnCLIPScheduler.from_pretrained(tmp_path).config.clip_sample_range == 5.0


@models
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_copies(copied: Callable[[Any], Any], build: Callable[[], Any], better: type, stock_name: str) -> None:
    view = adopt(build())
    clone = copied(view)
    assert type(clone) is better
    assert dict(clone.config) == dict(view.config)
    for name, tensor in view.state_dict().items():
        assert torch.equal(clone.state_dict()[name], tensor)
        assert clone.state_dict()[name].data_ptr() != tensor.data_ptr()


# ------------------------------------------------------------------------------------------------ hooks


def offload_sequentially(model: Any) -> None:
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)


def offload_whole(model: Any) -> None:
    cpu_offload_with_hook(model, torch.device("cpu"))


def offload_groups(model: Any) -> None:
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def compile_in_place(model: Any) -> None:
    model.compile(backend="eager")


def patch_forward(model: Any) -> None:
    model.forward = lambda *args, **kwargs: None


@pytest.mark.parametrize(
    "hook", [offload_sequentially, offload_whole, offload_groups, compile_in_place, patch_forward]
)
def test_a_model_whose_forward_is_fixed_already_is_refused(hook: Callable[[Any], None]) -> None:
    prior = small_prior()
    hook(prior)
    with pytest.raises(ValueError, match=r"PriorTransformer.*before a Kandinsky pipeline took it"):
        adopt(prior)


def test_hooks_that_were_removed_do_not_matter() -> None:
    from accelerate.hooks import remove_hook_from_module

    prior = small_prior()
    offload_whole(prior)
    remove_hook_from_module(prior, recurse=True)
    assert "forward" in vars(prior), "this is what accelerate leaves"
    runs_as_ours(adopt(prior))
    prior = small_prior()
    offload_groups(prior)
    prior._diffusers_hook.remove_hook("group_offloading", recurse=True)
    runs_as_ours(adopt(prior))


def test_hooks_that_were_removed_from_an_earlier_view_do_not_matter() -> None:
    from accelerate.hooks import remove_hook_from_module

    prior = small_prior()
    view = adopt(prior)
    offload_whole(view)
    remove_hook_from_module(view)
    assert type(adopt(prior)) is CachedPriorTransformer


def test_the_hook_of_a_device_map_moves_to_the_view() -> None:
    prior = small_prior()
    dispatch_model(prior, {"": "cpu"}, force_hooks=True)
    hook = prior._hf_hook
    view = adopt(prior)
    assert view._hf_hook is hook
    runs_as_ours(view)


def runs_as_ours(view: Any) -> None:
    conditions = {
        "proj_embedding": torch.randn(1, 6),
        "encoder_hidden_states": torch.randn(1, 3, 6),
        "attention_mask": torch.ones(1, 3, dtype=torch.bool),
    }
    prefix = view(prefill=True, **conditions)
    actual = view(torch.ones(1, 6), 5, prefix=prefix).predicted_image_embedding
    expected = view(torch.ones(1, 6), 5, **conditions).predicted_image_embedding
    torch.testing.assert_close(actual, expected)
