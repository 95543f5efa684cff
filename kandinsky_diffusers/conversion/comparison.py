"""Comparing models tensor by tensor: of each side there is one tensor in memory, or what one rule takes, at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import inf, isfinite
from typing import TYPE_CHECKING

from .matching import Shape, Shapes, Step
from .pieces import is_finite, largest_difference, same_bits
from .planning import ModelPlan
from .recipe import Inputs
from .repository import run_step, source_of
from .tensors import Facts, Tensors


if TYPE_CHECKING:
    import torch


class Outcome(StrEnum):
    """What came out for a tensor."""

    SOUND = "sound"  # where nothing is compared: it can be read, and its numbers are finite
    NOT_FINITE = "not finite"
    EQUAL = "equal"
    EQUAL_AFTER_CAST = "equal after cast"
    DIFFERENT = "different"
    OTHER_SHAPE = "of another shape"
    MISSING = "missing"
    EXTRA = "extra"


GOOD = (Outcome.SOUND, Outcome.EQUAL, Outcome.EQUAL_AFTER_CAST)


@dataclass(frozen=True)
class TensorReport:
    """What came out for one tensor.

    Args:
        key: its name; where an original checkpoint is compared with, the name that the tensor has there.
        outcome: in a word.
        shapes: here, and in the other model; None where it is missing.
        dtypes: likewise, such as ``float16``.
        absolute: the largest absolute difference, if it is different.
        relative: this, divided by the largest absolute value of the two.
    """

    key: str
    outcome: Outcome
    shapes: tuple[Shape | None, Shape | None]
    dtypes: tuple[str | None, str | None]
    absolute: float | None = None
    relative: float | None = None


@dataclass(frozen=True)
class ComponentReport:
    """What came out for a model.

    Args:
        name: its folder in the repository, or what stands for it.
        tensors: what came out for each of its tensors.
        problems: what is wrong with it as a whole.
        notes: what could not be compared, and why.
    """

    name: str
    tensors: tuple[TensorReport, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.problems and not self.failures

    @property
    def failures(self) -> list[TensorReport]:
        """The tensors with which something is wrong."""
        return [tensor for tensor in self.tensors if tensor.outcome not in GOOD]

    @property
    def largest(self) -> TensorReport | None:
        """The tensor with the largest relative difference; one that is not finite is larger than any other."""
        different = [(tensor.relative, tensor) for tensor in self.tensors if tensor.relative is not None]
        return max(different, key=lambda pair: pair[0] if isfinite(pair[0]) else inf, default=(0.0, None))[1]

    @property
    def outcomes(self) -> dict[str, int]:
        """How many tensors came out how, such as ``{"equal": 12}``."""
        return dict(Counter(str(tensor.outcome) for tensor in self.tensors))


def check_tensors(tensors: Tensors) -> Iterator[TensorReport]:
    """Read every tensor, and see whether its numbers are finite.

    Raises:
        ConversionError: one cannot be read.
    """
    for key, shape in tensors.shapes.items():
        outcome = Outcome.SOUND if is_finite(tensors.tensor(key)) else Outcome.NOT_FINITE
        yield TensorReport(key, outcome, (shape, None), (tensors.dtypes[key], None))


def compare_models(ours: Tensors, theirs: Tensors) -> Iterator[TensorReport]:
    """Compare the tensors of two models by their names.

    Two tensors are equal if dtype and all bits are (so NaN equals itself, and -0.0 does not equal 0.0), and equal
    after a cast if their dtypes differ and one of them is, bit for bit, what casting the other gives.

    Raises:
        ConversionError: a tensor cannot be read.
    """
    for key in dict.fromkeys((*ours.shapes, *theirs.shapes)):
        fault = _fault(key, ours.facts(key), theirs.facts(key))
        yield fault or _by_bits(key, ours.tensor(key), theirs.tensor(key), either_way=True)


def compare_with_source(plan: ModelPlan, written: Tensors, inputs: Inputs) -> Iterator[TensorReport]:
    """Map the tensors of a written model back with the inverse rules, and compare them with those it was made from.

    Equal means the same as in :func:`compare_models`; but after a cast only if the cast goes the way that a conversion
    goes, from the original to what is written. What the rules drop on purpose is not compared; what they fill with a
    constant is compared with it.

    Raises:
        ConversionError: a tensor cannot be read.
    """
    source, made = source_of(plan, inputs), plan.plan.target_shapes
    restored = set()
    for step in plan.plan.inverse.steps:
        restored.update(step.targets)
        yield from _compare_step(step, made, written, source)
    for step in plan.plan.steps:
        if step.constant is not None:
            yield _compare_constant(step, written, source)
    for key in source.shapes.keys() - restored - plan.plan.dropped.keys() - set(plan.plan.elsewhere):
        yield TensorReport(key, Outcome.MISSING, (None, source.shapes[key]), (None, source.dtypes[key]))
    if len(plan.files) == len(plan.component.parts):
        for key in written.shapes.keys() - made.keys():
            yield TensorReport(key, Outcome.EXTRA, (written.shapes[key], None), (written.dtypes[key], None))


def _compare_step(step: Step, made: Shapes, written: Tensors, source: Tensors) -> Iterator[TensorReport]:
    for key in step.sources:
        if written.shapes.get(key) != made[key]:
            faults = (
                _fault(target, written.facts(key), (made[key], source.dtypes[target])) for target in step.targets
            )
            yield from filter(None, faults)
            return
    for target, tensor in zip(step.targets, run_step(step, written), strict=True):
        yield _by_bits(target, tensor, source.tensor(target), either_way=False)


def _compare_constant(step: Step, written: Tensors, source: Tensors) -> TensorReport:
    (key,), (expected,) = step.targets, run_step(step, source)
    fault = _fault(key, written.facts(key), (tuple(expected.shape), _name(expected.dtype)))
    return fault or _by_bits(key, written.tensor(key), expected, either_way=False)


def _fault(key: str, ours: Facts, theirs: Facts) -> TensorReport | None:
    """A report if the shapes are not the same, or one is missing."""
    (shape, dtype), (other, other_dtype) = ours, theirs
    if shape == other:
        return None
    outcome = Outcome.MISSING if shape is None else Outcome.EXTRA if other is None else Outcome.OTHER_SHAPE
    return TensorReport(key, outcome, (shape, other), (dtype, other_dtype))


def _by_bits(key: str, ours: torch.Tensor, theirs: torch.Tensor, *, either_way: bool) -> TensorReport:
    shapes, dtypes = (tuple(ours.shape), tuple(theirs.shape)), (_name(ours.dtype), _name(theirs.dtype))
    casts = dict.fromkeys((ours.dtype, theirs.dtype) if either_way else (ours.dtype,))
    if any(same_bits(ours, theirs, dtype) for dtype in casts):
        outcome = Outcome.EQUAL if ours.dtype == theirs.dtype else Outcome.EQUAL_AFTER_CAST
        return TensorReport(key, outcome, shapes, dtypes)
    return TensorReport(key, Outcome.DIFFERENT, shapes, dtypes, *largest_difference(ours, theirs))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
