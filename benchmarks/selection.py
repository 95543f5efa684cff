"""What of all subjects is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cases import Case, Subject
from .subjects import SUBJECTS


PARTS = ("sizes", "batches", "dtypes", "against")  # of an item of `--only`, after the name


@dataclass(frozen=True)
class Selection:
    """A subject, and what of it.

    Args:
        subject: what is measured.
        chosen: of each of `PARTS` what is wanted; what is missing or empty is as the subject has it.
    """

    subject: Subject
    chosen: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def candidates(self, device: str) -> list[str]:
        """The ways to do the work that are compared, in the order in which the subject has them."""
        wanted = self.chosen.get("against") or self.subject.usual(device)
        return [name for name in self.subject.candidates if name in wanted]

    def cases(self, device: str, tiny: bool = False) -> Iterator[Case]:
        """The cases on a device."""
        return self.subject.cases(device, self.chosen, tiny)


def listed(text: str, separator: str = ",") -> list[str]:
    """The parts of a text, without spaces around them."""
    return [part.strip() for part in text.split(separator) if part.strip()]


def select(only: str, chosen: Mapping[str, Sequence[str]]) -> list[Selection]:
    """What is asked for.

    Args:
        only: items, separated by commas: the name of a subject or how names begin, and after colons what of it in the
            order of `PARTS`, with slashes between several: `prior, 2.2-run:512/768:1:float16:stock/ours`. Empty for
            all subjects that need no name.
        chosen: what of all subjects, where an item does not say.

    Raises:
        ValueError: an item names no subject, or has too many parts; or a candidate is unknown.
    """
    selections = [Selection(subject, chosen) for subject in SUBJECTS.values() if not subject.when_named]
    if listed(only):
        selections = [selection for item in listed(only) for selection in _select(item, chosen)]
    known = {name for subject in SUBJECTS.values() for name in subject.candidates}
    for name in {name for selection in selections for name in selection.chosen.get("against", ())} - known:
        raise ValueError(f"`against` has {name!r}; accepted are {', '.join(sorted(known))}.")
    return selections


def _select(item: str, chosen: Mapping[str, Sequence[str]]) -> list[Selection]:
    name, *parts = item.split(":")
    subjects = [subject for known, subject in SUBJECTS.items() if known == name or known.startswith(f"{name}-")]
    if not subjects or len(parts) > len(PARTS):
        raise ValueError(
            f"`only` has {item!r}; accepted is NAME[:{'[:'.join(PARTS)}{']' * len(PARTS)} with a name, or its"
            f" beginning, of {', '.join(SUBJECTS)}."
        )
    said: dict[str, Any] = {part: listed(text, "/") for part, text in zip(PARTS, parts, strict=False) if listed(text)}
    return [Selection(subject, {**chosen, **said}) for subject in subjects]
