"""The conversion of a LoRA of the fork: its file, its names at full size, and what is wrong with a file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from kandinsky_diffusers.conversion import ConversionError, convert, inspect, plan, plan_source
from tests.conversion.test_full_size import INVENTORIES, shapes_of


INVENTORY = "fork_lora_rank16.json.gz"
WEIGHTS = "pytorch_lora_weights.safetensors"


def test_every_key_at_full_size_is_used_and_comes_back():
    found, (model,) = plan_source(INVENTORIES / INVENTORY)
    (file,) = found.inputs.files.values()
    assert found.release.version == "3-lora"
    assert not model.plan.dropped
    assert model.plan.inverse.target_shapes == file.shapes
    assert len(model.plan.target_shapes) == 200
    assert model.plan.target_shapes["unet.add_time_condition.attention.to_out.0.lora_A.weight"] == (16, 1536)


def test_the_repository_is_a_file_with_every_bit_of_the_original(release_lora, converted_lora):
    folder = converted_lora / "kandinsky-3-lora"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "conversion.json", WEIGHTS]
    original, written = torch.load(release_lora / "pytorch_model.bin"), load_file(folder / WEIGHTS)
    old, new = "feature_pooling.attention.processor.to_query_lora.down", "add_time_condition.attention.to_q.lora_A"
    assert torch.equal(written[f"unet.{new}.weight"], original[f"{old}.weight"])
    assert len(written) == len(original)
    facts = json.loads((folder / "conversion.json").read_text())
    assert facts["verification"]["bit_identical_tensors"] == {"LoRA": len(original)}


def test_the_version_is_recognised(release_lora, tmp_path):
    report = convert(release_lora, tmp_path / "out", variant="fp16")
    assert [path.name for path in report.repos] == ["kandinsky-3-lora"]
    written = load_file(tmp_path / "out" / "kandinsky-3-lora" / WEIGHTS)
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}


def test_inspect_says_what_it_is_before_and_after(release_lora, converted_lora):
    for folder, form in ((release_lora, "fork"), (converted_lora, "diffusers")):
        (report,) = inspect(folder)
        assert (report.version, report.part) == ("3.x", f"LoRA of the UNet ({form})")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_pooling.attention.processor.to_v_lora.up.weight": None}, r"to_v_lora\.up"),
        ({"down_samples.1.self_attention_block.attention.processor.to_key_lora.up.weight": (64, 16)}, "another shape"),
        ({"feature_pooling.attention.processor.to_query_lora.down.weight": (8, 4096)}, r"ranks \[8, 16\]"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    shapes = {key: shape for key, shape in (shapes_of(INVENTORY) | change).items() if shape}
    with pytest.raises(ConversionError, match=message):
        plan(shapes)


def test_another_file_of_the_name_is_refused(release_31, tmp_path):
    shutil.copy(release_31 / "weights" / "movq.pt", tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"not the lora of Kandinsky 3 LoRA; it looks like the movq"):
        convert(tmp_path, tmp_path / "out", version="3-lora")
