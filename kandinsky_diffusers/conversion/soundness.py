"""Whether a repository is sound by itself: complete, readable, finite, and of use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from .comparison import check_tensors
from .errors import ConversionError
from .hub_source import INDEX
from .json_files import read_json
from .reader import ShardedFile, WeightFile, file_sha256, open_weights
from .recipe import Repo
from .reports import ComponentReport
from .sources import WEIGHT_ENDINGS
from .tensors import Tensors
from .torch_file import check_zip
from .weight_sets import is_of_weights, variant_of, weight_sets


def check_index(folder: Path) -> Iterator[str]:
    """What ``model_index.json`` lists and is not there.

    Raises:
        ConversionError: it cannot be read.
    """
    listed = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    for name, entry in listed.items():
        if isinstance(entry, list) and entry[:1] not in ([], [None]) and not name.startswith("_"):
            if not (folder / name).is_dir():
                yield f"{INDEX} lists {name}, and there is no such folder"
            elif (folder / name / "config.json").is_file() and not weight_sets(folder / name):
                yield f"{name} has a config.json, but no weights"


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of all weight files of a repository, by their paths in it."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in WEIGHT_ENDINGS and path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }


def check_files(folder: Path, recorded: Mapping[str, Any]) -> Iterator[str]:
    """In which weight files a repository differs from a record, which :func:`files_of` has made, or anyone."""
    there = files_of(folder) if recorded else {}
    for path, facts in recorded.items():
        if path not in there:
            yield f"{path} is missing; conversion.json lists it"
        elif there[path] != facts:
            yield f"{path} is not the file that was written and verified: size or SHA-256 differ from conversion.json"


def check_model(name: str, folder: Path, recorded: Mapping[str, Any]) -> Iterator[ComponentReport]:
    """Check every set of weights in a folder: variants, and pickled ones beside others, as well.

    Args:
        name: of the model.
        folder: with its weights.
        recorded: how many ``tensors`` and ``parameters`` it has by ``conversion.json``; may be empty.
    """
    listed: set[Path] = set()
    for path in weight_sets(folder):
        variant = variant_of(path)
        title = f"{name} ({variant})" if variant else name
        listed.add(path)
        try:
            file = open_weights(path)
            listed.update(file.paths)
            yield _check_set(title, file, recorded)
        except ConversionError as error:
            yield ComponentReport(title, problems=(str(error),))
    if stray := sorted(path.name for path in folder.iterdir() if is_of_weights(path) and path not in listed):
        problem = f"{', '.join(stray)}: no file, or part of several without an index that can be read"
        yield ComponentReport(name, problems=(problem,))


def _check_set(title: str, file: WeightFile, recorded: Mapping[str, Any]) -> ComponentReport:
    for path in file.paths:
        check_zip(path)
    tensors = Tensors([file])
    unlisted = file.unlisted if isinstance(file, ShardedFile) else []
    problems = [f"{len(unlisted)} tensors, such as {unlisted[0]}, are not in {file.path.name}"] if unlisted else []
    counts = {"tensors": len(tensors.shapes), "parameters": sum(map(prod, tensors.shapes.values()))}
    for what, count in counts.items():
        if recorded.get(what, count) != count:
            problems.append(f"it has {count} {what}; conversion.json says {recorded[what]}")
    return ComponentReport(title, tuple(check_tensors(tensors)), tuple(problems))


def run_once(repo: Repo, place: Path, variant: str | None) -> str:
    """Load a repository as its users do, in float32, and run it.

    Returns:
        The name of the class of what was loaded.

    Raises:
        ConversionError: it does not load, or does not give finite results.
    """
    import torch

    try:
        loaded = repo.load(place, variant)
        results = repo.smoke(loaded)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ConversionError(f"{repo.name} can be read, but does not run: {error!r}") from error
    if not all(bool(torch.as_tensor(result).isfinite().all()) for result in results):
        raise ConversionError(f"{repo.name} can be read, but its results are not finite.")
    return type(loaded).__name__
