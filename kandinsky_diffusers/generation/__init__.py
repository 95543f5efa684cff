"""Many pictures in one go: prompts from a file, any repository, any task; resumable, and shared out over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub import resolve_revision
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionResolutionError

from ..inputs import check_choice
from .drawing import OFFLOADS, Artist, Batch, batches_of
from .folder import Run, RunFolder
from .jobs import GenerationError, Job, Settings, numbered, read_jobs


__all__ = ["GenerationError", "Job", "Report", "Settings", "generate", "read_jobs"]

Progress = Callable[..., Any]


class Report(NamedTuple):
    """What a run has come to, as this process knows it.

    Args:
        drawn: pictures that this process has drawn.
        there: pictures that are there now.
        pictures: of the run.
        manifest: the file with a line for each picture; None as long as other processes draw.
        is_main_process: whether this is the process that should speak.
    """

    drawn: int
    there: int
    pictures: int
    manifest: Path | None
    is_main_process: bool


def generate(
    jobs: Sequence[Job],
    settings: Settings,
    output: str | Path,
    *,
    seed: int = 0,
    images_per_prompt: int = 1,
    device: str | torch.device | None = None,
    offload: str = "none",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Draw a picture for each job into a folder, with the parameters in its metadata and in a manifest.

    A run that was ended, even by SIGKILL, is finished by the same call: what is there stays, the rest is drawn. Under
    `accelerate launch` or `torchrun` batches are shared out over the processes, also of several machines with a common
    folder. Which pictures are drawn together depends on the jobs alone, so that the files are the same whatever the
    number of processes (of one kind of device), and wherever a run was ended.

    Args:
        jobs: of any tasks; pictures are numbered in their order, from 0.
        settings: what they have in common.
        output: the folder: new, empty, or of the same run.
        seed: of pictures whose jobs have none, see [`numbered`].
        images_per_prompt: pictures for each job.
        device: where to draw; None is the accelerator of this process, or the CPU.
        offload: `"none"`; or `"model"` or `"sequential"`, as the pipelines' `enable_..._cpu_offload`.
        overwrite: whether the pictures of another run in `output` may be replaced; other files never are.
        progress: makes a progress bar over pictures, in the main process; called with tqdm's arguments.

    Raises:
        GenerationError, TypeError, ValueError: something is not as described, or a pipeline does not take it. Nothing
            is drawn.
        FileExistsError: `output` has something else.
        OSError: a repository cannot be loaded, or a picture not written.
    """
    if not jobs:
        raise GenerationError("`jobs` is empty; at least one is needed.")
    check_choice("offload", offload, tuple(OFFLOADS))
    process = _process(device)
    device = torch.device(device or process.device or "cpu")
    if device.type == "cpu" and offload == "sequential":
        raise GenerationError(
            "`offload` is 'sequential', and pictures are drawn on the CPU; accepted is 'none' or 'model'."
        )
    run = Run(numbered(jobs, seed, images_per_prompt), _settings_on(device, settings))
    folder = RunFolder(Path(output), run)
    folder.check(overwrite)
    with process.main_process_first():
        if process.is_main_process:
            folder.prepare(None if folder.is_mine else _commit_of(settings))

    drawn = _draw(folder, process, device, offload, progress)
    there, pictures = sum(map(folder.has, range(len(run.jobs)))), len(run.jobs)
    if there == pictures and (drawn or not folder.manifest.is_file()):
        folder.write_manifest()
    manifest = folder.manifest if there == pictures else None
    return Report(drawn, there, pictures, manifest, process.is_main_process)


def _settings_on(device: torch.device, settings: Settings) -> Settings:
    """With what the device decides on, so that records say it."""
    if device.type == "cpu":
        return replace(settings, dtype=settings.dtype or "float32", threads=settings.threads or 1)
    return replace(settings, dtype=settings.dtype or "float16", threads=None)


def _process(device: str | torch.device | None) -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` has started, or alone."""
    is_cpu = device is not None and torch.device(device).type == "cpu"
    # without being told that it is the CPU, accelerate would take each of several processes to be alone
    return PartialState(is_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def _commit_of(settings: Settings) -> str | None:
    """The commit of a repository of the Hub, so that all of a run is drawn with the same."""
    if Path(settings.repo).is_dir():
        return None
    try:
        return resolve_revision(settings.repo, revision=settings.revision).resolved
    except (HfHubHTTPError, HFValidationError, RevisionResolutionError) as error:
        raise FileNotFoundError(f"{settings.repo!r} is no folder, and the Hub does not give it: {error}") from error


def _draw(
    folder: RunFolder, process: PartialState, device: torch.device, offload: str, progress: Progress | None
) -> int:
    """Draw what is missing of this process's share, batch by batch; returns the number of new pictures."""
    run = folder.run
    batches = batches_of(run.jobs, run.settings.batch_size)
    # of all batches, not of those that are missing: each process looks at another moment
    share = batches[process.process_index :: process.num_processes]
    missing = [batch for batch in share if not all(map(folder.has, batch.numbers))]
    if not missing:
        return 0
    settings = replace(run.settings, revision=folder.commit or run.settings.revision)
    drawn = 0
    with _threads(settings.threads):
        artist = Artist(run.jobs, settings, device, offload)
        artist.check(batches)
        for batch in _counted(missing, progress if process.is_main_process else None):
            pictures = artist.draw(batch)
            drawn += sum([folder.save(number, *each) for number, each in zip(batch.numbers, pictures, strict=True)])
    return drawn


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _counted(batches: Sequence[Batch], progress: Progress | None) -> Iterator[Batch]:
    """The same, before a bar that counts their pictures."""
    bar = progress(total=sum(len(batch.numbers) for batch in batches), desc="drawing") if progress else None
    for batch in batches:
        yield batch
        if bar is not None:
            bar.update(len(batch.numbers))
    if bar is not None:
        bar.close()
