"""A place to write in, inside the output folder, that becomes visible whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from .errors import ConversionError


PREFIX = ".kandinsky-diffusers-"
_LOCK, _NEW, _OLD = "lock", "new", "replaced"


class Staging:
    """A temporary folder in ``output``; :meth:`commit` moves what was written in :attr:`folder` to its place.

    It is locked while in use.  What a killed process left behind is recognised by its lock being free, and removed by
    the next conversion into the same folder, after bringing back repositories that it was about to replace.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._made = [folder for folder in (output, *output.parents) if not folder.exists()]

    def __enter__(self) -> Staging:
        self._output.mkdir(parents=True, exist_ok=True)
        remove_stale(self._output)
        self._root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self._output))
        self._lock = FileLock(self._root / _LOCK)
        self._lock.acquire()
        self.folder = self._root / _NEW
        self.folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        shutil.rmtree(self._root)
        if error is not None:
            for folder in self._made:
                if not any(folder.iterdir()):
                    folder.rmdir()

    def commit(self) -> None:
        """Move every folder to the output by renaming; folders in their place are kept until all have been moved."""
        old = self._root / _OLD
        old.mkdir()
        moved: list[Path] = []
        try:
            for new in sorted(self.folder.iterdir()):
                place = self._output / new.name
                if os.path.lexists(place):  # a link goes aside itself, not what it leads to
                    place.rename(old / new.name)
                new.rename(place)
                moved.append(place)
        except OSError:
            for place in moved:
                place.rename(self.folder / place.name)
            _bring_back(old, self._output)
            raise
        _sync_folder(self._output)


def remove_stale(output: Path) -> None:
    """Remove the temporary folders of conversions that do not run any more."""
    for root in sorted(output.glob(f"{PREFIX}*")):
        if not root.is_dir() or any(path.is_symlink() for path in (root, root / _LOCK, root / _OLD)):
            continue  # not ours: a file, or it leads out of the folder
        lock = FileLock(root / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _bring_back(root / _OLD, output)
        lock.release()
        shutil.rmtree(root)


def check_free(output: Path, names: Iterable[str], overwrite: bool, sources: Iterable[Path]) -> None:
    """Refuse to touch folders that exist.

    Raises:
        ConversionError: one of ``names`` exists in ``output`` and ``overwrite`` is not set, or holds a source.
    """
    if output.exists() and not output.is_dir():
        raise ConversionError(f"The output {output} is a file; a folder is expected.")
    taken = [output / name for name in names if os.path.lexists(output / name)]
    for place in taken:
        if any(Path(os.path.realpath(source)).is_relative_to(os.path.realpath(place)) for source in sources):
            raise ConversionError(f"{place} holds the source and cannot be replaced. Choose another output folder.")
    if taken and not overwrite:
        places = ", ".join(str(place) for place in taken)
        raise ConversionError(f"Already there: {places}. Nothing was changed; overwrite=True (--overwrite) replaces.")


def check_space(output: Path, needed: int) -> None:
    """Raises:
    ConversionError: the disk of ``output`` has fewer than ``needed`` bytes left.
    """
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConversionError(
            f"{existing} has {free / 1e9:.2f} GB left, but {needed / 1e9:.2f} GB are needed. Nothing was written."
        )


def _bring_back(old: Path, output: Path) -> None:
    for folder in old.iterdir() if old.is_dir() else ():
        if not os.path.lexists(output / folder.name):
            folder.rename(output / folder.name)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
