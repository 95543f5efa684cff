"""The ControlNet of Kandinsky 3: what a conversion writes, and what is wrong with others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kandinsky_diffusers import Kandinsky3ControlNetModel
from kandinsky_diffusers.cli import app
from kandinsky_diffusers.conversion import ConversionError, convert, inspect
from tests.support.goldens import GoldenFamily


REPO = "kandinsky-3-controlnet-hed"
WEIGHTS = Path("unet_controlnet", "diffusion_pytorch_model.safetensors")


@pytest.fixture
def source(release_controlnet: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(release_controlnet, tmp_path / "release")


def test_it_is_one_model_with_a_card_and_no_index(
    converted_controlnet: Path, goldens_controlnet: GoldenFamily
) -> None:
    names = {path.name for path in converted_controlnet.iterdir()}
    assert names == {"README.md", "config.json", "conversion.json", "diffusion_pytorch_model.safetensors"}
    config = json.loads((converted_controlnet / "config.json").read_text())
    own = goldens_controlnet.hyperparameters[WEIGHTS.as_posix()]
    assert (config["attention_head_dim"], config["groups"]) == (own["head_dim"], own["groups"])
    assert config["_class_name"] == "Kandinsky3ControlNetModel"
    card = ModelCard.load(converted_controlnet / "README.md")
    assert card.data.library_name == "diffusers"
    assert "Kandinsky3ControlNetModel" in card.text


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_it_is_recognised_and_verified_and_the_base_is_left_out_with_a_note(
    source: Path, tmp_path: Path, variant: str | None
) -> None:
    report = convert(source, tmp_path / "out", variant=variant, verify=True)
    assert [place.name for place in report.repos] == [REPO]
    assert report.skipped.keys() == {"unet", "kandinsky-hed-detector"}
    compared = report.verified[REPO]
    assert compared["loaded_and_run"] == "Kandinsky3ControlNetModel"
    tensors = load_file(source / WEIGHTS)
    assert compared["bit_identical_tensors"] == {"Kandinsky3ControlNetModel": len(tensors)}
    model: Any = Kandinsky3ControlNetModel.from_pretrained(
        tmp_path / "out" / REPO, variant=variant, torch_dtype=torch.float32
    )
    wanted = tensors["convs.0.weight"] if variant is None else tensors["convs.0.weight"].half().float()
    assert torch.equal(model.controlnet_down_blocks[0].weight, wanted)


def test_without_its_configuration_the_original_config_tells_what_shapes_do_not(
    source: Path, goldens_controlnet: GoldenFamily, tmp_path: Path
) -> None:
    (source / "unet_controlnet" / "config.json").unlink()
    with pytest.raises(ConversionError, match="head_dim is 64, which does not divide"):
        convert(source, tmp_path / "out", version="3-controlnet")
    convert(source, tmp_path / "out", original_config=goldens_controlnet.path / "hyperparameters.json")
    assert Kandinsky3ControlNetModel.from_pretrained(tmp_path / "out" / REPO)


@pytest.mark.parametrize("change", ["one too many", "one missing"])
def test_a_key_that_does_not_belong_or_is_missing_is_named(source: Path, tmp_path: Path, change: str) -> None:
    tensors = load_file(source / WEIGHTS)
    if change == "one too many":
        key, tensors["ema.weight"] = "ema.weight", torch.zeros(1)
    else:
        tensors.pop(key := "convs.0.bias")
    save_file(tensors, source / WEIGHTS)
    with pytest.raises(ConversionError, match=key):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspect_and_the_plan_tell_what_it_is(release_controlnet: Path) -> None:
    assert [(found.version, found.part) for found in inspect(release_controlnet / WEIGHTS)] == [
        ("3-controlnet", "controlnet")
    ]
    plan = CliRunner().invoke(app, ["convert", str(release_controlnet), "nowhere", "--plan"])
    assert plan.exit_code == 0, plan.output
    assert "controlnet -> Kandinsky3ControlNetModel" in plan.output
