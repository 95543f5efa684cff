"""What no step changes is computed once in a call of 2.2, whatever is done to models and conditions between steps."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnAddedKVProcessor
from peft import LoraConfig
from torch.utils import _pytree as pytree

from kandinsky_diffusers import (
    KandinskyAncestralScheduler,
    KandinskyDDIMScheduler,
    KandinskyPNDMScheduler,
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    sampling,
    unet,
)
from kandinsky_diffusers.attention import ContextCache
from tests.k22.conftest import seeded
from tests.support.counting import calls_of, filled_ahead, rows_of
from tests.support.far_device import moved_far, waits_in_the_loop
from tests.support.parity import MODULE, assert_close


STEPS = 3
READ_ONCE = ("encoder_hid_proj", "add_embedding", "add_k_proj", "add_v_proj")
LORA = LoraConfig(r=2, target_modules=["add_k_proj", "image_proj"], init_lora_weights=False)


@pytest.fixture
def pipe(make: Any, components: Any) -> Any:
    """One whose UNet is its own, for it is changed."""
    return make(KandinskyV22Pipeline, unet=deepcopy(components("stock")["decoder"]["unet"]))


@pytest.fixture
def draw(inputs: Any) -> Callable[..., torch.Tensor]:
    def latents(pipe: Any, **changed: Any) -> torch.Tensor:
        quick = {"num_inference_steps": STEPS, "output_type": "latent", "generator": seeded(0)[0]}
        return pipe(**inputs(type(pipe).__name__, **{**quick, **changed})).images

    return latents


@pytest.fixture
def without_cache(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], torch.Tensor]], torch.Tensor]:
    """What is drawn when everything is computed at every step."""

    def drawn(function: Callable[[], torch.Tensor]) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(unet.UNet2DConditionModel, "supports_context_cache", False)
            return function()

    return drawn


def each_one(times: int) -> dict[str, set[int]]:
    return {name: {times} for name in READ_ONCE}


# ------------------------------------------------------------------------------------------------------------- counted
@pytest.mark.parametrize(
    ("cls", "more"),
    [
        (KandinskyV22Pipeline, ()),
        (KandinskyV22InpaintPipeline, ()),
        (KandinskyV22ControlnetPipeline, ("input_hint_block",)),
    ],
)
def test_conditions_are_read_once(make: Any, draw: Any, without_cache: Any, cls: Any, more: tuple[str, ...]) -> None:
    pipe = make(cls)
    with calls_of(pipe.unet, "to_k", "to_q", *READ_ONCE, *more) as calls:
        latents = draw(pipe)
    assert calls == {"to_k": {STEPS}, "to_q": {STEPS}} | each_one(1) | {name: {1} for name in more}
    with filled_ahead(pipe.unet) as caches:
        assert torch.equal(draw(pipe), latents)
    assert len(caches) == 1
    with calls_of(pipe.unet, *READ_ONCE) as calls:
        assert torch.equal(without_cache(lambda: draw(pipe)), latents)
    assert calls == each_one(STEPS)


def test_nothing_is_left_for_the_next_call(pipe: Any, draw: Any) -> None:
    draw(pipe)
    with calls_of(pipe.unet, *READ_ONCE) as calls:
        draw(pipe)
    assert calls == each_one(1)
    assert pipe._running is None


# ------------------------------------------------------------------------------------------------------------ changed
def swap(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"image_embeds": -tensors["image_embeds"]} if index == 0 else {}


def change_in_place(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if index == 0:
        tensors["image_embeds"].mul_(-1)
    return {}


def drop_unconditional(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if index > 0:
        return {}
    pipe._guidance_scale = 1.0
    return {"image_embeds": tensors["image_embeds"].chunk(2)[1]}


@pytest.mark.parametrize("callback", [swap, change_in_place, drop_unconditional])
def test_a_callback_that_changes_conditions_has_them_read_again(
    pipe: Any, draw: Any, without_cache: Any, callback: Any
) -> None:
    changing = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["image_embeds"]}
    with calls_of(pipe.unet, *READ_ONCE) as calls:
        latents = draw(pipe, **changing)
    assert calls == each_one(2)
    assert torch.equal(without_cache(lambda: draw(pipe, **changing)), latents)
    assert not torch.equal(draw(pipe), latents)


def test_an_override_may_predict_with_other_conditions(make: Any, draw: Any, without_cache: Any) -> None:
    class Twice(KandinskyV22Pipeline):
        def predict_noise(self, latents: Any, timestep: Any, conditions: Any) -> torch.Tensor:
            other = {**conditions, "image_embeds": self.other}
            both = [super(Twice, self).predict_noise(latents, timestep, given) for given in (conditions, other)]
            return (both[0] + both[1]) / 2

    pipe = make(Twice)
    pipe.other = torch.randn(2, 32, generator=seeded(1)[0])
    assert torch.equal(draw(pipe), without_cache(lambda: draw(pipe)))


# --------------------------------------------------------------------------------------------------------- done to it
def test_adapters_act_from_one_call_to_the_next_and_within_one(pipe: Any, draw: Any, without_cache: Any) -> None:
    before = draw(pipe)
    pipe.unet.add_adapter(LORA)
    with calls_of(pipe.unet, "encoder_hid_proj", "lora_A") as calls:
        adapted = draw(pipe)
    assert calls["encoder_hid_proj"] == {1}
    assert not torch.equal(adapted, before)

    def weaken(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        pipe.set_adapters("default", 1.0 - index / 2)  # at full strength after the first step, then less
        return {}

    pipe.set_adapters("default", 1.0)
    weakened = draw(pipe, callback_on_step_end=weaken)
    pipe.set_adapters("default", 1.0)
    assert torch.equal(without_cache(lambda: draw(pipe, callback_on_step_end=weaken)), weakened)
    pipe.set_adapters("default", 1.0)
    assert torch.equal(draw(pipe), adapted)
    assert not torch.equal(weakened, adapted)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before)


def test_an_adapter_that_a_callback_fuses_acts_at_once(pipe: Any, draw: Any, without_cache: Any) -> None:
    original = deepcopy(pipe.unet.state_dict())

    def fuse(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        if index == 0:
            torch.manual_seed(0)
            pipe.unet.add_adapter(LORA)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        return {}

    changed = draw(pipe, callback_on_step_end=fuse)
    pipe.unet.load_state_dict(original)
    assert torch.equal(without_cache(lambda: draw(pipe, callback_on_step_end=fuse)), changed)
    pipe.unet.load_state_dict(original)
    assert not torch.equal(draw(pipe), changed)


def test_adapters_of_the_prior_act_within_a_call(make: Any, components: Any) -> None:
    pipe = make(KandinskyV22PriorPipeline, prior=deepcopy(components("stock")["prior"]["prior"]))
    pipe.prior.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))

    def embed() -> torch.Tensor:
        def weaken(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            pipe.set_adapters("default", 1.0 - index)
            return {}

        pipe.set_adapters("default", 1.0)
        changing = {"callback_on_step_end": weaken, "generator": seeded(0)[0]}
        return pipe("a cat", num_inference_steps=STEPS, **changing).image_embeds

    cached = embed()
    pipe.exact_reference(True)
    assert_close(cached, embed(), MODULE)


def test_a_foreign_processor_gets_no_cache(pipe: Any, draw: Any) -> None:
    def exchange(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        if index == 0:
            pipe.unet.set_attn_processor(AttnAddedKVProcessor())
        return {}

    expected = draw(pipe)
    with calls_of(pipe.unet, *READ_ONCE) as calls:
        torch.testing.assert_close(draw(pipe, callback_on_step_end=exchange), expected)
    assert calls == each_one(STEPS)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_once_under_group_offload(pipe: Any, draw: Any, tmp_path: Path, offload_type: str) -> None:
    expected = draw(pipe)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipe.unet.enable_group_offload(
        torch.device("cpu"), offload_type=offload_type, offload_to_disk_path=str(tmp_path), **blocks
    )
    with calls_of(pipe.unet, *READ_ONCE) as calls:
        assert torch.equal(draw(pipe), expected)
    assert calls == each_one(1)


def offload(model: Any) -> None:
    cpu_offload_with_hook(model, torch.device("cpu"))


@pytest.mark.parametrize("fix", [lambda model: model.compile(), offload])
def test_a_unet_that_is_hooked_or_compiled_already_goes_on_working(
    make: Any, components: Any, draw: Any, fix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)  # what a compiler makes is not of interest
    stock = deepcopy(components("stock")["decoder"]["unet"])
    expected = draw(make(KandinskyV22Pipeline))
    fix(stock)
    pipe = make(KandinskyV22Pipeline, unet=stock)
    assert type(pipe.unet) is UNet2DConditionModel
    assert torch.equal(draw(pipe), expected)


def test_a_cache_is_a_tree_of_its_tensors(pipe: Any) -> None:
    """So a recorded step can be given them in the place of those that it was recorded with."""
    cache, arguments = ContextCache(), (torch.ones(2, 4, 8, 8), 9, None)
    assert not cache.filled
    added = {"image_embeds": torch.randn(2, 32, generator=seeded(0)[0]), "cache": cache}
    expected = pipe.unet(*arguments, added_cond_kwargs=added).sample
    assert cache.filled
    leaves, tree = pytree.tree_flatten(cache)
    again = pytree.tree_unflatten([leaf.clone() for leaf in leaves], tree)
    assert again.filled
    assert pytree.tree_flatten(again)[1] == tree
    added = {"image_embeds": torch.zeros(2, 32), "cache": again}
    assert torch.equal(pipe.unet(*arguments, added_cond_kwargs=added).sample, expected)


def test_the_prior_computes_no_padding(make: Any) -> None:
    pipe, rows = make(KandinskyV22PriorPipeline), []
    block = pipe.prior.transformer_blocks[0]
    hook = block.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    pipe("a cat", num_inference_steps=STEPS)
    hook.remove()
    tokens = len(pipe.tokenizer("a cat").input_ids)
    assert rows[: 1 + STEPS] == [tokens + 1] + [3] * STEPS  # with the embedding of the text; time, embedding and prd


def test_there_must_be_a_cache_to_fill(pipe: Any) -> None:
    with pytest.raises(ValueError, match="there is no `cache`"):
        pipe.unet(torch.ones(2, 4, 8, 8), 9, None, added_cond_kwargs={"image_embeds": torch.ones(2, 32)}, fill=True)


# ----------------------------------------------------------------------------------------------- halves, and waiting
@pytest.mark.parametrize(("scale", "rows"), [(1.0, 1), (4.0, 2)])
def test_rows_that_guidance_needs(make: Any, draw: Any, inputs: Any, scale: float, rows: int) -> None:
    for cls in (KandinskyV22Pipeline, KandinskyV22InpaintPipeline, KandinskyV22ControlnetPipeline):
        pipe = make(cls)
        with rows_of(pipe.unet) as counted:
            draw(pipe, guidance_scale=scale)
        assert counted == [rows] * STEPS
    prior = make(KandinskyV22PriorPipeline)
    with rows_of(prior.prior, "hidden_states") as counted:
        prior("a cat", guidance_scale=scale, num_inference_steps=STEPS)
    assert set(counted[:STEPS]) == {rows}


@pytest.mark.parametrize(
    ("scheduler", "channels"),
    [(DDIMScheduler, {"noise": 4}), (KandinskyAncestralScheduler, {"both": 8})],
)
def test_the_variance_takes_part_where_the_scheduler_reads_it(
    make: Any, draw: Any, monkeypatch: pytest.MonkeyPatch, scheduler: Any, channels: dict[str, int]
) -> None:
    combined = {}

    def noise(prediction: torch.Tensor, scale: float) -> torch.Tensor:
        combined["noise"] = prediction.shape[1]
        return prediction.chunk(2)[1]

    def noise_and_variance(prediction: torch.Tensor, scale: float, channels: int) -> torch.Tensor:
        combined["both"] = prediction.shape[1]
        return prediction.chunk(2)[1]

    monkeypatch.setattr(sampling, "guide_from_uncond", noise)
    monkeypatch.setattr(sampling, "guide_keep_variance", noise_and_variance)
    draw(make(KandinskyV22Pipeline, scheduler=scheduler()))
    assert combined == channels


@pytest.mark.parametrize(
    ("cls", "scheduler"),
    [
        (KandinskyV22ControlnetPipeline, None),
        (KandinskyV22Pipeline, KandinskyPNDMScheduler),
        (KandinskyV22InpaintPipeline, KandinskyAncestralScheduler),
        (KandinskyV22InpaintPipeline, KandinskyDDIMScheduler),
    ],
)
def test_the_host_waits_for_nothing_in_the_loop(
    make: Any, components: Any, inputs: Any, cls: Any, scheduler: Any
) -> None:
    """What is shown: between the first prediction and the last step no tensor on the device is read, nor copied.

    Inpainting has a UNet without a mask here, so that the known region is put back after each step.
    """
    decoder = deepcopy(components("ours")["controlnet" if cls is KandinskyV22ControlnetPipeline else "decoder"])
    pipe = make(cls, **decoder | ({} if scheduler is None else {"scheduler": scheduler()}))
    for model in (pipe.unet, pipe.movq):
        moved_far(model)
    assert waits_in_the_loop(pipe, **inputs(cls.__name__, num_inference_steps=2, output_type="latent")) == []


def test_the_host_waits_for_nothing_in_the_loop_of_the_prior(make: Any, components: Any) -> None:
    own = deepcopy(components("ours")["prior"])
    pipe = make(KandinskyV22PriorPipeline, **own)
    for name in ("prior", "text_encoder", "image_encoder"):
        moved_far(getattr(pipe, name))
    assert waits_in_the_loop(pipe, prompt="a cat", num_inference_steps=2, output_type="latent") == []
