"""What the 3.x pipelines with a ControlNet do with control images, scales, steps, batches and tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)

import kandinsky_diffusers
from kandinsky_diffusers import (
    Kandinsky3ControlNetInpaintPipeline,
    Kandinsky3ControlNetModel,
    Kandinsky3ControlNetPipeline,
)
from kandinsky_diffusers.k3.pipeline_controlnet import controlled_steps
from tests.k3.conftest import QUICK, SIZE, float64, seeded
from tests.support.parity import assert_close


TASKS = {
    "Kandinsky3ControlNetPipeline": AutoPipelineForText2Image,
    "Kandinsky3ControlNetImg2ImgPipeline": AutoPipelineForImage2Image,
    "Kandinsky3ControlNetInpaintPipeline": AutoPipelineForInpainting,
}


@pytest.fixture(scope="module")
def controlnet(converted_controlnet: Path) -> Any:
    return Kandinsky3ControlNetModel.from_pretrained(converted_controlnet)


@pytest.fixture(scope="module")
def edges() -> PIL.Image.Image:
    edges = PIL.Image.new("L", (64, 64))
    edges.paste(255, (8, 8, 40, 24))
    return edges


@pytest.fixture
def build(make: Any, controlnet: Any) -> Callable[..., Any]:
    return lambda name, kind="3.1": make(getattr(kandinsky_diffusers, name), kind, controlnet=controlnet)


@pytest.fixture
def draw(inputs: Any, edges: Any) -> Callable[..., Any]:
    """Latents that a pipeline draws from the seed 0."""

    def run(pipe: Any, **changed: Any) -> torch.Tensor:
        arguments = inputs(type(pipe).__name__, control_image=edges, output_type="latent")
        return pipe(**arguments | {"generator": seeded(0)[0]} | changed).images

    return run


POSITIONS = ("sample", "timestep", "context", "mask", "control_image", "scale")


def calls_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of all later calls, by name where they have one."""
    calls, forward = [], model.forward

    def recording(*given: Any, **named: Any) -> Any:
        calls.append({**dict(zip(POSITIONS, given, strict=False)), **named})
        return forward(*given, **named)

    monkeypatch.setattr(model, "forward", recording)
    return calls


# ------------------------------------------------------------------------------------------------ what controls
@pytest.mark.parametrize(("name", "kind"), zip(TASKS, ("flash", "3.0", "3.1 inpaint"), strict=True))
def test_the_control_image_decides_what_is_drawn(build: Any, draw: Any, name: str, kind: str) -> None:
    pipe = build(name, kind)
    images = [PIL.Image.new("L", (64, 64), grey) for grey in (0, 255)]
    dark, light = (draw(pipe, control_image=image) for image in images)
    assert not torch.allclose(dark, light, atol=1e-3)


@pytest.mark.parametrize("name", TASKS)
def test_a_scale_of_zero_is_no_control_bit_for_bit(
    build: Any, make: Any, draw: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch, controlnet: Any, name: str
) -> None:
    calls = calls_of(controlnet, monkeypatch)
    pipe = build(name)
    plain = make(getattr(kandinsky_diffusers, name.replace("ControlNet", "")), "3.1")
    expected = plain(**inputs(type(plain).__name__, output_type="latent"), generator=seeded(0)[0]).images
    for scale in (0.0, torch.zeros(64, 64)):
        assert torch.equal(draw(pipe, controlnet_conditioning_scale=scale), expected)
    assert not calls


def test_the_control_image_may_have_another_name_and_other_forms(build: Any, draw: Any, edges: Any) -> None:
    pipe = build("Kandinsky3ControlNetPipeline")
    expected = draw(pipe, num_inference_steps=1)
    array = np.asarray(edges)
    tensor = torch.from_numpy(array / 255.0).expand(1, 3, 64, 64).float()
    for image in (edges.convert("RGB"), array / 255.0, tensor, [edges]):
        given = {"image": image, "control_image": None, "num_inference_steps": 1}
        assert_close(draw(pipe, **given), expected, 1e-5)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_controlnet_may_look_at_another_number_of_channels(
    make: Any, draw: Any, edges: Any, components: Any, monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    model: Any = Kandinsky3ControlNetModel.from_unet(components("3.1")["unet"], conditioning_channels=channels)
    calls = calls_of(model, monkeypatch)
    pipe = make(Kandinsky3ControlNetPipeline, "3.1", controlnet=model)
    grey = torch.from_numpy(np.asarray(edges) / 255.0).float()
    for image in (grey, grey.expand(channels, -1, -1), *([edges, edges.convert("RGB")] if channels == 1 else [])):
        draw(pipe, control_image=image, num_inference_steps=1)
        assert torch.equal(calls[-1]["control_image"], grey.expand(1, channels, -1, -1))
    with pytest.raises(ValueError, match="`control_image` has"):
        draw(pipe, control_image=torch.rand(3, 64, 64))


def test_of_an_inpainting_unet_the_control_sees_the_latents_alone(
    build: Any, draw: Any, controlnet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(controlnet, monkeypatch)
    pipe = build("Kandinsky3ControlNetInpaintPipeline", "3.1 inpaint")
    seen = calls_of(pipe.unet, monkeypatch)
    draw(pipe)
    steps = [call for call in seen if "down_block_additional_residuals" in call]
    assert len(calls) == len(steps) == 2
    for control, step in zip(calls, steps, strict=True):
        assert torch.equal(control["sample"], step["sample"][:, :4])
        assert step["sample"].shape[1] == 9


# ------------------------------------------------------------------------------------------------ scale and steps
@pytest.mark.parametrize(
    ("count", "start", "end", "controlled"),
    [
        (5, 0.0, 1.0, [0, 1, 2, 3, 4]),
        (5, 0.3, 0.6, [1, 2, 3]),
        (10, 0.0, 0.0, [0]),
        (10, 0.95, 1.0, [9]),
        (4, 1.0, 1.0, []),
    ],
)
def test_steps_are_controlled_from_start_to_end_inclusive(
    count: int, start: float, end: float, controlled: list[int]
) -> None:
    assert [index for index in range(count) if index in controlled_steps(count, start, end)] == controlled


@pytest.mark.parametrize(("strength", "taken"), [(1.0, [2, 3]), (0.5, [1])])
def test_the_control_runs_at_the_steps_that_are_controlled_and_no_other(
    build: Any, draw: Any, controlnet: Any, monkeypatch: pytest.MonkeyPatch, strength: float, taken: list[int]
) -> None:
    """With image-to-image they are counted among the steps that are made."""
    pipe = build("Kandinsky3ControlNetImg2ImgPipeline")
    at, calls = [], calls_of(controlnet, monkeypatch)
    counted: list[int] = []

    def count(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict:
        if len(calls) > len(at):
            at.append(index)
        counted.append(index)
        return {}

    draw(pipe, strength=strength, callback_on_step_end=count, control_guidance_start=0.5)
    assert at == taken
    assert len(counted) == 4 * strength


def test_a_map_that_is_the_same_everywhere_is_a_number(build: Any, draw: Any) -> None:
    pipe, grey = build("Kandinsky3ControlNetPipeline"), PIL.Image.new("L", (30, 20), 153)
    expected, *others = (
        draw(pipe, controlnet_conditioning_scale=scale, num_inference_steps=1)
        for scale in (0.6, [0.6], torch.full((64, 64), 0.6), np.full((1, 20, 30), 0.6), grey)
    )
    for other in others:
        assert_close(other, expected, 1e-5)


def test_a_map_acts_where_it_is_not_zero(build: Any, draw: Any, controlnet: Any, make: Any) -> None:
    """The residuals of the left half alone; what the network makes of them reaches further."""
    pipe = build("Kandinsky3ControlNetPipeline")
    seen: list[Any] = []
    forward = pipe.unet.forward

    def recording(*given: Any, **named: Any) -> Any:
        seen.append(named.get("down_block_additional_residuals"))
        return forward(*given, **named)

    pipe.unet.forward = recording
    left = torch.zeros(128, 128)
    left[:, :64] = 0.5
    try:
        draw(pipe, height=128, width=128, controlnet_conditioning_scale=left)
    finally:
        del pipe.unet.forward
    residuals = next(each for each in seen if each is not None)
    for residual in residuals:
        middle = residual.shape[-1] // 2
        assert residual[..., :middle].any()
        assert not residual[..., middle:].any()


# ------------------------------------------------------------------------------------------------ batches and sizes
@pytest.mark.parametrize(("name", "kind"), [*zip(TASKS, ("3.1", "stock", "3.1 inpaint"), strict=True)])
def test_a_picture_of_a_batch_is_the_picture_made_alone(
    build: Any, inputs: Any, edges: Any, name: str, kind: str
) -> None:
    pipe = float64(build(name, kind))
    prompts, controls = ["a red fox", "a very lazy dog"], [edges, edges.rotate(90)]
    maps = [torch.full((64, 64), 0.5), torch.ones(64, 64)]
    every = {"negative_prompt": "ugly", "guidance_scale": 3.0}
    batch = {"control_image": controls, "controlnet_conditioning_scale": maps, "num_images_per_prompt": 2}
    together = pipe(**inputs(name, prompt=prompts, **batch, **every), generator=seeded(*range(4))).images
    for number in (1,) if kind == "stock" else (2,):
        own = {"control_image": controls[number // 2], "controlnet_conditioning_scale": maps[number // 2]}
        alone = pipe(**inputs(name, prompt=prompts[number // 2], **own, **every), generator=seeded(number)).images
        assert_close(together[number], alone[0], 1e-5, f"picture {number}")


@pytest.mark.parametrize("name", TASKS)
def test_the_size_asked_for_comes_out_and_control_and_map_lie_on_it(
    build: Any, inputs: Any, edges: Any, controlnet: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls = calls_of(controlnet, monkeypatch)
    scale, control = torch.rand(70, 100), torch.rand(3, 70, 100)
    arguments = inputs(name, height=70, width=100, output_type="pil", control_image=control)
    assert build(name)(**arguments, controlnet_conditioning_scale=scale).images[0].size == (100, 70)
    assert calls[0]["control_image"].shape == (1, 3, 80, 112)
    assert torch.equal(calls[0]["control_image"][0, :, :70, :100], control)
    assert torch.equal(calls[0]["scale"][0, 0, :70, :100], scale)
    assert torch.equal(calls[0]["scale"][0, 0, 70:, :100], scale[-1:].expand(10, -1))


@pytest.mark.parametrize("size", [(90, 71), (64, 130)])
def test_text_to_image_takes_the_size_of_the_control_image(build: Any, edges: Any, size: tuple[int, int]) -> None:
    pipe, image = build("Kandinsky3ControlNetPipeline", "flash"), edges.resize(size)
    quick = {"num_inference_steps": 2}
    assert pipe("a red fox", image, **quick).images[0].size == size
    assert pipe("a red fox", np.asarray(image), **quick, output_type="pt").images.shape[-2:] == size[::-1]


def test_with_a_crop_around_the_mask_the_control_image_is_cropped_too(
    build: Any, monkeypatch: pytest.MonkeyPatch, controlnet: Any, picture: Any, edges: Any
) -> None:
    """What belongs to the region is controlled by what the control image has there."""
    pipe, whole = build("Kandinsky3ControlNetInpaintPipeline"), picture.resize((128, 128))
    mask, control = PIL.Image.new("L", (128, 128)), PIL.Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 64))
    control.paste(255, (0, 0, 64, 64))
    calls = calls_of(controlnet, monkeypatch)
    images = {"image": whole, "mask_image": mask, "control_image": control, "controlnet_conditioning_scale": control}
    out = pipe("a hat", **images, **{**QUICK, "output_type": "pil"}, padding_mask_crop=0).images[0]
    assert out.size == whole.size
    assert calls[0]["control_image"].min() > 0.99


# ------------------------------------------------------------------------------------------------ callbacks
def test_a_callback_can_change_the_control_image(build: Any, draw: Any, edges: Any) -> None:
    pipe, white = build("Kandinsky3ControlNetPipeline"), torch.ones(1, 3, 64, 64)

    def whiten(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert tensors["control_image"].shape == (1, 3, 64, 64)
        return {"control_image": white}

    changed = draw(pipe, callback_on_step_end=whiten, callback_on_step_end_tensor_inputs=["control_image"])
    assert not torch.allclose(changed, draw(pipe), atol=1e-3)
    assert not torch.allclose(changed, draw(pipe, control_image=white), atol=1e-3)


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"control_image": None}, "`control_image`"),
        ({"control_image": "edges.png"}, "`control_image`"),
        ({"control_image": torch.full((3, 64, 64), 2.0)}, "`control_image` has values"),
        ({"control_image": torch.zeros(3, 3, 64, 64), "prompt": ["a", "b"]}, "`control_image`"),
        ({"controlnet_conditioning_scale": "strong"}, "`controlnet_conditioning_scale`"),
        ({"controlnet_conditioning_scale": []}, "`controlnet_conditioning_scale`"),
        ({"controlnet_conditioning_scale": [0.5, 1.0]}, "`controlnet_conditioning_scale`"),
        ({"controlnet_conditioning_scale": float("nan")}, "`controlnet_conditioning_scale`"),
        ({"controlnet_conditioning_scale": torch.zeros(2, 3, 64, 64)}, "`controlnet_conditioning_scale`"),
        ({"controlnet_conditioning_scale": torch.ones(3, 64, 64)}, "`controlnet_conditioning_scale`"),
        ({"control_guidance_start": 0.7, "control_guidance_end": 0.6}, "`control_guidance_start` is 0.7"),
        ({"control_guidance_end": 1.1}, "`control_guidance_end` 1.1"),
        ({"control_guidance_start": [0.0]}, "`control_guidance_start`"),
    ],
)
@pytest.mark.parametrize("name", TASKS)
def test_wrong_arguments_are_named_before_a_model_runs(
    build: Any, inputs: Any, edges: Any, name: str, changed: dict[str, Any], named: str, monkeypatch: Any
) -> None:
    pipe = build(name)
    for model in ("unet", "movq", "text_encoder", "controlnet"):
        for method in ("forward", "encode", "decode"):
            if hasattr(getattr(pipe, model), method):
                monkeypatch.setattr(getattr(pipe, model), method, lambda *_, **__: pytest.fail("a model ran"))
    with pytest.raises((ValueError, TypeError), match=named):
        pipe(**inputs(name, **{"control_image": edges, **changed}))


def test_two_control_images_are_refused(build: Any, edges: Any) -> None:
    with pytest.raises(ValueError, match="2 control images are given; accepted is one, as `image` or `control_image`"):
        build("Kandinsky3ControlNetPipeline")("a fox", image=edges, control_image=edges, **QUICK)


@pytest.mark.parametrize("wrong", [None, "several", "unet"])
def test_something_else_than_a_controlnet_is_refused(make: Any, components: Any, controlnet: Any, wrong: Any) -> None:
    given = {"several": [controlnet], "unet": components("3.1")["unet"]}.get(wrong)
    with pytest.raises(TypeError, match="`controlnet` is a"):
        make(Kandinsky3ControlNetPipeline, "3.1", controlnet=given)


def test_a_controlnet_for_another_unet_is_refused(make: Any, edges: Any) -> None:
    other = Kandinsky3ControlNetModel(24, 3, 24, 4, 8, 1, (16, 24, 40), 24)
    with pytest.raises(ValueError, match="`controlnet` has levels"):
        make(Kandinsky3ControlNetPipeline, "3.1", controlnet=other)("a fox", edges, **QUICK)


# ------------------------------------------------------------------------------------------------ loading
@pytest.mark.parametrize("name", TASKS)
def test_auto_pipelines_find_it_and_lead_to_the_other_tasks_and_back(
    repo: Any, controlnet: Any, inputs: Any, edges: Any, name: str
) -> None:
    pipe = TASKS[name].from_pretrained(repo("3.1"), controlnet=controlnet)
    assert type(pipe) is getattr(kandinsky_diffusers, name)
    assert pipe.controlnet is controlnet
    for other, auto in TASKS.items():
        there = auto.from_pipe(pipe)
        assert type(there) is getattr(kandinsky_diffusers, other)
        assert all(there.components[part] is component for part, component in pipe.components.items())
    plain = TASKS[name].from_pipe(pipe, controlnet=None)
    assert type(plain) is getattr(kandinsky_diffusers, name.replace("ControlNet", ""))
    again = TASKS[name].from_pipe(plain, controlnet=controlnet)
    assert type(again) is type(pipe)
    assert again.unet is pipe.unet
    again.set_progress_bar_config(disable=True)
    assert again(**inputs(name, control_image=edges)).images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("kind", ["3.0", "3.1 inpaint"])
def test_inpainting_is_found_from_every_repo(repo: Any, controlnet: Any, kind: str) -> None:
    pipe = AutoPipelineForInpainting.from_pretrained(repo(kind), controlnet=controlnet)
    assert type(pipe) is Kandinsky3ControlNetInpaintPipeline
    assert type(AutoPipelineForText2Image.from_pipe(pipe)) is Kandinsky3ControlNetPipeline


def test_a_saved_pipeline_loads_again_with_its_controlnet(build: Any, draw: Any, tmp_path: Path) -> None:
    pipe = build("Kandinsky3ControlNetPipeline")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["controlnet"] == ["kandinsky_diffusers", "Kandinsky3ControlNetModel"]
    assert type(AutoPipelineForText2Image.from_pretrained(tmp_path)) is Kandinsky3ControlNetPipeline
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), draw(pipe))
    assert type(AutoPipelineForInpainting.from_pretrained(tmp_path)) is Kandinsky3ControlNetInpaintPipeline


# ------------------------------------------------------------------------------------------------ memory and speed
@pytest.fixture
def pipe(repo: Any, converted_controlnet: Path) -> Any:
    """One that a test may change."""
    own = Kandinsky3ControlNetModel.from_pretrained(converted_controlnet)
    pipe = AutoPipelineForText2Image.from_pretrained(repo("3.1"), controlnet=own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_offloading_draws_the_same(pipe: Any, draw: Any, tmp_path: Path) -> None:
    before = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert_close(draw(pipe), before, 1e-4)
    pipe.remove_all_hooks()
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    assert_close(draw(pipe), before, 1e-4)


def test_half_precision_draws_also_where_one_of_the_models_stays_whole(pipe: Any, draw: Any) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=seeded(0)[0])
    for part in (pipe.unet, pipe.controlnet):
        part.to(torch.bfloat16)
        assert draw(pipe, **SIZE, latents=noise).isfinite().all()
