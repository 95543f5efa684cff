"""What no step changes is computed once in a call of 3.x, with pictures, regions and control, too."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from kandinsky_diffusers import (
    Kandinsky3AncestralScheduler,
    Kandinsky3ControlNetModel,
    Kandinsky3ControlNetPipeline,
    Kandinsky3DDPMScheduler,
    Kandinsky3FlashScheduler,
    Kandinsky3InpaintPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    Region,
)
from kandinsky_diffusers.attention import ContextCache
from kandinsky_diffusers.k3.denoiser import DenoiserMixin, cross_attentions
from kandinsky_diffusers.k3.ip_adapter_unet import IPAdapter, layer_sizes
from tests.k3.conftest import SIZE, seeded
from tests.support.counting import calls_of, filled_ahead, rows_of
from tests.support.far_device import moved_far, waits_in_the_loop
from tests.support.parity import SAMPLER, assert_close
from tests.support.tiny22 import make_movq


STEPS, TOKENS, WIDTH = 2, 5, 10
LEFT = torch.cat([torch.ones(64, 32), torch.zeros(64, 32)], dim=1)


def random_weights(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def states(*seeds: int) -> dict[str, torch.Tensor]:
    """What stands for a prompt, and with a second seed for a negative one, too."""
    signs = dict(zip(("", "negative_"), seeds, strict=False))
    drawn = {
        f"{sign}prompt_embeds": torch.randn(1, TOKENS, WIDTH, generator=seeded(s)[0]) for sign, s in signs.items()
    }
    return drawn | {f"{sign}attention_mask": torch.ones(1, TOKENS) for sign in signs}


@pytest.fixture(scope="module")
def unets() -> dict[str, Any]:
    """As few blocks as there can be; with a null embedding, as the original, and without, as stock."""
    sizes: dict[str, Any] = {
        "time_embedding_dim": 16,
        "groups": 4,
        "attention_head_dim": 8,
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 16, 16),
        "cross_attention_dim": 12,
        "encoder_hid_dim": WIDTH,
    }
    return {
        "original": random_weights(Kandinsky3UNet(**sizes, has_null_embedding=True)),
        "stock": random_weights(Kandinsky3UNet(**sizes)),
    }


@pytest.fixture(scope="module")
def movq() -> Any:
    return make_movq().eval()


@pytest.fixture
def build(unets: dict[str, Any], movq: Any) -> Callable[..., Any]:
    """`build(cls)`, on models that all tests share; with `own=True` on copies."""

    def pipeline(cls: Any, kind: str = "original", scheduler: Any = None, own: bool = False, **more: Any) -> Any:
        models = [unets[kind], movq]
        models = deepcopy(models) if own else models
        pipe = cls(None, None, models[0], scheduler or Kandinsky3AncestralScheduler(), models[1], **more)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return pipeline


def given(cls: Any, **more: Any) -> dict[str, Any]:
    """What a pipeline of a class is called with, to draw latents from states and without an encoder."""
    picture = {"image": torch.zeros(1, 4, 8, 8), "mask_image": LEFT} if cls is Kandinsky3InpaintPipeline else {}
    quick = {**SIZE, "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    return {**states(0, 1), **picture, **quick, **more}


def draw(pipe: Any, **changed: Any) -> torch.Tensor:
    return pipe(**given(type(pipe), generator=seeded(0)[0], **getattr(pipe, "given", {}), **changed)).images


@pytest.fixture
def full(build: Any, unets: dict[str, Any]) -> Any:
    """With a ControlNet, an IP-Adapter and a region; `full.given` is what it is shown."""
    controlnet = random_weights(Kandinsky3ControlNetModel.from_unet(unets["original"]))
    pipe = build(Kandinsky3ControlNetPipeline, own=True, controlnet=controlnet)
    shapes = IPAdapter.on_meta(layer_sizes(pipe.unet), 12, 6, 3).shapes
    rng = seeded(0)[0]
    pipe.load_ip_adapter(
        {key: torch.randn(shape, generator=rng) for key, shape in shapes.items()}, image_encoder_folder=None
    )
    embeds = {f"{sign}ip_adapter_image_embeds": torch.randn(1, 6, generator=rng) for sign in ("", "negative_")}
    region: Any = {"prompt": None, "mask": LEFT, **states(2)}
    pipe.given = {"image": LEFT[None].repeat(3, 1, 1), **embeds, "regions": [Region(**region)]}
    return pipe


@pytest.fixture
def without_cache(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], torch.Tensor]], torch.Tensor]:
    """What is drawn when everything is computed at every step."""

    def drawn(function: Callable[[], torch.Tensor]) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(DenoiserMixin, "supports_context_cache", False)
            return function()

    return drawn


def readers(*models: Any) -> torch.nn.ModuleList:
    """The layers of models that attend to the context, or pool it."""
    layers: list[Any] = []
    for model in models:
        blocks = model.down_blocks if not hasattr(model, "up_blocks") else [*model.down_blocks, *model.up_blocks]
        attentions = [block.attentions[1:] for block in blocks if block.context_dim is not None]
        layers += [attention.attention for own in attentions for attention in own] + [model.add_time_condition]
    return torch.nn.ModuleList(layers)


# ------------------------------------------------------------------------------------------------------------- counted
@pytest.mark.parametrize("kind", ["original", "stock"])
def test_the_text_is_read_once(build: Any, without_cache: Any, kind: str) -> None:
    pipe = build(Kandinsky3Pipeline, kind)
    with calls_of(readers(pipe.unet), "to_k", "to_v") as calls:
        latents = draw(pipe)
    assert calls == {"to_k": {1}, "to_v": {1}}
    with calls_of(readers(pipe.unet), "to_k", "to_v") as calls:
        assert torch.equal(without_cache(lambda: draw(pipe)), latents)
    assert calls == {"to_k": {STEPS}, "to_v": {STEPS}}


def test_pictures_regions_and_control_are_read_once(full: Any, without_cache: Any) -> None:
    with (
        calls_of(readers(full.unet, full.controlnet), "to_k", "to_v") as calls,
        calls_of(full.unet, "to_k_ip", "to_v_ip", "image_embeds") as of_pictures,
        calls_of(full.controlnet.controlnet_cond_embedding, "conv_in") as of_control,
    ):
        latents = draw(full)
    assert calls == {"to_k": {1}, "to_v": {1}}
    assert of_pictures == {"to_k_ip": {1}, "to_v_ip": {1}, "image_embeds": {1}}
    assert of_control == {"conv_in": {1}}
    assert_close(without_cache(lambda: draw(full)), latents, SAMPLER)


def test_caches_can_be_filled_ahead(full: Any, unets: dict[str, Any]) -> None:
    latents = draw(full)
    with filled_ahead(full.unet, full.controlnet) as caches:
        assert torch.equal(draw(full), latents)
    assert len(caches) == 2
    with pytest.raises(ValueError, match="there is no `cache`"):
        unets["stock"](torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 1, WIDTH), fill=True)


# ------------------------------------------------------------------------------------------------------------ changed
def swap_the_prompt(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"prompt_embeds": -tensors["prompt_embeds"]} if index == 0 else {}


def show_the_picture(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
    pipe.set_ip_adapter_scale(1.0)  # after a step with 0, at which nothing is computed of it
    return {}


def hide_the_control_image(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    tensors["control_image"].zero_()
    return {}


@pytest.mark.parametrize("callback", [swap_the_prompt, show_the_picture, hide_the_control_image])
def test_a_callback_that_changes_something_has_it_read_again(full: Any, without_cache: Any, callback: Any) -> None:
    names = ["prompt_embeds", "control_image"]
    full.given["regions"] = None

    def changed(**callbacks: Any) -> torch.Tensor:
        full.set_ip_adapter_scale(0.0)
        return draw(full, **callbacks)

    changing = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    latents = changed(**changing)
    assert torch.equal(without_cache(lambda: changed(**changing)), latents)
    assert not torch.equal(changed(), latents)


def test_a_foreign_processor_gets_no_cache(build: Any) -> None:
    pipe = build(Kandinsky3Pipeline, own=True)
    expected = draw(pipe)
    next(iter(cross_attentions(pipe.unet).values())).set_processor(AttnProcessor2_0())
    assert not pipe.unet.supports_context_cache
    assert_close(draw(pipe), expected, SAMPLER)


# --------------------------------------------------------------------------------------------------------- done to it
def test_the_code_of_compiled_blocks_is_the_same_for_all_of_them_and_at_every_step(unets: dict[str, Any]) -> None:
    unet, made = deepcopy(unets["original"]), []

    def compiler(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    for block in list(unet.down_blocks[-1].attentions)[1:]:
        block.compile(backend=compiler, fullgraph=True)
    cache, counts = ContextCache(), []
    with torch.no_grad():
        for timestep in (900, 100):
            arguments = (torch.randn(2, 5, 12), torch.ones(2, 5))
            unet(torch.randn(2, 4, 8, 8), timestep, *arguments, projected=True, cache=cache)
            counts.append(len(made))
    torch.compiler.reset()
    assert counts == [1, 1]


def test_rows_that_guidance_needs(build: Any) -> None:
    for cls, scale, rows in (
        (Kandinsky3Pipeline, 0.0, 1),
        (Kandinsky3InpaintPipeline, 0.0, 1),
        (Kandinsky3Pipeline, 1.0, 2),
    ):
        pipe = build(cls)
        with rows_of(pipe.unet) as counted:
            draw(pipe, guidance_scale=scale)
        assert counted == [rows] * STEPS


@pytest.mark.parametrize(
    ("cls", "scheduler"),
    [
        (Kandinsky3InpaintPipeline, Kandinsky3DDPMScheduler),
        (Kandinsky3Pipeline, Kandinsky3AncestralScheduler),
        (Kandinsky3InpaintPipeline, Kandinsky3FlashScheduler),
    ],
)
def test_the_host_waits_for_no_scheduler(build: Any, cls: Any, scheduler: Any) -> None:
    """The network is none; that of the next test is one."""
    pipe = build(cls, scheduler=scheduler(), own=True)
    for model in (pipe.unet, pipe.movq):
        moved_far(model)
    pipe.predict_noise = lambda latents, timestep, conditions: latents.repeat(2, 1, 1, 1)
    assert waits_in_the_loop(pipe, **given(cls)) == []


def test_the_host_waits_for_nothing_with_pictures_regions_and_control(full: Any) -> None:
    """See the test for 2.2."""
    for model in (full.unet, full.movq, full.controlnet):
        moved_far(model)
    assert waits_in_the_loop(full, **given(type(full), **full.given)) == []
