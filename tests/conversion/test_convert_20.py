"""Kandinsky 2.0: what a conversion writes, and what it makes of a VAE that Lightning has saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kandinsky_diffusers.conversion import ConversionError, convert
from tests.support.goldens import GoldenFamily


@pytest.fixture
def release(release_20: Path, tmp_path: Path) -> Path:
    """A copy of the release that a test may spoil."""
    return Path(shutil.copytree(release_20, tmp_path / "release"))


@pytest.fixture
def run(goldens_20: GoldenFamily, tmp_path: Path) -> Any:
    config = goldens_20.path / "hyperparameters.json"

    def call(release: Path, **options: Any) -> Any:
        return convert(release, tmp_path / "out", original_config=config, **options)

    return call


def test_two_repositories_are_written_and_verified(run: Any, release_20: Path) -> None:
    report = run(release_20, verify=True)  # the version is guessed
    assert {path.name for path in report.repos} == {"kandinsky-2-0", "kandinsky-2-0-inpaint"}
    for path in report.repos:
        index = json.loads((path / "model_index.json").read_text())
        assert index["unet"] == ["kandinsky_diffusers", "KandinskyV20UNet"]
        assert index["text_encoder_2"] == ["transformers", "MT5EncoderModel"]
        assert (path / "tokenizer_2" / "tokenizer.json").is_file()
        assert json.loads((path / "vae" / "config.json").read_text())["scaling_factor"] == 0.0512


def test_what_belongs_to_the_training_is_dropped_with_a_reason(run: Any, release_20: Path) -> None:
    report = run(release_20)
    reasons = {key: reason for file, key, reason in report.dropped if file == "vae.ckpt"}
    assert "loss.logvar" in reasons
    assert all(reasons.values())


def test_callbacks_pickled_by_lightning_are_tolerated_and_not_executed(
    run: Any, release: Path, converted_20: Path
) -> None:
    shutil.move(release / "variants" / "vae_with_callbacks.ckpt", release / "vae.ckpt")
    run(release)
    path = Path("kandinsky-2-0", "vae", "diffusion_pytorch_model.safetensors")
    written, expected = load_file(release.parent / "out" / path), load_file(converted_20 / path)
    assert written.keys() == expected.keys()
    assert all(written[name].equal(weight) for name, weight in expected.items())


def test_a_release_without_inpainting_gives_one_repository(run: Any, release: Path) -> None:
    (release / "Kandinsky-2-0-inpainting.pt").unlink()
    assert [path.name for path in run(release).repos] == ["kandinsky-2-0"]


def test_a_missing_text_encoder_is_named_and_nothing_is_written(run: Any, release: Path) -> None:
    shutil.rmtree(release / "text_encoder2")
    with pytest.raises(ConversionError, match="text_encoder2"):
        run(release)
    assert not (release.parent / "out").exists()
