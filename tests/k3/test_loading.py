"""How the converted 3.x repos are loaded: by the AutoPipelines, from folders and from the Hub, and between tasks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

import kandinsky_diffusers
from kandinsky_diffusers import (
    Kandinsky3AncestralScheduler,
    Kandinsky3DDPMScheduler,
    Kandinsky3FlashScheduler,
    Kandinsky3InpaintPipeline,
    Kandinsky3UNet,
    MoVQ,
)
from tests.k3.conftest import QUICK, REPOS, seeded
from tests.support.fake_hub import FakeHub
from tests.support.parity import assert_close
from tests.support.processes import PythonProcess


AUTO = {
    "Kandinsky3Pipeline": AutoPipelineForText2Image,
    "Kandinsky3Img2ImgPipeline": AutoPipelineForImage2Image,
    "Kandinsky3InpaintPipeline": AutoPipelineForInpainting,
}
SCHEDULERS = {
    "3.0": Kandinsky3DDPMScheduler,
    "3.0 inpaint": Kandinsky3DDPMScheduler,
    "3.1": Kandinsky3AncestralScheduler,
    "flash": Kandinsky3FlashScheduler,
    "3.1 inpaint": Kandinsky3AncestralScheduler,
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*zip(REPOS, itertools.cycle(AUTO), strict=False), *(("3.1", name) for name in AUTO)],
)
def test_a_repo_loads_by_a_task_and_leads_to_the_others(repo: Any, inputs: Any, kind: str, name: str) -> None:
    pipe = AUTO[name].from_pretrained(repo(kind))
    assert type(pipe) is getattr(kandinsky_diffusers, name)
    assert (type(pipe.unet), type(pipe.movq), type(pipe.scheduler)) == (Kandinsky3UNet, MoVQ, SCHEDULERS[kind])
    for other, auto in AUTO.items():
        there = auto.from_pipe(pipe)
        assert type(there) is getattr(kandinsky_diffusers, other)
        assert all(there.components[part] is component for part, component in pipe.components.items())
        there.set_progress_bar_config(disable=True)
        assert there(**inputs(other)).images.shape == (1, 64, 64, 3)


def test_from_pipe_of_a_class_takes_our_models_over(repo: Any) -> None:
    pipe = AutoPipelineForText2Image.from_pretrained(repo("3.1 inpaint"))
    assert Kandinsky3InpaintPipeline.from_pipe(pipe).unet is pipe.unet


@pytest.mark.parametrize("kind", REPOS)
def test_what_is_saved_is_loaded_again(repo: Any, tmp_path: Path, kind: str) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(repo(kind))
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(pipe)
    for part, component in pipe.components.items():
        assert type(again.components[part]) is type(component)
    assert dict(again.scheduler.config) == dict(pipe.scheduler.config)
    before, after = (json.loads((folder / "model_index.json").read_text()) for folder in (repo(kind), tmp_path))
    for part in ("unet", "movq", "text_encoder", "tokenizer", "scheduler"):
        assert after[part] == before[part]


def test_a_variant_is_saved_and_loaded(repo: Any, tmp_path: Path) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(repo("3.1"), dtype=torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    for model in ("unet", "movq", "text_encoder"):
        assert [".fp16." in path.name for path in (tmp_path / model).glob("*.safetensors")] == [True]
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_the_index_names_stock_where_stock_can_run_it(repo: Any) -> None:
    index = {kind: json.loads((repo(kind) / "model_index.json").read_text()) for kind in REPOS}
    assert index["3.0"]["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["3.1"]["scheduler"] == ["kandinsky_diffusers", "Kandinsky3AncestralScheduler"]
    for kind in ("3.0", "3.1", "flash"):
        assert index[kind]["_class_name"] == "Kandinsky3Pipeline"
        assert index[kind]["unet"] == ["diffusers", "Kandinsky3UNet"]
    for kind in ("3.0 inpaint", "3.1 inpaint"):
        assert index[kind]["_class_name"] == "Kandinsky3InpaintPipeline"
        assert index[kind]["unet"] == ["kandinsky_diffusers", "Kandinsky3UNet"]
        assert index[kind]["scheduler"][0] == "kandinsky_diffusers"
    assert {tuple(each["movq"]) for each in index.values()} == {("diffusers", "VQModel")}


@pytest.mark.parametrize(("name", "dtype"), [("dtype", torch.float16), ("torch_dtype", torch.bfloat16)])
def test_in_half_precision_the_movq_stays_in_float32(repo: Any, name: str, dtype: torch.dtype) -> None:
    pipe = AutoPipelineForText2Image.from_pretrained(repo("3.1"), **{name: dtype})
    assert (pipe.unet.dtype, pipe.text_encoder.dtype, pipe.movq.dtype) == (dtype, dtype, torch.float32)
    there = AutoPipelineForImage2Image.from_pipe(pipe)
    assert (there.unet.dtype, there.movq.dtype) == (dtype, torch.float32)
    in_whole = AutoPipelineForText2Image.from_pretrained(repo("3.1"), **{name: torch.float32})
    assert in_whole.to("cpu", dtype).movq.dtype == torch.float32
    assert in_whole.unet.dtype == dtype
    generic = diffusers.DiffusionPipeline.from_pretrained(repo("3.1"), **{name: dtype})
    assert (generic.unet.dtype, generic.movq.dtype) == (dtype, torch.float32)
    chosen = AutoPipelineForText2Image.from_pretrained(
        repo("3.1"), **{name: {"unet": torch.float32, "default": dtype}}
    )
    assert (chosen.unet.dtype, chosen.movq.dtype) == (torch.float32, dtype)
    generic.movq.to(dtype)
    assert generic("a fox", **QUICK).images.shape == (1, 64, 64, 3)


FROM_HUB = """
import kandinsky_diffusers
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
classes = []
for auto, repo in (
    (AutoPipelineForText2Image, "kandinsky-3"),
    (AutoPipelineForInpainting, "kandinsky-3-inpaint"),
    (AutoPipelineForImage2Image, "kandinsky-3-1-flash"),
    (AutoPipelineForInpainting, "kandinsky-3-1-inpaint"),
):
    pipe = auto.from_pretrained(f"someone/{repo}")
    classes.append([type(part).__name__ for part in (pipe, pipe.unet, pipe.scheduler)])
    assert type(pipe.unet).__module__.startswith("kandinsky_diffusers.")
pipe.load_ip_adapter("someone/kandinsky-3-ip-adapter")
classes.append([type(part).__name__ for part in (pipe, pipe.image_encoder, pipe.unet.image_proj[0])])
result = classes
"""


def test_repositories_on_the_hub_load_with_our_components(
    converted_30: Path, converted_31: Path, ip_adapter: Path, hub: FakeHub, from_hub: PythonProcess
) -> None:
    places = (converted_30, converted_31, ip_adapter.parent)
    folders = [folder for place in places for folder in place.iterdir() if folder.is_dir()]
    hub.repos |= {f"someone/{folder.name}": folder for folder in folders}
    assert from_hub.run(FROM_HUB) == [
        ["Kandinsky3Pipeline", "Kandinsky3UNet", "Kandinsky3DDPMScheduler"],
        ["Kandinsky3InpaintPipeline", "Kandinsky3UNet", "Kandinsky3DDPMScheduler"],
        ["Kandinsky3Img2ImgPipeline", "Kandinsky3UNet", "Kandinsky3FlashScheduler"],
        ["Kandinsky3InpaintPipeline", "Kandinsky3UNet", "Kandinsky3AncestralScheduler"],
        ["Kandinsky3InpaintPipeline", "CLIPVisionModelWithProjection", "ImageProjection"],
    ]


def test_a_subclass_of_a_user_is_found_by_auto_pipeline(repo: Any, tmp_path: Path) -> None:
    class Shouting(kandinsky_diffusers.Kandinsky3Pipeline):
        def encode_prompt(self, prompt: Any, *given: Any, **named: Any) -> Any:
            return super().encode_prompt(prompt and prompt.upper(), *given, **named)

    kandinsky_diffusers.register_pipeline(Shouting, tasks="text2image", key="shouting-3")
    try:
        Shouting.from_pretrained(repo("3.1")).save_pretrained(tmp_path)
        pipe = AutoPipelineForText2Image.from_pretrained(tmp_path)
        assert type(pipe) is Shouting
        pipe.set_progress_bar_config(disable=True)
        plain = AutoPipelineForText2Image.from_pretrained(repo("3.1"))
        pipes = ((pipe, "a fox"), (plain, "A FOX"))
        drawn = [each(text, **QUICK, generator=seeded(0)[0]).images for each, text in pipes]
        assert_close(*drawn, 1e-4)
        assert type(AutoPipelineForInpainting.from_pipe(pipe)) is Kandinsky3InpaintPipeline
    finally:
        kandinsky_diffusers.unregister()
        kandinsky_diffusers.register()
