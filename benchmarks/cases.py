"""What can be measured: subjects, their cases, and the ways to do the same work."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .models import build


STOCK, COMPILED, OURS, OPTIMIZED = "stock", "stock compiled", "ours", "ours optimized"
CANDIDATES = (STOCK, COMPILED, OURS, OPTIMIZED)
ON_CPU = (STOCK, OURS)  # unless others are asked for: compiling takes long there


class Outcome(NamedTuple):
    """What a run made.

    Args:
        output: of which differences are taken.
        step_seconds: the mean time from the end of one step to that of the next, for what has steps.
    """

    output: torch.Tensor
    step_seconds: float | None = None


Run = Callable[[int | None], Outcome]  # of so many steps; None for what has none


@dataclass(frozen=True)
class Case:
    """A subject at one size, batch, dtype and device.

    Args:
        subject: its name.
        size: side of the picture in pixels; 0 where there is none.
        batch: pictures at once.
        dtype: of weights and activations.
        device: `"cpu"` or `"cuda"`.
        tiny: whether tiny models stand for the published ones.
        counted: whether nothing runs, and memory and operations are counted on shapes alone.
    """

    subject: str
    size: int
    batch: int
    dtype: str
    device: str
    tiny: bool = False
    counted: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as PyTorch has it."""
        return getattr(torch, self.dtype)

    @property
    def like(self) -> dict[str, Any]:
        """Device and dtype of inputs."""
        return {"device": self.device, "dtype": self.torch_dtype}

    def model(self, name: str) -> Any:
        """A model of `models.MODELS`."""
        return build(name, self.device, self.torch_dtype, self.tiny)

    def stand_in(self, name: str) -> Any:
        """A tiny model for where a pipeline wants one that does not run."""
        return build(name, self.device, self.torch_dtype, tiny=True)

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, the same at each call and in each dtype."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(**self.like)

    def generator(self) -> torch.Generator:
        """A generator on the device, at its start."""
        return torch.Generator(self.device).manual_seed(0)

    @property
    def command(self) -> str:
        """What measures this case."""
        options = f"--sizes {self.size} --batches {self.batch} --dtypes {self.dtype}"
        return f"python -m benchmarks --device {self.device} --only {self.subject} {options}"


@dataclass(frozen=True)
class Workload:
    """Work that can be done in several ways, each of which is made ready by a function.

    Args:
        ways: what makes each candidate ready.
        reference: the candidate that others are compared with.
        comparable: whether all of them compute the same.
        note: what a reader of the figures has to know.
        fewest_steps: that the sampler can make.
        copied: the models that the optimized candidate has copies of, which are not counted as memory that it takes.
    """

    ways: Mapping[str, Callable[[], Run]]
    reference: str = STOCK
    comparable: bool = True
    note: str = ""
    fewest_steps: int = 1
    copied: Sequence[Any] = ()


@dataclass(frozen=True)
class Subject:
    """Something to measure.

    Args:
        name: as in `--only`.
        title: for people.
        measure: rows for a case, of subject, case and `runner.Plan`.
        steps: of the sampler, on each device; None where there are none.
        per_step: whether the time of a step counts, and not that of the whole.
        sizes: by device.
        batches: by device.
        dtypes: by device.
        candidates: all there are.
        on_cpu: those that are measured on the CPU unless others are asked for.
        counted_sizes: on the CPU, sizes at which memory and operations are counted and no time is taken.
        reduced: what is less than on an accelerator when the CPU runs it.
        when_named: whether it is measured only where `--only` names it, because it needs much disk.
    """

    name: str
    title: str
    measure: Callable[..., list[dict[str, Any]]]
    steps: Mapping[str, int] | None = None
    per_step: bool = False
    sizes: Mapping[str, Sequence[int]] = field(default_factory=lambda: {"cpu": (512,), "cuda": (512, 768, 1024)})
    batches: Mapping[str, Sequence[int]] = field(default_factory=lambda: {"cpu": (1,), "cuda": (1, 4)})
    dtypes: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {"cpu": ("float32",), "cuda": ("float16", "bfloat16")}
    )
    candidates: Sequence[str] = CANDIDATES
    on_cpu: Sequence[str] = ON_CPU
    counted_sizes: Sequence[int] = ()
    reduced: str = ""
    when_named: bool = False

    def usual(self, device: str) -> Sequence[str]:
        """The candidates that are measured where none are named."""
        return [name for name in self.candidates if device != "cpu" or name in self.on_cpu]

    def cases(self, device: str, chosen: Mapping[str, Sequence[Any]], tiny: bool = False) -> Iterator[Case]:
        """The cases on a device; `chosen` may say other `sizes`, `batches` and `dtypes` than there are by default."""
        if device not in self.sizes:
            return
        has_sizes = any(self.sizes[device])
        counted = () if chosen.get("sizes") or device != "cpu" else self.counted_sizes
        sizes = (*(chosen.get("sizes") or self.sizes[device]), *counted)
        batches, dtypes = (chosen.get(name) or getattr(self, name)[device] for name in ("batches", "dtypes"))
        for dtype, batch, size in itertools.product(dtypes, batches, sizes if has_sizes else (0,)):
            yield Case(self.name, int(size), int(batch), dtype, device, tiny, size in counted)
