"""Ours beside the stock 3.0 pipelines: equal where stock is right, right where stock is not, and loadable by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines import kandinsky3

import kandinsky_diffusers
from kandinsky_diffusers import Kandinsky3UNet
from kandinsky_diffusers.components import adopt
from tests.k3.conftest import QUICK, SIZE, copies, seeded
from tests.support.parity import assert_close
from tests.support.processes import PythonProcess


Make = Callable[..., Any]
NAMES = ["Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline"]
SCHEDULERS: list[dict[str, Any]] = [
    {},
    {"clip_sample": False, "thresholding": True, "sample_max_value": 1e6, "timestep_spacing": "trailing"},
]


def both(name: str) -> list[Any]:
    """Our class, and stock's, which is expected to fail; a test that stock passes shows nothing."""
    stock = pytest.param(
        getattr(kandinsky3, name), marks=pytest.mark.xfail(strict=True, raises=Exception), id=f"stock {name}"
    )
    return [pytest.param(getattr(kandinsky_diffusers, name), id=name), stock]


EITHER = [param for name in NAMES for param in both(name)]


def drawn(cls: Any, make: Make, inputs: Any, **changed: Any) -> np.ndarray:
    """What a class draws on the components of "stock"; stock's image-to-image takes no size."""
    arguments = inputs(cls.__name__, **changed)
    if cls is kandinsky3.Kandinsky3Img2ImgPipeline:
        arguments = {key: value for key, value in arguments.items() if key not in SIZE}
    return make(cls, "stock")(**arguments).images


# ------------------------------------------------------------------------------------------------ where stock is right
@pytest.mark.parametrize(
    ("settings", "negative"), zip(SCHEDULERS, (None, "ugly"), strict=True), ids=["clipped", "thresholded"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_repo_without_null_embedding_draws_what_stock_draws(
    make: Make, inputs: Any, name: str, settings: dict[str, Any], negative: str | None
) -> None:
    pictures = []
    for library in (kandinsky_diffusers, kandinsky3):
        pipe = make(getattr(library, name), "stock")
        pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, **settings)
        arguments = inputs(name, negative_prompt=negative)
        if library is kandinsky3 and "Img2Img" in name:
            arguments = {key: value for key, value in arguments.items() if key not in SIZE}
        pictures.append(pipe(**arguments, generator=seeded(0)[0]).images)
    assert_close(*pictures, 1e-4)  # a whole run; stock encodes pictures in a layout in which norms are less precise


@torch.no_grad()
def test_the_unet_called_like_stocks_is_stocks(components: Any) -> None:
    stock = components("stock")["unet"]
    ours = Kandinsky3UNet.from_config(stock.config).eval()
    ours.load_state_dict(stock.state_dict())
    rng = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 16, generator=rng)
    states = torch.randn(2, 7, stock.config.encoder_hid_dim, generator=rng)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    arguments = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    assert_close(ours(sample, 500, **arguments).sample, stock(sample, 500, **arguments).sample, 2e-6)


# ------------------------------------------------------------------------------------------------ where it is not
@pytest.mark.parametrize("cls", EITHER)
def test_several_prompts_with_several_pictures(cls: Any, make: Make, inputs: Any) -> None:
    """B1: stock gives the second half of the pictures the mask of another prompt."""
    prompts = ["a red fox jumps over the lazy dog", "cat"]
    batch = drawn(cls, make, inputs, prompt=prompts, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    alone = drawn(cls, make, inputs, prompt=prompts[0], generator=seeded(1))
    assert_close(batch[1], alone[0], 2e-3)


@pytest.mark.parametrize("cls", EITHER)
def test_one_negative_prompt_for_many(cls: Any, make: Make, inputs: Any) -> None:
    assert len(drawn(cls, make, inputs, prompt=["a fox", "a dog"], negative_prompt="ugly")) == 2


@pytest.mark.parametrize("cls", EITHER)
def test_the_older_callback(cls: Any, make: Make, inputs: Any) -> None:
    """B5."""
    assert len(drawn(cls, make, inputs, callback=lambda *_: None)) == 1


@pytest.mark.parametrize("cls", both("Kandinsky3Pipeline"))
def test_a_size_that_is_no_multiple_of_64(cls: Any, make: Make, inputs: Any) -> None:
    """B13."""
    assert drawn(cls, make, inputs, height=70, width=100).shape == (1, 70, 100, 3)


@pytest.mark.parametrize("cls", both("Kandinsky3Img2ImgPipeline"))
def test_a_picture_that_is_no_multiple_of_64(cls: Any, make: Make, inputs: Any, picture: Any) -> None:
    image = picture.resize((100, 70))
    assert drawn(cls, make, inputs, image=image, height=70, width=100).shape == (1, 70, 100, 3)


@pytest.mark.parametrize("cls", both("Kandinsky3Img2ImgPipeline"))
def test_latents_of_a_picture_as_input(cls: Any, make: Make, inputs: Any) -> None:
    """B14."""
    assert drawn(cls, make, inputs, image=torch.zeros(1, 4, 8, 8)).shape == (1, 64, 64, 3)


@pytest.mark.parametrize("cls", both("Kandinsky3Pipeline"))
def test_an_adapter_on_the_unet(cls: Any, make: Make) -> None:
    """B11."""
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    make(cls, "stock", unet=fresh_unet(cls)).unet.add_adapter(config)


@pytest.mark.parametrize("cls", both("Kandinsky3Pipeline"))
def test_group_offload_of_the_whole_pipeline(cls: Any, make: Make, components: Any) -> None:
    """B15: stock's MoVQ does not take part."""
    pipe = make(cls, "stock", **copies(components("stock")))
    pipe.text_encoder = None
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("cls", both("Kandinsky3Pipeline"))
def test_the_null_embedding(cls: Any, make: Make, goldens_31: Any, converted_31: Path) -> None:
    """Without a negative prompt the original draws with it; stock has none."""
    pipe = cls.from_pretrained(converted_31 / "kandinsky-3-1")
    pipe.set_progress_bar_config(disable=True)
    nothing = pipe("a red fox", **QUICK, generator=seeded(0)[0]).images
    with torch.no_grad():
        pipe.unet.null_embedding.mul_(2.0)
    assert np.abs(pipe("a red fox", **QUICK, generator=seeded(0)[0]).images - nothing).max() > 1e-4


def fresh_unet(cls: Any, text_width: int = 8) -> Any:
    stock = diffusers.models.unets.unet_kandinsky3.Kandinsky3UNet
    unet = stock(
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=4,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        encoder_hid_dim=text_width,
    )
    return unet if cls.__module__.startswith("diffusers.") else adopt(unet)


# ------------------------------------------------------------------------------------------------ without us
WITHOUT_US = """
import sys
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline
for folder in sys.argv[1:]:
    for cls in (AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline):
        pipe = cls.from_pretrained(folder)
        assert type(pipe).__module__.startswith("diffusers."), type(pipe)
        assert all(not type(part).__module__.startswith("kandinsky_diffusers") for part in pipe.components.values())
        assert type(pipe.scheduler).__name__ == "DDPMScheduler"
        assert pipe.scheduler.config.kandinsky3_respaced
    pipe("a fox", num_inference_steps=2, height=64, width=64)
"""


def test_kandinsky_3_loads_and_draws_in_stock_without_this_package(
    converted_30: Path, tmp_path: Path, stock: PythonProcess
) -> None:
    """As the conversion wrote it, and as a pipeline of ours saved it again."""
    repo = converted_30 / "kandinsky-3"
    diffusers.DiffusionPipeline.from_pretrained(repo).save_pretrained(tmp_path / "saved")
    stock.run(WITHOUT_US, repo, tmp_path / "saved")


def test_a_repo_that_stock_has_saved_loads_and_is_saved_for_stock(make: Make, tmp_path: Path) -> None:
    make(kandinsky3.Kandinsky3Pipeline, "stock").save_pretrained(tmp_path / "stock")
    pipe = diffusers.AutoPipelineForText2Image.from_pretrained(tmp_path / "stock")
    assert type(pipe.unet) is Kandinsky3UNet
    assert type(pipe.scheduler) is diffusers.DDPMScheduler
    pipe.save_pretrained(tmp_path / "ours")
    index, before = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("ours", "stock"))
    assert {key: index[key] for key in before if not key.startswith("_")} == {
        key: before[key] for key in before if not key.startswith("_")
    }
    shutil.rmtree(tmp_path / "stock")
