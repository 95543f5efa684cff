"""What is to be drawn: one job for each picture, from a file or from the command line, and what all have in common."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from ..images import UNREADABLE
from ..inputs import check_choice, check_counts, check_strength


DTYPES = ("float32", "float16", "bfloat16")
FILES = ("image", "mask", "hint")
TEXTS = ("prompt", "negative")
OF_JOBS = ("prompt", "negative_prompt", "height", "width", "image", "mask_image", "hint", "control_image", "generator")
OF_RUNS = ("num_images_per_prompt", "output_type", "return_dict")
OF_PIPELINES = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale", "strength": "strength"}
MOST_SEEDS = 2**63


class GenerationError(ValueError):
    """Jobs, settings or the folder do not allow a run; the message says what to do about it."""


class Input(NamedTuple):
    """What a run knows of a picture that it is given."""

    size: tuple[int, int]
    sha256: str


@dataclass(frozen=True)
class Job:
    """One picture to draw; checked when it is made.

    Args:
        prompt: what to draw. Only what draws from a picture alone, as KandiSuperRes, does without.
        negative: what not to draw.
        seed: of the picture's noise, a whole number from 0 to 2**63 - 1; None leaves it to [`numbered`].
        size: `"WIDTHxHEIGHT"` in pixels; None leaves it to the pipeline.
        image: file of the picture to start from.
        mask: file with the mask of what is repainted in `image`: white.
        hint: file of the depth map, or of the ControlNet's picture.

    Raises:
        GenerationError: something is not as described; every such thing is named.
    """

    prompt: str | None = None
    negative: str | None = None
    seed: int | None = None
    size: str | None = None
    image: str | None = None
    mask: str | None = None
    hint: str | None = None

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise GenerationError("; ".join(problems))

    @property
    def task(self) -> str:
        """Which of diffusers' AutoPipelines is needed: `"text2image"`, `"image2image"` or `"inpainting"`."""
        return "inpainting" if self.mask is not None else "text2image" if self.image is None else "image2image"

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height, if they are asked for."""
        if self.size is None:
            return None
        width, height = map(int, self.size.split("x"))
        return width, height

    @property
    def inputs(self) -> dict[str, Input]:
        """What is known of the files, by their keys."""
        return {name: described(getattr(self, name)) for name in FILES if getattr(self, name) is not None}

    def record(self) -> dict[str, Any]:
        """What is given, as a line of a file has it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


KEYS = tuple(each.name for each in fields(Job))


@dataclass(frozen=True)
class Settings:
    """What all pictures of a run have in common; checked when it is made.

    Args:
        repo: folder or Hub id of what draws.
        revision: of a repository of the Hub: branch, tag or commit.
        variant: of the weight files, such as `"fp16"`.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`; None is float16 on an accelerator, float32 on the CPU.
        controlnet: folder or Hub id of a ControlNet for 3.x, which the jobs with a hint use.
        steps: `num_inference_steps` of the pipelines; None leaves it to them, as for the next two.
        guidance_scale: likewise.
        strength: likewise, for the tasks that take it.
        batch_size: how many pictures are drawn at once.
        threads: of each process that draws on the CPU; None is 1. Last bits of pictures depend on it, which is why
            the number of cores and processes does not decide.
        arguments: other arguments of the pipelines, by name, such as `prior_num_inference_steps`.

    Raises:
        TypeError, ValueError: something is not as described; it is named.
    """

    repo: str
    revision: str | None = None
    variant: str | None = None
    dtype: str | None = None
    controlnet: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    strength: float | None = None
    batch_size: int = 1
    threads: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("batch_size", "threads", "steps")}
        check_counts(**{name: count for name, count in counts.items() if count is not None})
        check_choice("dtype", self.dtype, (None, *DTYPES))
        if self.strength is not None:
            check_strength(self.strength)
        for name in self.arguments:
            if name in (*OF_JOBS, *OF_RUNS, *OF_PIPELINES.values()):
                raise GenerationError(
                    f"`arguments` has `{name}`, which a job, another setting or the run itself gives."
                )
        try:
            json.dumps(dict(self.arguments))
        except (TypeError, ValueError) as error:
            raise GenerationError(f"`arguments` has something that JSON has not: {error}") from error

    def of_pipelines(self) -> dict[str, Any]:
        """What is given of the arguments of pipelines, by their names there."""
        own = {argument: getattr(self, name) for name, argument in OF_PIPELINES.items()}
        return {name: value for name, value in own.items() if value is not None} | dict(self.arguments)

    def record(self) -> dict[str, Any]:
        """What is given, without what is left to others."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}


def read_jobs(path: str | Path, defaults: Mapping[str, Any] | None = None) -> list[Job]:
    """The jobs of a file with a JSON object in each line; paths in it are relative to the file.

    Args:
        path: of the file, in UTF-8. Empty lines are passed over.
        defaults: for keys that a line does not have, with paths relative to the current folder.

    Raises:
        GenerationError: lines are not as [`Job`] describes; one message names all of them, with the keys.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; a file with a JSON object in each line is expected.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise GenerationError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error
    jobs, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            jobs += [_job_of_line(line, path.parent, defaults or {})] if line.strip() else []
        except GenerationError as error:
            problems.append(f"  line {number}: {error}")
    if problems:
        raise GenerationError("\n".join((f"{path} has lines that are no jobs:", *problems)))
    if not jobs:
        raise GenerationError(f"{path} has no jobs; a JSON object in each line is expected.")
    return jobs


def numbered(jobs: Sequence[Job], seed: int = 0, images_per_prompt: int = 1) -> list[Job]:
    """One job for each picture, all with seeds.

    Args:
        jobs: in the order in which the pictures are numbered, from 0.
        seed: picture n has the seed `seed + n`, unless its job has one.
        images_per_prompt: pictures for each job; the seed that a job has is that of the first, the next follow it.

    Raises:
        TypeError, ValueError: a number is no such count, or a seed not from 0 to 2**63 - 1.
    """
    check_counts(images_per_prompt=images_per_prompt)
    pictures: list[Job] = []
    for job in jobs:
        start = seed + len(pictures) if job.seed is None else job.seed
        pictures += [replace(job, seed=start + index) for index in range(images_per_prompt)]
    return pictures


def open_picture(path: str | Path) -> Image.Image:
    """A picture, read to its end, and upright where its file says that it lies on its side."""
    image = Image.open(path)
    ImageOps.exif_transpose(image, in_place=True)
    return image


def described(path: str) -> Input:
    """Size and SHA-256 of a picture, which is read once to the end.

    Raises:
        OSError, ValueError and others of `images.UNREADABLE`: it is not there, or no whole picture.
    """
    stat = os.stat(path)
    return _described(path, stat.st_mtime_ns, stat.st_size)


@cache
def _described(path: str, *as_it_is: int) -> Input:
    with open_picture(path) as image:
        return Input(image.size, hashlib.sha256(Path(path).read_bytes()).hexdigest())


def _job_of_line(line: str, folder: Path, defaults: Mapping[str, Any]) -> Job:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GenerationError(f"no JSON: {error}") from error
    if not isinstance(values, dict):
        raise GenerationError(f"{short(values)} is no JSON object")
    if unknown := [short(key) for key in values if key not in KEYS]:
        raise GenerationError(f"unknown key {', '.join(unknown)}; accepted are {', '.join(KEYS)}")
    found = {name: str(folder / values[name]) for name in FILES if isinstance(values.get(name), str)}
    return Job(**{**defaults, **values, **found})


def _problems(job: Job) -> Iterator[str]:
    yield from (f"`{name}` {found}" for name in TEXTS if (found := _problem_of_text(getattr(job, name))))
    if job.seed is not None and (type(job.seed) is not int or not 0 <= job.seed < MOST_SEEDS):
        yield f"`seed` is {short(job.seed)}; accepted is a whole number from 0 to 2**63 - 1"
    if job.size is not None and (
        type(job.size) is not str or not re.fullmatch(r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}", job.size)
    ):
        yield f"`size` is {short(job.size)}; accepted is WIDTHxHEIGHT in pixels, such as 768x512"
    yield from (f"`{name}` {found}" for name in FILES if (found := _problem_of_file(getattr(job, name))))
    if job.mask is not None and job.image is None:
        yield "`mask` is given without `image`"
    if job.prompt is None and job.image is None:
        yield "`prompt` is missing"


def _problem_of_text(text: Any) -> str | None:
    if text is not None and not isinstance(text, str):
        return f"is {short(text)}; accepted is a text"
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return f"is {short(text)}, which is no Unicode text"
    return None


def _problem_of_file(path: Any) -> str | None:
    if path is None:
        return None
    if not isinstance(path, str):
        return f"is {short(path)}; accepted is the path of a picture"
    if not os.path.isfile(path):
        return f"is {path!r}, where there is no file"
    try:
        described(path)
    except UNREADABLE as error:
        return f"is {path!r}, which is no whole picture ({error})"
    return None
