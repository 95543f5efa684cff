"""Comparing models tensor by tensor: of each side there is one tensor in memory, or what one rule takes, at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .matching import Shapes, Step
from .pieces import is_finite, largest_difference, same_bits
from .planning import ModelPlan
from .recipe import Inputs
from .reports import Outcome, TensorReport
from .repository import run_step, source_of
from .tensors import Facts, Tensors


if TYPE_CHECKING:
    import torch


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
    for key in sorted(source.shapes.keys() - restored - plan.plan.dropped.keys() - set(plan.plan.elsewhere)):
        yield TensorReport(key, Outcome.MISSING, (None, source.shapes[key]), (None, source.dtypes[key]))
    if len(plan.files) == len(plan.component.parts):
        for key in sorted(written.shapes.keys() - made.keys()):
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
