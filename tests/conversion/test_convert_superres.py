"""KandiSuperRes: what a conversion writes, from which files, and what is left out when one is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from kandinsky_diffusers.cli import app
from kandinsky_diffusers.conversion import ConversionError, convert, inspect


REPOS = ["kandisuperres-x4", "kandisuperres-x2", "kandisuperres-flash-x2"]
FLASH = "KandiSuperRes_flash_x2.pt"


@pytest.fixture(scope="module")
def config(goldens_31: Any, goldens_superres: Any) -> dict[str, Any]:
    return {**goldens_31.hyperparameters, **goldens_superres.hyperparameters}


@pytest.fixture
def source(release_superres: Path, tmp_path: Path) -> Path:
    """A copy of the release that a test may spoil."""
    return shutil.copytree(release_superres, tmp_path / "release")


@pytest.fixture
def flash_alone(source: Path) -> Path:
    for name in ("KandiSuperRes.ckpt", "KandiSuperRes_x2.ckpt"):
        (source / name).unlink()
    return source


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return content.get("unet", content)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_everything_is_verified(release_superres: Path, release_31: Path, config: Any, tmp_path: Path) -> None:
    """And the version is told by the files."""
    report = convert(release_superres, tmp_path, refiner=release_31, original_config=config, verify=True)
    assert [path.name for path in report.repos] == REPOS
    assert not report.skipped
    for checked in report.verified.values():
        assert checked["loaded_and_run"] == "KandiSuperResPipeline"
    assert report.verified["kandisuperres-flash-x2"]["bit_identical_tensors"].keys() == {
        "unet",
        "refiner",
        "movq",
        "context",
    }
    card = (tmp_path / "kandisuperres-flash-x2" / "README.md").read_text(encoding="utf-8")
    assert "from the original release of KandiSuperRes" in card
    assert "| `refiner` |" in card


def test_versions_differ_by_settings(converted_superres: Path) -> None:
    indexes = {name: read(converted_superres / name / "model_index.json") for name in REPOS}
    assert [indexes[name]["scale"] for name in REPOS] == [4, 2, 2]
    assert [indexes[name]["scheduler"][1] for name in REPOS] == [
        "DPMSolverMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "Kandinsky3FlashScheduler",
    ]
    assert [name for name in REPOS if "refiner" in indexes[name]] == ["kandisuperres-flash-x2"]


def test_the_refiner_is_that_of_kandinsky_3_1(converted_superres: Path, converted_31: Path) -> None:
    there, here = converted_31 / "kandinsky-3-1-flash", converted_superres / "kandisuperres-flash-x2"
    for one, other in (("unet", "refiner"), ("movq", "movq")):
        first, second = weights(there / one), weights(here / other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


FORMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "flat": lambda tensors: tensors,
    "nested": lambda tensors: {"unet": tensors},
    "of the training": lambda tensors: {
        "epoch": 3,
        "pytorch-lightning_version": "1.9",
        "optimizer_states": [],
        "state_dict": {f"unet.{key}": tensor * 0 for key, tensor in tensors.items()},
        "callbacks": {"EMA": {"ema_state_dict": {f"unet.{key}": tensor for key, tensor in tensors.items()}}},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_has_one_of_several_forms(flash_alone: Path, config: Any, tmp_path: Path, form: str) -> None:
    path = flash_alone / FLASH
    tensors = tensors_of(path)
    torch.save(FORMS[form](tensors), path)
    convert(flash_alone, tmp_path / "out", refiner=None, original_config=config, verify=True)
    written = weights(tmp_path / "out" / "kandisuperres-flash-x2" / "unet")
    assert torch.equal(written["conv_in.weight"], tensors["init_conv.weight"])


@pytest.mark.parametrize("missing", ["context", "refiner"])
def test_flash_is_written_without_a_refiner_and_it_is_said_so(
    flash_alone: Path, config: Any, tmp_path: Path, missing: str
) -> None:
    """Without the context no refiner is looked for, which is on the Hub by default."""
    if missing == "context":
        (flash_alone / "weights" / "context.pt").unlink()
    options: dict[str, Any] = {"refiner": None} if missing == "refiner" else {}
    report = convert(flash_alone, tmp_path / "out", original_config=config, verify=True, **options)
    reason = report.skipped["refiner, refiner_scheduler, movq, context of kandisuperres-flash-x2"]
    assert (
        reason
        == {
            "context": "weights/context.pt is not in the release",
            "refiner": "no refiner was named",
        }[missing]
    )
    repo = tmp_path / "out" / "kandisuperres-flash-x2"
    assert sorted(path.name for path in repo.iterdir() if path.is_dir()) == ["scheduler", "unet"]
    assert "is not in this repository" in (repo / "README.md").read_text(encoding="utf-8")
    assert DiffusionPipeline.from_pretrained(repo).refiner is None


def test_a_refiner_that_cannot_be_had_is_named(flash_alone: Path, config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"refiner is 'ai-forever/Kandinsky3\.1'"):
        convert(flash_alone, tmp_path / "out", original_config=config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"weights/kandinsky3_flash\.pt is missing in .*empty"):
        convert(flash_alone, tmp_path / "out", refiner=tmp_path / "empty", original_config=config)
    assert not list((tmp_path / "out").glob("*"))


def test_files_may_lie_in_the_folder_of_the_weights(
    flash_alone: Path, release_31: Path, config: Any, tmp_path: Path
) -> None:
    for name in ("context.pt", "context_mask.pt"):
        (flash_alone / "weights" / name).rename(flash_alone / name)
    report = convert(flash_alone, tmp_path / "out", refiner=release_31 / "weights", original_config=config)
    assert not report.skipped.keys() - set(REPOS)
    assert (tmp_path / "out" / "kandisuperres-flash-x2" / "context").is_dir()


def test_inspect_says_what_the_files_are(release_superres: Path) -> None:
    found = {report.path.name: (report.version, report.part) for report in inspect(release_superres)}
    assert found == {
        "KandiSuperRes.ckpt": ("superres", "x4"),
        "KandiSuperRes_x2.ckpt": ("superres", "x2"),
        FLASH: ("superres", "flash x2"),
        "context.pt": ("superres", "context"),
        "context_mask.pt": ("superres", "context mask"),
    }


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one key too many": (lambda c: c.update(spare=torch.ones(1)), "spare"),
    "one key too few": (lambda c: c.pop("out_conv.bias"), r"conv_out\.bias|out_conv\.bias"),
    "another width": (lambda c: c.update({"init_conv.weight": torch.ones(16, 5, 3, 3)}), "first layer has 5 channels"),
    "not a number": (lambda c: c["out_conv.bias"].fill_(float("nan")), r"out_conv\.bias of KandiSuperRes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_written(flash_alone: Path, config: Any, tmp_path: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    tensors = tensors_of(flash_alone / FLASH)
    spoil(tensors)
    torch.save({"unet": tensors}, flash_alone / FLASH)
    with pytest.raises(ConversionError, match=message):
        convert(flash_alone, tmp_path / "out", refiner=None, original_config=config)
    assert not list((tmp_path / "out").glob("*"))


def test_groups_that_do_not_fit_are_refused_with_a_hint(flash_alone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"groups is 32, which does not divide .*--original-config"):
        convert(flash_alone, tmp_path / "out", refiner=None)


def test_the_command_line_has_the_options(flash_alone: Path, config: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    command = ["convert", str(flash_alone), "--original-config", str(tmp_path / "config.json"), "--refiner", "none"]
    result = CliRunner().invoke(app, [*command, "--plan"])
    assert result.exit_code == 0, result.output
    assert "flash x2 -> unet (KandiSuperResUNet)" in result.output
    assert "context + context mask -> context (KandiSuperResContext)" in result.output
    result = CliRunner().invoke(app, [*command[:2], str(tmp_path / "out"), *command[2:], "--version", "superres"])
    assert result.exit_code == 0, result.output
    assert "left out: refiner, refiner_scheduler, movq, context of kandisuperres-flash-x2, because" in result.output
