"""The conversion of a release, from the files to repositories."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .planning import plan_models
from .reader import file_sha256
from .recipe import FilesComponent, Inputs, ModelComponent, Release, Repo
from .record import Record, SourceRecord, write_card
from .repository import Output, Progress, RepoWriter
from .sources import (
    choose_release,
    choose_repos,
    find_companion,
    find_folder,
    leave_out_absent,
    open_files,
    read_config,
)
from .staging import Staging, check_free, check_space
from .torch_file import check_zip
from .writer import parse_size


# a model that a release needs and does not contain: where it is published
COMPANIONS = {
    "clip": "openai/clip-vit-large-patch14",
    "text_encoder": "google/flan-ul2",
    "refiner": "ai-forever/Kandinsky3.1",
}
_MARGIN = 50 * 10**6  # bytes for configurations, tokenizers and cards


@dataclass
class Report:
    """What a conversion did.

    Args:
        repos: the folders written.
        skipped: name of each repository that was left out, or of parts of one, and why.
        dropped: source file, key and reason of all tensors that were left out.
        verified: per repository what ``verify`` found; empty without it.
    """

    repos: list[Path] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    dropped: list[tuple[str, str, str]] = field(default_factory=list)
    verified: dict[str, Any] = field(default_factory=dict)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    version: str = "auto",
    dtype: str = "auto",
    variant: str | None = None,
    max_shard_size: str | int = "5GB",
    original_config: str | Path | Mapping[str, Any] | None = None,
    clip: str | Path = COMPANIONS["clip"],
    text_encoder: str | Path = COMPANIONS["text_encoder"],
    refiner: str | Path | None = COMPANIONS["refiner"],
    drop: Sequence[str] = (),
    layout: str = "split",
    link_shared: bool = False,
    overwrite: bool = False,
    trust_remote_code_stub: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert an original release to repositories in the Hub's format.

    Nothing appears in ``output`` before all repositories are complete.

    Args:
        source: folder with the files as they were published, or the id of a Hub repository.
        output: folder that gets one folder per repository.
        version: ``auto``, or the version that ``source`` is.
        dtype: ``auto`` keeps every tensor's own; ``float32``, ``float16`` and ``bfloat16`` cast.
        variant: ``fp16`` or ``bf16``: casts (MoVQ keeps its own dtype) and names the files accordingly.
        max_shard_size: size of a weight file, such as ``5GB``.
        original_config: the original's configuration, as JSON file or read, for what shapes cannot tell.
        clip: folder or Hub id of the ``CLIPModel`` that 2.1 needs.
        text_encoder: folder or Hub id of the T5 whose encoder 3.0 needs.
        refiner: folder or Hub id of the Kandinsky 3.1 release whose Flash model refines the pictures of KandiSuperRes
            Flash; None leaves it out.
        drop: glob patterns of keys to leave out.
        layout: ``split`` writes one repository for the prior and one for each decoder; ``combined`` puts the prior
            into each decoder's, which then needs no other.
        link_shared: whether files that several repositories share are hard links, and take space once.
        overwrite: whether to replace repositories that are there.
        trust_remote_code_stub: whether repositories with a pipeline get a ``pipeline.py``, so that
            ``DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)`` gives our
            pipeline where this package is installed, but has not been imported.
        verify: whether to read everything back, compare it with the source, and run each repository once.
        progress: makes progress bars; called with tqdm's arguments, ``tqdm.tqdm`` itself for example.

    Raises:
        ConversionError: anything is wrong; ``output`` is then as it was.
    """
    output = Path(output)
    options = Output(dtype, variant, parse_size(max_shard_size), progress, link_shared, trust_remote_code_stub)
    config = read_config(original_config)
    folder = find_folder(source, "source")
    release = choose_release(folder, version, layout)
    folders = dict(release.roots(folder))
    companions = {"clip": clip, "text_encoder": text_encoder} | ({} if refiner is None else {"refiner": refiner})
    repos, skipped = choose_repos(release, folders)
    repos, parts_skipped = leave_out_absent(repos, release, folders, companions)
    check_free(output, [repo.name for repo in repos], overwrite, folders.values())
    inputs = _open(release, repos, folders, companions, config)
    plans = {plan.component: plan for plan in plan_models(_models(repos), inputs, drop)}
    try:
        with Staging(output) as staging, _Hashes(inputs) as hashes:
            writer = RepoWriter(staging.folder, inputs, plans, options)
            check_space(output, writer.size(repos) + _MARGIN)
            written = {repo: writer.write(repo) for repo in repos}
            checks = _verify(written, writer) if verify else {}
            record = Record.of(release, inputs, plans, options, hashes.result())
            for repo, place in written.items():
                write_card(place, repo, record, checks.get(repo.name))
            staging.commit()
            return Report([output / repo.name for repo in repos], skipped | parts_skipped, record.dropped, checks)
    except OSError as error:
        raise ConversionError(_disk_message(error)) from error


def _open(
    release: Release,
    repos: Sequence[Repo],
    folders: dict[str, Path],
    companions: Mapping[str, str | Path],
    config: Mapping[str, Any],
) -> Inputs:
    names = list(dict.fromkeys(part.file for model in _models(repos) for part in model.parts))
    for root in ({release.file(name).root for name in names} & companions.keys()) - folders.keys():
        wanted = [path for file in release.files if file.root == root for path in file.paths]
        folders[root] = find_companion(companions[root], root, wanted)
    inputs = Inputs(folders, open_files(release, names, folders), config)
    for component in dict.fromkeys(c for repo in repos for c in repo.components if isinstance(c, FilesComponent)):
        component.check(inputs)
    return inputs


def _models(repos: Sequence[Repo]) -> list[ModelComponent]:
    return list(dict.fromkeys(model for repo in repos for model in repo.models))


def _verify(written: Mapping[Repo, Path], writer: RepoWriter) -> dict[str, Any]:
    from .verification import verify_repo

    return {repo.name: verify_repo(repo, place, writer) for repo, place in written.items()}


class _Hashes:
    """SHA-256 of all files, computed beside the conversion; damage is found on the way."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def __enter__(self) -> _Hashes:
        self._pool = ThreadPoolExecutor(max_workers=1)
        paths = dict.fromkeys(path for file in self._inputs.files.values() for path in file.paths)
        self._futures: dict[Path, Future[str]] = {path: self._pool.submit(_checked_sha256, path) for path in paths}
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def result(self) -> dict[str, list[SourceRecord]]:
        return {
            name: [SourceRecord(path, self._futures[path].result()) for path in file.paths]
            for name, file in self._inputs.files.items()
        }


def _checked_sha256(path: Path) -> str:
    check_zip(path)
    return file_sha256(path)


def _disk_message(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full ({error.strerror}). Everything that was written has been removed again."
    return f"Reading or writing failed: {error}. Nothing was left behind."
