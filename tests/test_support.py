"""The tests' own tools: releases rebuilt from manifests."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from tests.support.goldens import GoldenFamily
from tests.support.release import DigestMismatch, build_release, make_arrays, write_weights


def test_a_manifest_that_no_longer_gives_the_recorded_tensors_is_refused(
    goldens_21: GoldenFamily, tmp_path: Path
) -> None:
    family = shutil.copytree(goldens_21.path, tmp_path / "family", ignore=shutil.ignore_patterns("cases"))
    path = family / "manifest" / "ViT-L-14_stats.th.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"seed": manifest["seed"] + 1}))

    with pytest.raises(DigestMismatch, match="ViT-L-14_stats"):
        build_release(family, tmp_path / "release")


def test_the_release_has_a_clip_that_transformers_loads_completely(release_21: Path) -> None:
    loaded: Any = CLIPModel.from_pretrained(release_21 / "clip", output_loading_info=True)

    assert not any(loaded[1].values()), loaded[1]


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    tensors = {"table": [[100, 100], "float32", "embedding"], "tied": [[100, 100], "float32", "same_as:table"]}
    write_weights(tmp_path / "tied.pt", make_arrays({"seed": 1, "tensors": tensors}), {"layout": "state_dict"})

    loaded = torch.load(tmp_path / "tied.pt", weights_only=True)

    assert loaded["tied"].data_ptr() == loaded["table"].data_ptr()
    assert (tmp_path / "tied.pt").stat().st_size < 60_000


def test_a_lightning_file_names_a_class_that_is_not_installed(tmp_path: Path) -> None:
    container = {"layout": "nested", "callback_class": ["some_trainer.callbacks", "Checkpoint"]}
    arrays = make_arrays({"seed": 1, "tensors": {"w": [[2], "float32", "bias"]}})
    write_weights(tmp_path / "model.ckpt", arrays, container)

    assert "some_trainer" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="some_trainer"):
        torch.load(tmp_path / "model.ckpt", weights_only=False)


def test_tests_cannot_leave_this_machine() -> None:
    with socket.socket() as outside, pytest.raises(RuntimeError, match="this machine alone"):
        outside.connect(("192.0.2.1", 80))  # an address that is reserved for documentation
