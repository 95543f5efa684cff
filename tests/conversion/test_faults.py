"""Whatever is wrong: one message, exit code 1, and nothing half-written in the output folder."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kandinsky_diffusers.cli import app
from kandinsky_diffusers.conversion import staging, writer


@pytest.fixture
def release(release_21, tmp_path) -> Path:
    """A copy of the tiny release that a test may spoil."""
    folder = tmp_path / "release"
    shutil.copytree(release_21, folder)
    return folder


@pytest.fixture
def arguments(release, goldens_21, tmp_path) -> list[str]:
    config = goldens_21.path / "hyperparameters.json"
    return [
        "convert",
        str(release),
        str(tmp_path / "out"),
        "--clip",
        f"{release}/clip",
        "--original-config",
        f"{config}",
    ]


def change(path: Path, **changes) -> None:
    """Replace tensors of a file; None removes one."""
    tensors = {**torch.load(path, weights_only=True), **changes}
    torch.save({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def flip_a_bit(path: Path, key: str) -> None:
    content = bytearray(path.read_bytes())
    number = content.index(torch.load(path, weights_only=True)[key].numpy().tobytes())
    content[number] ^= 1
    path.write_bytes(content)


def not_a_number(release: Path) -> None:
    weight = torch.load(release / "inpainting_fp16.ckpt", weights_only=True)["out.2.weight"]
    weight[3, 1, 0, 2] = float("nan")
    change(release / "inpainting_fp16.ckpt", **{"out.2.weight": weight})


def other_version(release: Path) -> None:
    for path in release.glob("*.*"):
        path.unlink()
    (release / "Kandinsky-2-0.pt").write_bytes(b"")


FAULTS = {
    "missing file": (lambda r: (r / "movq_final.ckpt").unlink(), "movq_final.ckpt is missing"),
    "missing folder": (lambda r: shutil.rmtree(r / "text_encoder"), "text_encoder/pytorch_model.bin is missing"),
    "missing tokenizer": (
        lambda r: [(r / "text_encoder" / n).unlink() for n in ("tokenizer.json", "sentencepiece.bpe.model")],
        "No tokenizer",
    ),
    "truncated file": (lambda r: truncate(r / "decoder_fp16.ckpt"), "decoder_fp16.ckpt"),
    "damaged file": (lambda r: flip_a_bit(r / "decoder_fp16.ckpt", "clip_to_seq.weight"), "checksum"),
    "pickle with code": (lambda r: torch.save({"a": Bomb()}, r / "prior_fp16.ckpt"), "mkdir"),
    "wrong version": (other_version, "looks like Kandinsky 2.0"),
    "wrong file": (
        lambda r: shutil.copyfile(r / "inpainting_fp16.ckpt", r / "decoder_fp16.ckpt"),
        "looks like the inpainting",
    ),
    "one key too many": (lambda r: change(r / "movq_final.ckpt", extra=torch.zeros(2)), "extra"),
    "one key too few": (
        lambda r: change(r / "prior_fp16.ckpt", **{"model.final_ln.bias": None}),
        "model.final_ln.bias",
    ),
    "one key too few, which tells a size": (
        lambda r: change(r / "prior_fp16.ckpt", **{"model.out_proj.weight": None}),
        "model.out_proj.weight",
    ),
    "one wrong shape": (lambda r: change(r / "decoder_fp16.ckpt", **{"out.0.bias": torch.zeros(5)}), "out.0.bias"),
    "NaN in a tensor": (not_a_number, "out.2.weight"),
    "no release": (lambda r: [path.unlink() for path in r.glob("*.*")], "holds no file of a known release"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_release_gives_one_message_and_nothing_else(name, release, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, message = FAULTS[name]
    spoil(release)
    result = CliRunner().invoke(app, [*arguments, "--version", "2.1"] if name == "wrong version" else arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("Error:") == 1
    assert not list((tmp_path / "out").glob("*")) + list((tmp_path / "out").glob(".*"))
    assert not (tmp_path / "exploded").exists()


def test_several_faults_are_reported_together(release, arguments):
    (release / "movq_final.ckpt").unlink()
    truncate(release / "decoder_fp16.ckpt")
    result = CliRunner().invoke(app, arguments)
    assert "movq_final.ckpt" in result.stderr
    assert "decoder_fp16.ckpt" in result.stderr


def test_a_repository_that_is_there_is_kept(arguments, tmp_path):
    mine = tmp_path / "out" / "kandinsky-2-1" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep me")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "kandinsky-2-1" in result.stderr
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]


def test_too_little_space_is_noticed_before_writing(arguments, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "GB left" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_while_writing_leaves_everything_as_it_was(arguments, tmp_path, monkeypatch):
    mine = tmp_path / "out" / "kandinsky-2-1" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep me")
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    result = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert result.exit_code == 1
    assert "disk is full" in result.stderr
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]


KILLED = """
import os, signal, sys
from kandinsky_diffusers.cli import app
from kandinsky_diffusers.conversion import repository
original, calls = repository.model_index, []
def killed(*arguments, **options):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
child = os.fork()
if not child:
    repository.model_index = killed
    try:
        app(sys.argv[1:])
    finally:
        os._exit(0)
result = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def test_a_killed_conversion_leaves_no_repository_and_the_next_one_cleans_up(from_hub, arguments, tmp_path):
    assert from_hub.run(KILLED, *arguments) == -signal.SIGKILL
    assert not list((tmp_path / "out").glob("kandinsky-*"))
    assert list((tmp_path / "out").glob(".*"))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["kandinsky-2-1", "kandinsky-2-1-inpaint", "kandinsky-2-1-prior"]


def test_the_temporary_folder_of_a_running_conversion_is_left_alone(tmp_path):
    with staging.Staging(tmp_path) as running:
        staging.remove_stale(tmp_path)
        assert running.folder.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_file_named_like_a_temporary_folder_is_left_alone(tmp_path):
    mine = tmp_path / f"{staging.PREFIX}mine"
    mine.write_text("keep me")
    staging.remove_stale(tmp_path)
    assert mine.read_text() == "keep me"


def test_what_a_killed_overwrite_had_set_aside_comes_back(tmp_path):
    aside = tmp_path / f"{staging.PREFIX}dead" / "replaced" / "kandinsky-2-1"
    aside.mkdir(parents=True)
    (aside / "mine.txt").write_text("keep me")
    staging.remove_stale(tmp_path)
    assert (tmp_path / "kandinsky-2-1" / "mine.txt").read_text() == "keep me"
    assert [path.name for path in tmp_path.iterdir()] == ["kandinsky-2-1"]


def test_a_failing_rename_puts_everything_back(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").touch()
    rename, names = Path.rename, []

    def failing(self, target):
        names.append(self.name)
        if names == ["a", "b", "b"]:
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    with staging.Staging(tmp_path) as area:
        (area.folder / "a").mkdir()
        (area.folder / "b").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", failing)
            with pytest.raises(OSError, match="input/output"):
                area.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b" / "old").exists()
