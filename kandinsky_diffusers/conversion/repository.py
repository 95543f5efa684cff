"""Writing a repository: components, their weights as a stream, and the index."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

from .errors import ConversionError
from .matching import Step
from .planning import ModelPlan
from .recipe import ConfigComponent, FilesComponent, Inputs, ModelComponent, Repo, WeightsComponent
from .stub import write_stubs
from .tensors import Tensors
from .writer import WRITTEN_DTYPES, Entry, ShardedWriter, write_json


VARIANT_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
DTYPES = ("auto", "float32", "float16", "bfloat16")

_FLOATS = ("float64", "float32", "float16", "bfloat16")


class ProgressBar(Protocol):
    """What is used of a progress bar; a ``tqdm`` has it."""

    def update(self, n: int) -> Any:
        """``n`` bytes more are done."""
        ...

    def close(self) -> Any:
        """No more will come."""
        ...


Progress = Callable[..., ProgressBar]


@dataclass(frozen=True)
class Output:
    """How weights are written.

    Args:
        dtype: ``auto`` keeps the dtype of each tensor, another casts all floating-point tensors.
        variant: part of the file names, and the dtype that belongs to it (``fp16``, ``bf16``).
        max_shard_size: bytes per file.
        progress: makes a progress bar, with tqdm's arguments; None for none.
        link_shared: whether a model that several repositories have is hard-linked instead of copied.
        stub: whether a repository with a pipeline gets the modules of :mod:`.stub`.
    """

    dtype: str = "auto"
    variant: str | None = None
    max_shard_size: int = 5 * 10**9
    progress: Progress | None = None
    link_shared: bool = False
    stub: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConversionError(f"dtype is {self.dtype!r}; accepted are {', '.join(DTYPES)}.")
        if self.variant is not None and self.variant not in VARIANT_DTYPES:
            raise ConversionError(f"variant is {self.variant!r}; accepted are {', '.join(VARIANT_DTYPES)}.")
        if self.variant and self.dtype not in ("auto", VARIANT_DTYPES[self.variant]):
            raise ConversionError(f"variant {self.variant} means {VARIANT_DTYPES[self.variant]}, not {self.dtype}.")

    def cast(self, dtype: str, component: ModelComponent) -> str:
        """What becomes of a tensor's dtype; whole numbers stay."""
        if dtype not in _FLOATS:
            return dtype
        if self.variant is not None:
            return dtype if component.keep_float32 else VARIANT_DTYPES[self.variant]
        return dtype if self.dtype == "auto" else self.dtype

    def bar(self, total: int, text: str) -> ProgressBar:
        """A progress bar over ``total`` bytes."""
        if self.progress is None:
            return _Silent()
        return self.progress(total=total, desc=text, unit="B", unit_scale=True, unit_divisor=1000)


class _Silent:
    def update(self, n: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@dataclass
class RepoWriter:
    """Writes repositories below ``folder``; a model that several have is converted once and then copied or linked.

    Args:
        folder: where to.
        inputs: the release.
        plans: how each model is made.
        output: how it is written.
    """

    folder: Path
    inputs: Inputs
    plans: Mapping[ModelComponent, ModelPlan]
    output: Output
    _done: dict[ModelComponent, Path] = field(default_factory=dict)

    def write(self, repo: Repo) -> Path:
        """Write one repository, without its card.

        Raises:
            ConversionError: a tensor holds NaN or infinite values, or something is missing.
        """
        target = self.folder / repo.name
        target.mkdir()
        for component in (*repo.components, *repo.extras):
            place = target / component.name
            if isinstance(component, ModelComponent):
                self._write_model(component, place, repo)
            elif isinstance(component, ConfigComponent):
                component.write(place)
            elif isinstance(component, FilesComponent):
                component.write(self.inputs, place)
        if repo.pipeline is not None:
            write_json(target / "model_index.json", model_index(repo, self.inputs))
            if self.output.stub:
                classes = {component.name: component.entry(self.inputs) for component in repo.components}
                write_stubs(target, repo.name, repo.pipeline, classes)
        return target

    def size(self, repos: Iterable[Repo]) -> int:
        """Bytes that the weights of repositories need."""
        models = [model for repo in repos for model in repo.models]
        if self.output.link_shared:
            models = list(dict.fromkeys(models))
        return sum(entry.size for model in models for entry in self.entries(self.plans[model]))

    def entries(self, plan: ModelPlan) -> list[Entry]:
        """The tensors of a model, in the order in which they are made.

        Raises:
            ConversionError: one is made from something that cannot be written, such as complex numbers or a text.
        """
        dtypes = {key: dtype for name in plan.files for key, dtype in self.inputs.files[name].dtypes.items()}
        for step in plan.plan.steps:
            for key in step.sources:
                if dtypes[key] not in WRITTEN_DTYPES:
                    raise ConversionError(
                        f"{key} is of the kind {dtypes[key]}; accepted are {', '.join(WRITTEN_DTYPES)}."
                    )
        return [
            Entry(key, self.output.cast(dtypes[step.sources[0]] if step.sources else "float32", plan.component), shape)
            for step in plan.plan.steps
            for key, shape in zip(step.targets, step.shapes, strict=True)
        ]

    def _write_model(self, component: ModelComponent, place: Path, repo: Repo) -> None:
        plan = self.plans[component]
        place.mkdir(exist_ok=not component.name)
        entries, text = self.entries(plan), f"{repo.name}/{component.label}"
        twin = self._done.setdefault(component, place)
        if twin is not place:
            with closing(self.output.bar(folder_size(twin), text)) as bar:
                copy_folder(twin, place, bar.update, link=self.output.link_shared)
            return
        write_config(plan, entries, place)
        with closing(self.output.bar(sum(entry.size for entry in entries), text)) as bar:
            self._stream(plan, entries, place, bar.update)

    def _stream(self, plan: ModelPlan, entries: list[Entry], place: Path, advance: Callable[[int], None]) -> None:
        variant, limit = self.output.variant, self.output.max_shard_size
        if isinstance(plan.component, WeightsComponent):  # loaded by its name
            variant, limit = None, sum(entry.size for entry in entries)
        writer = ShardedWriter(place, weights_stem(plan), entries, limit, variant, advance)
        source = source_of(plan, self.inputs)
        with closing(writer):
            for step in plan.plan.steps:
                try:
                    for key, tensor in zip(step.targets, run_step(step, source), strict=True):
                        writer.write(key, tensor)
                except ConversionError as error:
                    files = " and ".join(self.inputs.label(name) for name in plan.files)
                    raise ConversionError(f"{', '.join(step.sources)} of {files}: {error}") from error
            writer.check_complete()


def source_of(plan: ModelPlan, inputs: Inputs) -> Tensors:
    """The tensors that a model is made from."""
    return Tensors(inputs.files[name] for name in plan.files)


def run_step(step: Step, source: Tensors) -> tuple[Any, ...]:
    """The tensors that a step makes."""
    import torch

    if step.constant is not None:
        return (torch.full(step.shapes[0], step.constant),)
    tensors = tuple(source.tensor(key) for key in step.sources)
    for transform in step.transforms:
        tensors = transform(tensors)
    return tensors


def weights_stem(plan: ModelPlan) -> str:
    """File name of the weights without ending: diffusers and transformers differ in it."""
    from transformers import PreTrainedModel

    if isinstance(plan.component, WeightsComponent):
        return plan.component.stem
    return "model" if isinstance(plan.model, PreTrainedModel) else "diffusion_pytorch_model"


def write_config(plan: ModelPlan, entries: list[Entry], place: Path) -> None:
    """Write ``config.json`` of a model."""
    from transformers import PreTrainedModel

    if plan.model is None:
        return
    if not isinstance(plan.model, PreTrainedModel):
        plan.model.save_config(place)
        return
    content = plan.model.config.to_diff_dict()
    own = {key: value for key, value in plan.config.items() if not hasattr(plan.model.config, key)}
    extra = {"architectures": [plan.component.class_name], "dtype": main_dtype(entries)}
    write_json(place / "config.json", {**content, **own, **extra})


def main_dtype(entries: list[Entry]) -> str:
    """The dtype of most of the numbers."""
    counts: Counter[str] = Counter()
    for entry in entries:
        counts[entry.dtype] += prod(entry.shape)
    return counts.most_common(1)[0][0]


def model_index(repo: Repo, inputs: Inputs) -> dict[str, Any]:
    """Content of ``model_index.json``."""
    import diffusers

    components = {c.name: c.entry(inputs) for c in sorted(repo.components, key=lambda c: c.name)}
    return {"_class_name": repo.pipeline, "_diffusers_version": diffusers.__version__, **components, **repo.settings}


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def copy_folder(source: Path, target: Path, advance: Callable[[int], None], link: bool = False) -> None:
    """Copy the files of a folder, and make sure that they are on the disk; or make hard links to them."""
    for path in sorted(source.iterdir()):
        if link:
            os.link(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
            with (target / path.name).open("rb") as file:
                os.fsync(file.fileno())
        advance(path.stat().st_size)
