"""What no step changes is computed once in a call of 3.x, with pictures, regions and control, too."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from kandinsky_diffusers import (
    Kandinsky3ControlNetModel,
    Kandinsky3ControlNetPipeline,
    Kandinsky3InpaintPipeline,
    Kandinsky3Pipeline,
)
from kandinsky_diffusers.attention import ContextCache
from kandinsky_diffusers.k3.denoiser import DenoiserMixin
from kandinsky_diffusers.k3.ip_adapter_unet import cross_attentions
from tests.k3.conftest import seeded
from tests.support.counting import calls_of, rows_of
from tests.support.far_device import moved_far, waits_in_the_loop


STEPS = 3
LEFT = torch.cat([torch.ones(64, 32), torch.zeros(64, 32)], dim=1)


@pytest.fixture(scope="module")
def controlnet(converted_controlnet: Path) -> Any:
    return Kandinsky3ControlNetModel.from_pretrained(converted_controlnet)


@pytest.fixture
def full(components: Any, controlnet: Any, ip_adapter: Path, picture: Any, mask: Any, inputs: Any) -> Any:
    """`full()` is a pipeline with a ControlNet and an IP-Adapter, `full.given` what it is called with, in all."""
    parts = {name: deepcopy(part) if name == "unet" else part for name, part in components("3.1").items()}
    pipe: Any = Kandinsky3ControlNetPipeline(**parts, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(ip_adapter)
    pipe.given = {"image": mask, "ip_adapter_image": picture, "regions": [("a lazy dog", LEFT)]}
    return pipe


@pytest.fixture
def draw(inputs: Any) -> Callable[..., torch.Tensor]:
    def latents(pipe: Any, **changed: Any) -> torch.Tensor:
        quick = {"num_inference_steps": STEPS, "output_type": "latent", "generator": seeded(0)[0]}
        given = getattr(pipe, "given", {})
        return pipe(**inputs(type(pipe).__name__, **{**quick, **given, **changed})).images

    return latents


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
@pytest.mark.parametrize("kind", ["3.1", "stock"])
def test_the_text_is_read_once(make: Any, draw: Any, without_cache: Any, kind: str) -> None:
    pipe = make(Kandinsky3Pipeline, kind)
    with calls_of(readers(pipe.unet), "to_k", "to_v") as calls:
        latents = draw(pipe)
    assert calls == {"to_k": {1}, "to_v": {1}}
    with calls_of(readers(pipe.unet), "to_k", "to_v") as calls:
        assert torch.equal(without_cache(lambda: draw(pipe)), latents)
    assert calls == {"to_k": {STEPS}, "to_v": {STEPS}}


def test_pictures_regions_and_control_are_read_once(full: Any, draw: Any, without_cache: Any) -> None:
    embedding = full.controlnet.controlnet_cond_embedding
    with (
        calls_of(readers(full.unet, full.controlnet), "to_k", "to_v") as calls,
        calls_of(full.unet, "to_k_ip", "to_v_ip", "image_embeds") as of_pictures,
        calls_of(embedding, "conv_in") as of_control,
    ):
        latents = draw(full)
    assert calls == {"to_k": {1}, "to_v": {1}}
    assert of_pictures == {"to_k_ip": {1}, "to_v_ip": {1}, "image_embeds": {1}}
    assert of_control == {"conv_in": {1}}
    torch.testing.assert_close(without_cache(lambda: draw(full)), latents, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ changed
def swap_the_prompt(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"prompt_embeds": -tensors["prompt_embeds"]} if index == 0 else {}


def show_more_of_the_picture(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
    pipe.set_ip_adapter_scale(float(index))  # 0 after the first step, for which nothing is computed, and then 1
    return {}


def hide_the_control_image(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    tensors["control_image"].zero_()
    return {}


@pytest.mark.parametrize("callback", [swap_the_prompt, show_more_of_the_picture, hide_the_control_image])
def test_a_callback_that_changes_something_has_it_read_again(
    full: Any, draw: Any, without_cache: Any, callback: Any
) -> None:
    changing = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "control_image"],
    }
    full.given["regions"] = None
    expected = draw(full)
    changed = draw(full, **changing)
    assert not torch.equal(changed, expected)
    full.set_ip_adapter_scale(1.0)
    assert torch.equal(without_cache(lambda: draw(full, **changing)), changed)


def test_a_foreign_processor_gets_no_cache(make: Any, components: Any, draw: Any) -> None:
    pipe = make(Kandinsky3Pipeline, "3.1", unet=deepcopy(components("3.1")["unet"]))
    expected = draw(pipe)
    next(iter(cross_attentions(pipe.unet).values())).set_processor(AttnProcessor2_0())
    assert not pipe.unet.supports_context_cache
    torch.testing.assert_close(draw(pipe), expected)


# --------------------------------------------------------------------------------------------------------- done to it
def test_the_code_of_compiled_blocks_is_the_same_for_all_of_them_and_at_every_step(components: Any) -> None:
    unet = deepcopy(components("3.1")["unet"])
    made = []

    def compiler(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    _, first, second, *_ = unet.down_blocks[-1].attentions
    for block in (first, second):
        block.compile(backend=compiler, fullgraph=True)
    cache, counts = ContextCache(), []
    width, text = unet.config.cross_attention_dim, unet.config.in_channels
    arguments = (torch.randn(2, 5, width), torch.ones(2, 5))
    with torch.no_grad():
        for timestep in (900, 500, 100):
            unet(torch.randn(2, text, 8, 8), timestep, *arguments, projected=True, cache=cache)
            counts.append(len(made))
    torch.compiler.reset()
    assert counts == [1, 1, 1]


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_rows_that_guidance_needs(make: Any, draw: Any, scale: float) -> None:
    for cls in (Kandinsky3Pipeline, Kandinsky3InpaintPipeline):
        pipe = make(cls, "3.1")
        with rows_of(pipe.unet) as counted:
            draw(pipe, guidance_scale=scale, **picture_of(cls))
        assert counted == [1 if scale == 0.0 else 2] * STEPS


def picture_of(cls: type) -> dict[str, Any]:
    return {"image": torch.zeros(1, 3, 64, 64), "mask_image": LEFT} if cls is Kandinsky3InpaintPipeline else {}


@pytest.mark.parametrize(
    ("kind", "cls"),
    [("3.0", Kandinsky3Pipeline), ("3.1", Kandinsky3InpaintPipeline), ("flash", Kandinsky3Pipeline)],
)
def test_the_host_waits_for_nothing_in_the_loop(make: Any, components: Any, inputs: Any, kind: str, cls: Any) -> None:
    """See the test of the same name for 2.2. The scheduler of 3.0 and 3.1 has a dynamic threshold."""
    pipe = make(cls, kind, **{name: deepcopy(components(kind)[name]) for name in ("unet", "movq")})
    names = ("prompt_embeds", "negative_prompt_embeds", "attention_mask", "negative_attention_mask")
    states = dict(zip(names, pipe.encode_prompt("a red fox"), strict=True))
    pipe = cls(**{**pipe.components, "text_encoder": None, "tokenizer": None})
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.unet, pipe.movq):
        moved_far(model)
    given = {**states, **picture_of(cls), "num_inference_steps": STEPS, "output_type": "latent"}
    assert waits_in_the_loop(pipe, height=64, width=64, guidance_scale=3.0, **given) == []


def test_the_host_waits_for_nothing_with_pictures_regions_and_control(full: Any, inputs: Any) -> None:
    models = {
        name: deepcopy(getattr(full, name)) for name in ("unet", "movq", "controlnet", "image_encoder", "text_encoder")
    }
    pipe = type(full)(**{**full.components, **models})
    pipe.set_progress_bar_config(disable=True)
    for model in models.values():
        moved_far(model)
    given = inputs(type(pipe).__name__, **full.given, num_inference_steps=STEPS, output_type="latent")
    assert waits_in_the_loop(pipe, **given) == []
