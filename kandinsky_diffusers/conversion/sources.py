"""Finding the files of a release, and telling what a file is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .json_files import read_json
from .layout import arrange
from .reader import WeightFile, is_inventory, open_weights
from .recipe import Inputs, Release, Repo, SourceFile
from .releases import guess_version, release, releases


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SMALL_FILES = ("*.json", "*.txt", "*.model")
WEIGHT_ENDINGS = (".ckpt", ".pt", ".pth", ".th", ".bin", ".safetensors")


def find_folder(place: str | Path, what: str, patterns: Sequence[str] = ()) -> Path:
    """A folder: ``place`` itself, or the download of the Hub repository of that id.

    Raises:
        ConversionError: neither.
    """
    folder = Path(place)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(place)):
        raise ConversionError(f"{what} is {str(place)!r}, which is not a folder (nor the id of a Hub repository).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(place), allow_patterns=list(patterns) or None))
    except (OSError, ValueError) as error:
        raise _not_given(what, str(place), error) from error


def find_companion(place: str | Path, what: str, weights: Sequence[str]) -> Path:
    """A folder with a model in the Hub's format, or another release, see :func:`find_folder`; only what is needed.

    Args:
        place: folder or Hub id.
        what: name for messages.
        weights: where its weights may lie, the best first.

    Raises:
        ConversionError: see :func:`find_folder`.
    """
    published = [path for path in weights if path.endswith(".pt")]
    if published:
        return find_folder(place, what, published)
    folder = find_folder(place, what, (*SMALL_FILES, "*.safetensors"))
    if any((folder / path).is_file() for path in weights):
        return folder
    return find_folder(place, what, (*SMALL_FILES, "*.bin"))


def _not_given(what: str, repo: str, error: Exception) -> ConversionError:
    reason = str(error).strip().partition("\n")[0]
    return ConversionError(f"{what} is {repo!r}: there is no such folder, and the Hub does not give it: {reason}")


def read_config(path: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The original configuration, from a JSON file or already read.

    Raises:
        ConversionError: it cannot be read, or is not a JSON object.
    """
    if path is None or isinstance(path, Mapping):
        return path or {}
    try:
        return read_json(Path(path))
    except ConversionError as error:
        raise ConversionError(f"original_config: {error}") from error


def choose_release(folder: Path, version: str, layout: str = "split") -> Release:
    """The release that ``version`` names, or that the files tell if it is ``auto``, in a layout.

    Raises:
        ConversionError: unknown, or the folder has none of its main files.
    """
    guess = guess_version(folder)
    looks = f"{folder} looks like Kandinsky {guess}" if guess else f"{folder} holds no file of a known release"
    if version == "auto" and guess is None:
        raise ConversionError(f"{looks}; which version it is cannot be told.")
    try:
        chosen = arrange(release(version if version != "auto" else str(guess)), layout)
    except ConversionError as error:
        raise ConversionError(f"{error} {looks}.") from error
    mains, folders = [chosen.file(repo.main) for repo in chosen.repos], chosen.roots(folder)
    if not any(_locate(file, folders) for file in mains):
        wanted = ", ".join(map(_title, mains))
        raise ConversionError(f"None of the main files of {chosen.title} ({wanted}) is there; {looks}.")
    return chosen


def choose_repos(chosen: Release, folders: Mapping[str, Path]) -> tuple[list[Repo], dict[str, str]]:
    """The repositories whose main file is there; and why the others, and other parts of the release, are left out."""
    mains = {repo.name: chosen.file(repo.main) for repo in chosen.repos}
    skipped = {
        name: f"{_title(file)} is not in the release" for name, file in mains.items() if not _locate(file, folders)
    }
    repos = [repo for repo in chosen.repos if repo.name not in skipped]
    return repos, skipped | {
        path: reason for path, reason in chosen.left_out.items() if (folders["release"] / path).exists()
    }


def leave_out_absent(
    repos: Sequence[Repo], chosen: Release, folders: Mapping[str, Path], companions: Mapping[str, str | Path]
) -> tuple[list[Repo], dict[str, str]]:
    """Repositories without those optional components of which a file is missing; and why they are left out."""
    kept, reasons = [], {}
    for repo in repos:
        files = [chosen.file(part.file) for model in repo.optional_models for part in model.parts]
        absent = next((reason for file in files if (reason := _absence(file, folders, companions))), None)
        kept.append(repo if absent is None else repo.without_optional)
        if absent is not None:
            reasons[f"{', '.join(component.name for component in repo.optional)} of {repo.name}"] = absent
    return kept, reasons


def _absence(file: SourceFile, folders: Mapping[str, Path], companions: Mapping[str, str | Path]) -> str | None:
    if file.root in folders:
        return None if _locate(file, folders) else f"{_title(file)} is not in the release"
    return None if file.root in companions else f"no {file.root} was named"


def open_files(chosen: Release, names: Sequence[str], folders: Mapping[str, Path]) -> dict[str, WeightFile]:
    """Open the source files ``names``, and check that they are what their names say.

    Raises:
        ConversionError: files are missing, unreadable, or others than expected; all are named.
    """
    files, faults = {}, []
    for name in names:
        source = chosen.file(name)
        try:
            files[name] = open_known(chosen, source, folders)
        except ConversionError as error:
            faults.append(str(error))
    if faults:
        raise ConversionError("\n".join(dict.fromkeys(faults)))
    return files


def open_known(chosen: Release, source: SourceFile, folders: Mapping[str, Path]) -> WeightFile:
    """Open one source file.

    Raises:
        ConversionError: it is missing, unreadable, or another file than expected.
    """
    if source.root not in folders:
        raise ConversionError(f"The repository of the {source.root} is missing in {folders['release']}.")
    path = _locate(source, folders)
    if path is None:
        name, *others = source.paths
        also = f", and so are {others[0]} and its other forms" if others else ""
        raise ConversionError(f"{name} is missing in {folders[source.root]}{also}.")
    file = open_weights(path, source.names)
    other = None if source.recognises_all(file.shapes) else identify(file)
    if other is not None:
        raise ConversionError(
            f"{path} is not the {source.name} of {chosen.title}; it looks like the {other[1]} of Kandinsky {other[0]}."
        )
    return source.view(file)


def open_any(path: Path) -> WeightFile:
    """Open a file of unknown kind.  Nameless tensors get the names that a release has for a file of that form, if any.

    Raises:
        ConversionError: it is unreadable.
    """
    file = open_weights(path)
    forms = [known_file.names for known in releases() for known_file in known.files if known_file.names]
    for names in forms if not file.named else ():
        if (renamed := open_weights(path, names)).named:
            return renamed
    return file


def identify(file: WeightFile) -> tuple[str, str] | None:
    """Version and part (``"2.1"``, ``"movq"``) that the keys and shapes of a file tell, or None."""
    found = next(iter(candidates(file)), None)
    return found and (found[0].version, found[1].name)


def candidates(file: WeightFile) -> list[tuple[Release, SourceFile]]:
    """What a file may be by its keys and shapes, those first that are published under its name."""
    shapes = file.shapes
    found = [(known, source) for known in releases() for source in known.recognise(shapes)]
    published = [{Path(path).name for path in source.paths} for _, source in found]
    first = [pair for pair, names in zip(found, published, strict=True) if file.path.name in names]
    return [*first, *(pair for pair in found if pair not in first)]


@dataclass(frozen=True)
class Found:
    """What there is to plan: the release, its opened files, and the names of other files that lie there."""

    release: Release
    inputs: Inputs
    ignored: tuple[str, ...] = ()


def find_for_planning(
    place: Path,
    version: str,
    companions: Mapping[str, str | Path | None],
    config: Mapping[str, Any],
    layout: str = "split",
) -> Found:
    """Open everything that can be planned: one file, a folder of inventories, or what there is of a release.

    Raises:
        ConversionError: nothing is recognised, a file is damaged, or it belongs to another version.
    """
    if place.is_file():
        return _found([place], version, config)
    folder = find_folder(place, "source")
    if guess_version(folder) is None and (inventories := sorted(filter(is_inventory, folder.iterdir()))):
        return _found(inventories, version, config)
    chosen = choose_release(folder, version, layout)
    folders = dict(chosen.roots(folder))
    folders |= {root: Path(folder) for root, folder in companions.items() if folder and Path(folder).is_dir()}
    names = [file.name for file in chosen.files if _locate(file, folders)]
    return Found(chosen, Inputs(folders, open_files(chosen, names, folders), config))


def _found(paths: Sequence[Path], version: str, config: Mapping[str, Any]) -> Found:
    found: dict[str, dict[str, WeightFile]] = {}
    ignored = []
    for path in paths:
        file = open_any(path)
        choices = candidates(file)
        wanted = [(known, source) for known, source in choices if version in ("auto", known.version)]
        if not wanted:
            also = f"Kandinsky {choices[0][0].version}, {choices[0][1].name}" if choices else "unknown"
            ignored.append(f"{path.name} ({also})")
            continue
        known = wanted[0][0]
        parts = found.setdefault(known.version, {})
        free = [source for other, source in wanted if other is known and source.name not in parts]
        if not free:
            twin = parts[wanted[0][1].name].path
            raise ConversionError(f"{path} and {twin} are both the {wanted[0][1].name} of Kandinsky {known.version}.")
        parts |= known.parts_of(file, free[0])
    if len(found) != 1:
        what = f"of Kandinsky {version}" if version != "auto" else "of one version that can be converted"
        raise ConversionError(f"No file {what}: {', '.join(ignored) or ', '.join(found)}.")
    ((name, parts),) = found.items()
    return Found(release(name), Inputs(_roots(release(name), parts), parts, config), tuple(ignored))


def _roots(chosen: Release, files: Mapping[str, WeightFile]) -> dict[str, Path]:
    """The folders below which single files lie as published, for the small files beside them."""
    roots = {}
    for name, file in files.items():
        for published in map(Path, chosen.file(name).paths):
            depth = len(published.parts)
            if file.path.parts[-depth:] == published.parts:
                roots[chosen.file(name).root] = file.path.parents[depth - 1]
    return roots


def _locate(source: SourceFile, folders: Mapping[str, Path]) -> Path | None:
    folder = folders.get(source.root)
    places = (folder / path for path in source.paths) if folder else ()
    return next((place for place in places if place.is_file()), None)


def _title(source: SourceFile) -> str:
    return source.paths[0] if source.root == "release" else f"{source.paths[0]} of the {source.root}"
