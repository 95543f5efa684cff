"""From jobs to pictures: which are drawn together, by which pipeline, with which arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from PIL import Image

from .. import __version__
from ..k3 import Kandinsky3ControlNetModel
from ..options import complete_arguments
from ..pipeline_base import KandinskyPipelineMixin
from .jobs import FILES, KEYS, OF_PIPELINES, GenerationError, Job, Settings, open_picture


AUTO_PIPELINES: dict[str, Any] = {
    "text2image": AutoPipelineForText2Image,
    "image2image": AutoPipelineForImage2Image,
    "inpainting": AutoPipelineForInpainting,
}
OFFLOADS: dict[str, Callable[[Any, torch.device], Any]] = {
    "none": lambda pipeline, device: pipeline.to(device),
    "model": lambda pipeline, device: pipeline.enable_model_cpu_offload(device=device),
    "sequential": lambda pipeline, device: pipeline.enable_sequential_cpu_offload(device=device),
}
NEEDED = ("prompt", "hint")  # by every pipeline that takes it
MOST_PROBLEMS = 10
VERSIONS = {"kandinsky_diffusers": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}


class Kind(NamedTuple):
    """Which pipeline a job needs."""

    task: str
    is_hinted: bool


class Batch(NamedTuple):
    """The numbers of pictures that are drawn together."""

    kind: Kind
    numbers: Sequence[int]


def kind_of(job: Job) -> Kind:
    """Told by what the job gives."""
    return Kind(job.task, job.hint is not None)


def batches_of(jobs: Sequence[Job], size: int) -> list[Batch]:
    """All jobs in batches of pictures that one call can draw: of one kind and one size, in the order of their numbers.

    Nothing but the jobs and the size decides, so that whoever draws a batch, and when, its pictures are the same.
    Batches of a kind follow each other, and each pipeline has its turn once.

    Args:
        jobs: one for each picture.
        size: the most pictures in a batch.
    """
    groups: dict[Any, list[int]] = {}
    for number, job in enumerate(jobs):
        size_decides = job.size or tuple(each.size for each in job.inputs.values())
        alike = size_decides, job.prompt is None, job.negative is None
        groups.setdefault((kind_of(job), alike), []).append(number)
    kinds = list(dict.fromkeys(kind for kind, _ in groups))
    return [
        Batch(kind, numbers[start : start + size])
        for (kind, _), numbers in sorted(groups.items(), key=lambda group: kinds.index(group[0][0]))
        for start in range(0, len(numbers), size)
    ]


class Artist:
    """The pipelines for the jobs of a run, all with the same components: weights are loaded once.

    Args:
        jobs: one for each picture.
        settings: of the run.
        device: where to draw.
        offload: one of `OFFLOADS`.

    Raises:
        GenerationError: the repository has no pipeline for a task, or a ControlNet is given that no job has a use for.
        OSError: something cannot be loaded.
    """

    def __init__(self, jobs: Sequence[Job], settings: Settings, device: torch.device, offload: str) -> None:
        self._jobs = jobs
        self._settings = settings
        self._device = device
        self._offload = offload
        self._pipelines = _load_pipelines(list(dict.fromkeys(map(kind_of, jobs))), settings)
        self._at_work: Any = None

    def check(self, batches: Sequence[Batch]) -> None:
        """See that the pipelines take what jobs and settings give, before anything is drawn.

        Each pipeline also plans its first call, as far as it can without running a model.

        Raises:
            GenerationError: they do not, or need more; every such thing is named, of many the first ones.
        """
        _check_names(self._pipelines, self._jobs, self._settings)
        for kind, pipeline in self._pipelines.items():
            batch = next(batch for batch in batches if batch.kind == kind)
            with _naming(batch):
                _checked(pipeline, self._arguments_for(pipeline, batch))

    def draw(self, batch: Batch) -> list[tuple[Image.Image, dict[str, Any]]]:
        """The pictures of a batch, each with its parameters.

        Each has a generator of its own, on the CPU, so that neither batch nor device decide on its noise.

        Returns:
            Pictures and records: `Job(**record["job"])` and `Settings(**record["settings"])` make the picture again.

        Raises:
            GenerationError: a pipeline does not take what a job gives.
        """
        pipeline = self._prepared(self._pipelines[batch.kind])
        jobs = [self._jobs[number] for number in batch.numbers]
        generators = [torch.Generator("cpu").manual_seed(job.seed or 0) for job in jobs]
        arguments = self._arguments_for(pipeline, batch)
        with _naming(batch):
            used = _checked(pipeline, arguments)
            images = pipeline(**arguments, generator=generators, output_type="pil").images
        return [(image, _record_of(job, self._settings, used)) for image, job in zip(images, jobs, strict=True)]

    def _prepared(self, pipeline: Any) -> Any:
        """The pipeline, with its models where they have to be; those of the one before may be the same."""
        if pipeline is not self._at_work:
            if self._at_work is not None:
                self._at_work.remove_all_hooks()
            OFFLOADS[self._offload](pipeline, self._device)
            self._at_work = pipeline
        return pipeline

    def _arguments_for(self, pipeline: Any, batch: Batch) -> dict[str, Any]:
        jobs, accepted = [self._jobs[number] for number in batch.numbers], _parameters_of(pipeline)
        arguments = {name: value for name, value in self._settings.of_pipelines().items() if name in accepted}
        for key in ("prompt", "negative", *FILES):
            values = [getattr(job, key) for job in jobs]
            if values[0] is None:
                continue
            if key in FILES:
                values = [open_picture(path) for path in values]
            is_alone = key in FILES and len(values) == 1  # some options are for single pictures
            arguments[_argument_of(key, accepted)] = values[0] if is_alone else values
        if (pixels := jobs[0].pixels) is not None:
            arguments["width"], arguments["height"] = pixels
        return arguments


def _load_pipelines(kinds: Sequence[Kind], settings: Settings) -> dict[Kind, Any]:
    if settings.controlnet is not None and not any(kind.is_hinted for kind in kinds):
        raise GenerationError("`controlnet` is given, and no job has a `hint` for it.")
    dtype = getattr(torch, settings.dtype or "float32")
    options = {"revision": settings.revision, "variant": settings.variant, "dtype": dtype}
    first = _for_task(kinds[0].task, "from_pretrained", settings.repo, **options)
    controls: dict[str, Any] = {}
    if settings.controlnet is not None:
        controls["controlnet"] = Kandinsky3ControlNetModel.from_pretrained(settings.controlnet, dtype=dtype)
    pipelines = {}
    for kind in kinds:
        added = controls if kind.is_hinted else {}
        is_first = kind.task == kinds[0].task and not added
        pipelines[kind] = first if is_first else _for_task(kind.task, "from_pipe", first, **added)
        pipelines[kind].set_progress_bar_config(disable=True)
    return pipelines


def _for_task(task: str, method: str, source: Any, **options: Any) -> Any:
    try:
        return getattr(AUTO_PIPELINES[task], method)(source, **options)
    except ValueError as error:
        name = source if isinstance(source, str) else type(source).__name__
        raise GenerationError(f"{name} cannot be used for {task}, which a job needs: {error}") from error


def _checked(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with all defaults, checked as far as a pipeline that is not ours lets us."""
    if isinstance(pipeline, KandinskyPipelineMixin):
        return pipeline.check_call(**arguments)
    return complete_arguments(pipeline, arguments)


def _check_names(pipelines: Mapping[Kind, Any], jobs: Sequence[Job], settings: Settings) -> None:
    accepted = {kind: _parameters_of(pipeline) for kind, pipeline in pipelines.items()}
    names = {kind: type(pipeline).__name__ for kind, pipeline in pipelines.items()}
    problems = [
        f"`{argument}` is given, and is none of the arguments of {' or '.join(names.values())}"
        for argument in settings.of_pipelines()
        if not any(argument in parameters for parameters in accepted.values())
    ]
    for number, job in enumerate(jobs):
        kind = kind_of(job)
        problems += [f"picture {number}: {found} {names[kind]}" for found in _misfits(job, accepted[kind])]
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
    if problems:
        raise GenerationError("\n".join(("Nothing was drawn:", *(f"  {problem}" for problem in problems))))


def _misfits(job: Job, accepted: Sequence[str]) -> Iterator[str]:
    for key in KEYS:
        is_given, is_taken = getattr(job, key) is not None, key == "seed" or _argument_of(key, accepted) in accepted
        if is_given and not is_taken:
            yield f"`{key}` is given, and is none of the arguments of"
        if key in NEEDED and is_taken and not is_given:
            yield f"`{key}` is missing, and is needed by"


def _argument_of(key: str, accepted: Sequence[str]) -> str:
    """The name that a job's key has among the arguments of a pipeline."""
    hint = "hint" if "hint" in accepted else "control_image"
    return {"negative": "negative_prompt", "size": "height", "mask": "mask_image", "hint": hint}.get(key, key)


def _parameters_of(pipeline: Any) -> Sequence[str]:
    return list(inspect.signature(type(pipeline).__call__).parameters)


@contextmanager
def _naming(batch: Batch) -> Iterator[None]:
    """What a pipeline says of its arguments becomes an error that says of which pictures."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise GenerationError(f"picture {', '.join(map(str, batch.numbers))}: {error}") from error


def _record_of(job: Job, settings: Settings, used: Mapping[str, Any]) -> dict[str, Any]:
    """All that makes a picture again, defaults included."""
    size = f"{used['width']}x{used['height']}" if used.get("height") and used.get("width") else None
    own: dict[str, Any] = {name: used.get(argument) for name, argument in OF_PIPELINES.items()}
    own |= {"arguments": {name: value for name, value in settings.arguments.items() if name in used}}
    own |= {"controlnet": settings.controlnet if job.hint is not None else None}
    record = {
        "job": replace(job, size=size).record(),
        "settings": replace(settings, **own).record(),
        "versions": VERSIONS,
    }
    inputs = {key: each.sha256 for key, each in job.inputs.items()}
    return {**record, "inputs": inputs} if inputs else record
