"""What came out of a verification, for tensors, models and repositories."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from math import inf, isfinite
from typing import Any

from .matching import Shape


class Outcome(StrEnum):
    """What came out for a tensor."""

    SOUND = "sound"  # where nothing is compared: it can be read, and its numbers are finite
    NOT_FINITE = "not finite"
    EQUAL = "equal"
    EQUAL_AFTER_CAST = "equal after cast"
    DIFFERENT = "different"
    OTHER_SHAPE = "other shape"
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


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Args:
        repo: the repository, as it was named.
        against: what it was compared with; None if with nothing.
        components: what came out for each model.
        problems: what is wrong with the repository as a whole.
        notes: what was not done, and why.
        loaded_and_run: the name of the class that was loaded from the repository and run.
    """

    repo: str
    against: str | None
    components: tuple[ComponentReport, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    loaded_and_run: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the repository is sound or, if it was compared, equal."""
        return not self.problems and all(component.passed for component in self.components)

    def as_dict(self, *, all_tensors: bool = False) -> dict[str, Any]:
        """Everything as data for JSON, where a difference that is not finite is null.

        Args:
            all_tensors: whether tensors with which nothing is wrong are listed by name as well.
        """
        return {
            "repo": self.repo,
            "against": self.against,
            "passed": self.passed,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "loaded_and_run": self.loaded_and_run,
            "components": [_component_as_dict(component, all_tensors) for component in self.components],
        }


def _component_as_dict(component: ComponentReport, all_tensors: bool) -> dict[str, Any]:
    return {
        "name": component.name,
        "passed": component.passed,
        "problems": list(component.problems),
        "notes": list(component.notes),
        "tensors": len(component.tensors),
        "outcomes": component.outcomes,
        "largest_difference": component.largest and _tensor_as_dict(component.largest),
        "listed": [_tensor_as_dict(tensor) for tensor in (component.tensors if all_tensors else component.failures)],
    }


def _tensor_as_dict(tensor: TensorReport) -> dict[str, Any]:
    numbers = {"absolute": tensor.absolute, "relative": tensor.relative}
    return {
        "key": tensor.key,
        "outcome": str(tensor.outcome),
        "shapes": list(tensor.shapes),
        "dtypes": list(tensor.dtypes),
        **{name: number if number is None or isfinite(number) else None for name, number in numbers.items()},
    }
