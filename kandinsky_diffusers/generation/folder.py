"""The folder of a run: file names, pictures that carry their parameters, the manifest, and what is still missing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..images import UNREADABLE
from .jobs import Job, Settings


RUN, MANIFEST = "run.json", "manifest.jsonl"
PARAMETERS = "parameters"  # the text of a PNG in which viewers of generated pictures look for them
LONGEST_SLUG = 40
TEMPORARY = ".kandinsky-diffusers-"


@dataclass(frozen=True)
class Run:
    """What is drawn, and how. Pictures are numbered from 0.

    Args:
        jobs: one for each picture, with seeds.
        settings: what they have in common.
    """

    jobs: Sequence[Job]
    settings: Settings

    @cached_property
    def names(self) -> list[str]:
        """The file of each picture: number, words of the prompt, seed."""
        digits = max(5, len(str(len(self.jobs) - 1)))
        return [f"{number:0{digits}}-{slug_of(job)}{job.seed}.png" for number, job in enumerate(self.jobs)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of jobs, input pictures and settings: what tells one run from another."""
        inputs = [{name: each.sha256 for name, each in job.inputs.items()} for job in self.jobs]
        content = [[job.record() for job in self.jobs], inputs, self.settings.record()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class RunFolder:
    """Where a run puts its pictures.

    `run.json` says whose folder it is, from before the first picture on. Files are written under another name and then
    renamed, so that what is there is whole. `manifest.jsonl` is there when all pictures are.

    Args:
        path: of the folder.
        run: that it is for.
    """

    def __init__(self, path: Path, run: Run) -> None:
        self.path = path
        self.run = run

    @property
    def manifest(self) -> Path:
        """The file with a line for each picture."""
        return self.path / MANIFEST

    @property
    def commit(self) -> str | None:
        """The commit of the repository that the run began with, for one of the Hub."""
        return (self._owner() or {}).get("commit")

    @property
    def is_mine(self) -> bool:
        """Whether the run has begun here."""
        return (self._owner() or {}).get("run") == self.run.digest

    def check(self, overwrite: bool = False) -> None:
        """Refuse a folder of something else; nothing is changed.

        Args:
            overwrite: whether the pictures of another run may be replaced.

        Raises:
            FileExistsError: there is something else, in the place of the folder or of a picture.
        """
        owner = self._owner()
        if owner is None and self._holds_anything():
            raise FileExistsError(f"{self.path} is there already, and no run has made it; name another folder.")
        if owner is None:
            return
        if owner["run"] != self.run.digest and not overwrite and any(self._pictures_of(owner["run"])):
            raise FileExistsError(
                f"{self.path} has the pictures of another run, with {self._difference(owner)}. Name another folder, or"
                " `overwrite` (--overwrite) it."
            )
        for path in map(self.path.joinpath, self.run.names):
            if os.path.lexists(path) and not _is_of(owner["run"], path):
                raise FileExistsError(f"{path} is there already, and this run has not made it; move it away.")

    def prepare(self, commit: str | None = None) -> None:
        """Make it the folder of this run: pictures of another one go, and what a killed process has left behind.

        Args:
            commit: see [`commit`].
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.glob(f"{TEMPORARY}*"):
            path.unlink()
        if self.is_mine:
            return
        if (owner := self._owner()) is not None:
            self.manifest.unlink(missing_ok=True)
            for path in list(self._pictures_of(owner["run"])):
                path.unlink()
        content = {"run": self.run.digest, "commit": commit, "pictures": len(self.run.jobs)}
        _write(self.path / RUN, _as_json({**content, "settings": self.run.settings.record()}).encode())

    def has(self, number: int) -> bool:
        """Whether picture `number` is there."""
        return os.path.lexists(self.path / self.run.names[number])

    def save(self, number: int, image: Image.Image, record: Mapping[str, Any]) -> bool:
        """Save picture `number` with its parameters; one that is there already stays. Returns whether it was not."""
        if self.has(number):
            return False
        text, file = PngImagePlugin.PngInfo(), io.BytesIO()
        name = self.run.names[number]
        text.add_text(PARAMETERS, _as_json({"file": name, **record, "run": self.run.digest}))
        image.save(file, "PNG", pnginfo=text)
        _write(self.path / name, file.getvalue())
        return True

    def write_manifest(self) -> None:
        """One line for each picture, made of what it carries, with its SHA-256."""
        lines = [_as_json(self._entry(name)) for name in self.run.names]
        _write(self.manifest, "".join(f"{line}\n" for line in lines).encode())

    def _entry(self, name: str) -> dict[str, Any]:
        content = (self.path / name).read_bytes()
        return {**read_record(io.BytesIO(content)), "sha256": hashlib.sha256(content).hexdigest()}

    def _owner(self) -> dict[str, Any] | None:
        """What `run.json` says, if it is one of ours."""
        with suppress(OSError, ValueError):
            content = json.loads((self.path / RUN).read_text(encoding="utf-8"))
            if isinstance(content, dict) and "run" in content and isinstance(content.get("settings"), dict):
                return content
        return None

    def _holds_anything(self) -> bool:
        if not self.path.is_dir():
            return os.path.lexists(self.path)
        return any(not path.name.startswith(TEMPORARY) for path in self.path.iterdir())

    def _pictures_of(self, digest: str) -> Iterator[Path]:
        return (path for path in self.path.glob("*.png") if _is_of(digest, path))

    def _difference(self, owner: Mapping[str, Any]) -> str:
        before, now = owner["settings"], self.run.settings.record()
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        values = [f"`{name}` {before.get(name)!r} and not {now.get(name)!r}" for name in changed]
        return ", ".join(values) or "other jobs, or other pictures to start from"


def slug_of(job: Job) -> str:
    """The first words of a prompt, or of the picture's name, as a part of a file name: letters, digits, hyphens."""
    text = unicodedata.normalize("NFKC", job.prompt or Path(job.image or "").stem)
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:LONGEST_SLUG].strip("-")
    return f"{words}-" if words else ""


def read_record(picture: str | Path | io.BytesIO) -> dict[str, Any]:
    """The parameters that a picture carries; none for what is no picture of a run."""
    with suppress(*UNREADABLE), Image.open(picture) as image:
        record = json.loads(image.info.get(PARAMETERS, "{}"))
        if isinstance(record, dict):
            return record
    return {}


def _is_of(digest: str, path: Path) -> bool:
    """Whether a file is a picture of a run, and still where the run has put it."""
    record = read_record(path)
    return (record.get("run"), record.get("file")) == (digest, path.name)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, after a power cut too."""
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
