"""Weight files give their tensors, damaged ones a clear message, and none of them runs code."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kandinsky_diffusers.conversion.errors import ConversionError
from kandinsky_diffusers.conversion.reader import open_weights
from kandinsky_diffusers.conversion.torch_file import check_zip


TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3).half(), "b": torch.arange(4)}


class Bomb:
    """Unpickling it creates a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_pytorch_files_and_safetensors_give_the_same(tmp_path):
    torch.save(TENSORS, tmp_path / "file.ckpt")
    torch.save(TENSORS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file(TENSORS, tmp_path / "file.safetensors")
    for name in ("file.ckpt", "old.bin", "file.safetensors"):
        file = open_weights(tmp_path / name)
        assert file.shapes == {"a.weight": (2, 3), "b": (4,)}
        assert file.dtypes == {"a.weight": "float16", "b": "int64"}
        assert all(torch.equal(file.tensor(key), tensor) for key, tensor in TENSORS.items())


@pytest.mark.parametrize("pack", [tuple, list, torch.stack], ids=["tuple", "list", "stacked"])
def test_nameless_tensors_get_the_given_names(tmp_path, pack):
    torch.save(pack([torch.zeros(3), torch.ones(3)]), tmp_path / "stats.th")
    file = open_weights(tmp_path / "stats.th", ("mean", "std"))
    assert file.shapes == {"mean": (3,), "std": (3,)}
    assert torch.equal(file.tensor("std"), torch.ones(3))


def test_dicts_in_dicts_are_flattened_so_that_nothing_is_overlooked(tmp_path):
    torch.save({"epoch": 3, "state_dict": TENSORS}, tmp_path / "file.ckpt")
    assert set(open_weights(tmp_path / "file.ckpt").shapes) == {"epoch", "state_dict/a.weight", "state_dict/b"}


def test_classes_of_lightning_do_not_keep_a_file_from_being_read(tmp_path, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"callbacks": {callback: {"best": 1}}, "state_dict": TENSORS}, tmp_path / "vae.ckpt")
    file = open_weights(tmp_path / "vae.ckpt")
    assert torch.equal(file.tensor("state_dict/a.weight"), TENSORS["a.weight"])


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_named_and_not_run(tmp_path, zipped):
    torch.save({**TENSORS, "x": Bomb(tmp_path / "ran")}, tmp_path / "f.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError, match="mkdir"):
        open_weights(tmp_path / "f.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_with_code_is_not_run(tmp_path):
    (tmp_path / "f.bin").write_bytes(pickle.dumps({"x": Bomb(tmp_path / "ran")}))
    with pytest.raises(ConversionError, match=r"f\.bin"):
        open_weights(tmp_path / "f.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["file.ckpt", "old.bin", "file.safetensors"])
@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.95])
def test_truncated_files_are_said_to_be_so(tmp_path, name, keep):
    if name.endswith("safetensors"):
        save_file(TENSORS, tmp_path / name)
    else:
        torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=name != "old.bin")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ConversionError, match="truncated"):
        open_weights(tmp_path / name)


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path):
    path = tmp_path / "file.ckpt"
    torch.save({"a": torch.full((64,), 1.0)}, path)
    check_zip(path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((64,), 1.0).numpy().tobytes()) + 7] ^= 4
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="checksum"):
        check_zip(path)
