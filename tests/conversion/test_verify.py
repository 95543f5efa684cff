"""Verification finds every kind of difference; inspection tells what files are."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kandinsky_diffusers.cli import app
from kandinsky_diffusers.conversion import ConversionError, convert, inspect
from kandinsky_diffusers.conversion.repository import RepoWriter


INVENTORY = Path(__file__).parents[1] / "data" / "inventory" / "k21_movq_final.ckpt.json.gz"


@pytest.fixture
def spoiled_conversion(release_21, goldens_21, tmp_path, monkeypatch):
    """Converts, with something spoiled between writing and verifying."""

    def run(spoil):
        write = RepoWriter.write

        def write_and_spoil(self, repo):
            place = write(self, repo)
            if repo.name == "kandinsky-2-1":
                spoil(place)
            return place

        monkeypatch.setattr(RepoWriter, "write", write_and_spoil)
        options = {"clip": release_21 / "clip", "original_config": goldens_21.path / "hyperparameters.json"}
        return convert(release_21, tmp_path / "out", verify=True, **options)

    return run


def shift_the_rows(place: Path) -> None:
    path = place / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    key = "mid_block.attentions.0.to_k.bias"
    tensors[key] = tensors[key].roll(1)
    save_file(tensors, path, {"format": "pt"})


def change_the_last_bit(place: Path) -> None:
    path = place / "movq" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["quant_conv.bias"][0] = torch.nextafter(tensors["quant_conv.bias"][0], torch.tensor(9.0))
    save_file(tensors, path, {"format": "pt"})


def break_the_scheduler(place: Path) -> None:
    (place / "scheduler" / "scheduler_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (shift_the_rows, "middle_block.1.qkv.bias"),
        (change_the_last_bit, "quant_conv.bias"),
        (break_the_scheduler, "does not run"),
    ],
)
def test_a_difference_is_found_and_nothing_is_left(spoiled_conversion, tmp_path, spoil, named):
    with pytest.raises(ConversionError, match=named):
        spoiled_conversion(spoil)
    assert not (tmp_path / "out").exists()


def test_inspect_tells_version_part_dtype_parameters_and_digest(release_21):
    reports = {report.path.relative_to(release_21).as_posix(): report for report in inspect(release_21)}
    movq = reports["movq_final.ckpt"]
    tensors = torch.load(release_21 / "movq_final.ckpt", weights_only=True)
    assert (movq.version, movq.part, list(movq.dtypes)) == ("2.1", "movq", ["float32"])
    assert movq.parameters == sum(t.numel() for t in tensors.values())
    assert movq.sha256 == hashlib.sha256((release_21 / "movq_final.ckpt").read_bytes()).hexdigest()
    parts = {"decoder_fp16.ckpt": "decoder", "inpainting_fp16.ckpt": "inpainting", "prior_fp16.ckpt": "prior"}
    parts |= {"ViT-L-14_stats.th": "stats", "text_encoder/pytorch_model.bin": "text_encoder"}
    assert all(reports[name].part == part for name, part in parts.items())


def test_inspect_reads_inventories():
    (report,) = inspect(INVENTORY)
    assert (report.version, report.part, report.dtypes) == ("2.1", "movq", {})
    assert report.parameters == json.loads(gzip.decompress(INVENTORY.read_bytes()))["params"]


def test_inspect_of_a_folder_reports_damaged_files_too(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "unknown.pt")
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\x03\x04")
    damaged, unknown = inspect(tmp_path)
    assert "damaged.ckpt" in str(damaged.problem)
    assert (unknown.version, unknown.parameters, unknown.problem) == (None, 3, None)
    with pytest.raises(ConversionError, match=r"damaged\.ckpt"):
        inspect(tmp_path / "damaged.ckpt")


def test_the_inspect_command_prints_json(release_21):
    result = CliRunner().invoke(app, ["inspect", str(release_21 / "prior_fp16.ckpt"), "--json"])
    assert result.exit_code == 0
    (report,) = json.loads(result.stdout)
    assert (report["part"], report["dtypes"].keys()) == ("prior", {"float16"})


def test_the_inspect_command_prints_a_table_with_the_whole_digest(release_21):
    result = CliRunner().invoke(app, ["inspect", str(release_21)], env={"COLUMNS": "160"})
    assert hashlib.sha256((release_21 / "movq_final.ckpt").read_bytes()).hexdigest() in result.stdout


def test_the_plan_command_accounts_for_a_release_and_for_an_inventory(release_21, goldens_21):
    config = ["--original-config", str(goldens_21.path / "hyperparameters.json")]
    release = CliRunner().invoke(app, ["convert", str(release_21), "--plan", "--clip", f"{release_21}/clip", *config])
    assert release.exit_code == 0
    assert "transformer.embeddings.position_ids" in release.stdout
    inventory = CliRunner().invoke(app, ["convert", str(INVENTORY), "--plan"])
    assert "431 keys make 431 tensors" in inventory.stdout


def test_output_is_asked_for_unless_only_a_plan_is_wanted(release_21):
    result = CliRunner().invoke(app, ["convert", str(release_21)])
    assert result.exit_code == 1
    assert "OUTPUT" in result.stderr
