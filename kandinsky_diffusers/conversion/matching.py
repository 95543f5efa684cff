"""Planning: match the keys of files with rules and a model, without touching a tensor.

:func:`match` accounts for every key on both sides and either returns a :class:`Plan` or raises one
:class:`~.errors.ConversionError` with all violations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property

from .errors import ConversionError
from .rules import Constant, Rule, RuleTable, Template
from .transforms import Transform


Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

LEFT_OUT = "left out with --drop"  # the reason for keys that match a user's pattern
_SHOWN = 5


@dataclass(frozen=True)
class Step:
    """Make the tensors ``targets`` from the tensors ``sources``; no sources: fill with ``constant``."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transforms: tuple[Transform, ...] = ()
    shapes: tuple[Shape, ...] = ()
    constant: float | None = None


@dataclass(frozen=True)
class Plan:
    """What to do with every key.

    Args:
        steps: how the model's tensors are made, in the order of the source file.
        dropped: the keys that are left out, each with the reason.
        elsewhere: the keys that belong to another model.
        table: the rules that say so, without those that nothing matched.
    """

    steps: tuple[Step, ...]
    dropped: Mapping[str, str]
    elsewhere: tuple[str, ...]
    table: RuleTable

    @cached_property
    def target_shapes(self) -> dict[str, Shape]:
        """Key to shape of every tensor that the plan makes."""
        return {key: shape for step in self.steps for key, shape in zip(step.targets, step.shapes, strict=True)}

    @cached_property
    def inverse(self) -> Plan:
        """The plan from the model's tensors back to those of the file (all but the dropped ones)."""
        return match(self.table.inverse, self.target_shapes)


def match(
    table: RuleTable,
    shapes: Shapes,
    expected: Shapes | None = None,
    *,
    drop: Sequence[str] = (),
    excused: Callable[[str], bool] = lambda key: False,
    title: str = "the conversion",
) -> Plan:
    """Match every key of ``shapes`` with exactly one rule and every key of ``expected`` with exactly one result.

    Args:
        table: the rules.
        shapes: the source keys and their shapes.
        expected: the keys and shapes of the model; None leaves the results unchecked.
        drop: glob patterns of source keys to leave out besides the table's own drops.
        excused: tells the expected keys that are allowed to be missing, because their file is not there.
        title: what is being planned, for the message.

    Raises:
        ConversionError: names all keys that no rule or several rules match, rules without a match, targets that are
            made twice, not at all or for nothing, and shapes that differ.
    """
    matcher = _Matcher(table, shapes)
    matcher.drop_by_glob(drop)
    matcher.assign_keys()
    matcher.make_steps()
    matcher.add_constants(expected)
    if expected is not None:
        matcher.compare(expected, excused)
    matcher.raise_problems(title)
    return Plan(tuple(matcher.steps), matcher.dropped, tuple(matcher.elsewhere), matcher.used_table)


class _Matcher:
    def __init__(self, table: RuleTable, shapes: Shapes) -> None:
        self._table = table
        self._shapes = shapes
        self._templates = [[Template(source, table.paths) for source in rule.sources] for rule in table.rules]
        self._groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]] = {}
        self._problems: dict[str, list[str]] = {}
        self.steps: list[Step] = []
        self.dropped: dict[str, str] = {}
        self.elsewhere: list[str] = []

    def drop_by_glob(self, patterns: Sequence[str]) -> None:
        for key in self._shapes:
            if any(fnmatchcase(key, pattern) for pattern in patterns):
                self.dropped[key] = LEFT_OUT

    def assign_keys(self) -> None:
        drops = [(Template(drop.source, self._table.paths), drop.reason) for drop in self._table.drops]
        foreign = [Template(text, self._table.paths) for text in self._table.elsewhere]
        for key in self._shapes:
            if key in self.dropped:
                continue
            homes = self._rules_for(key)
            reasons = [reason for template, reason in drops if template.match(key) is not None]
            elsewhere = [template for template in foreign if template.match(key) is not None]
            others = len(reasons) + len(elsewhere)
            special = [home for home in homes if not self._table.rules[home[0]].takes_the_rest]
            homes = special or ([] if others else homes)
            if len(homes) + others > 1:
                self._problem("matched by several rules", key)
            elif reasons:
                self.dropped[key] = reasons[0]
            elif elsewhere:
                self.elsewhere.append(key)
            elif homes:
                number, position, values = homes[0]
                self._groups.setdefault((number, tuple(sorted(values.items()))), {})[position] = key
            else:
                self._problem("unknown, no rule says what becomes of it (--drop KEY leaves it out)", key)

    def _rules_for(self, key: str) -> list[tuple[int, int, dict[str, str]]]:
        return [
            (number, position, values)
            for number, templates in enumerate(self._templates)
            for position, template in enumerate(templates)
            if (values := template.match(key)) is not None
        ]

    @property
    def used_table(self) -> RuleTable:
        used = {number for number, _ in self._groups}
        rules = (rule for number, rule in enumerate(self._table.rules) if number in used)
        return replace(self._table, rules=tuple(rules))

    def make_steps(self) -> None:
        used = set()
        for (number, values), found in self._groups.items():
            used.add(number)
            rule, templates = self._table.rules[number], self._templates[number]
            if len(found) < len(templates):
                self._problem("without the other parts of its rule", *found.values())
                continue
            sources = tuple(found[position] for position in range(len(templates)))
            targets = tuple(templates[0].fill(target, dict(values)) for target in rule.targets)
            self._add_step(rule, sources, targets)
        for number, rule in enumerate(self._table.rules):
            if number not in used and not rule.optional:
                self._problem("missing from the file", *rule.sources)

    def _add_step(self, rule: Rule, sources: tuple[str, ...], targets: tuple[str, ...]) -> None:
        import torch

        tensors = tuple(torch.empty(self._shapes[source], device="meta") for source in sources)
        try:
            for transform in rule.transforms:
                tensors = transform(tensors)
        except (ValueError, RuntimeError) as error:
            self._problem(f"of a shape that does not fit: {error}", *sources)
            return
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        self.steps.append(Step(sources, targets, rule.transforms, shapes))

    def add_constants(self, expected: Shapes | None) -> None:
        for constant in self._table.constants:
            self._add_constant(constant, expected or {})

    def _add_constant(self, constant: Constant, expected: Shapes) -> None:
        template = Template(constant.target, self._table.inverse.paths)
        for key, shape in expected.items():
            if template.match(key) is not None:
                self.steps.append(Step((), (key,), (), (tuple(shape),), constant.value))

    def compare(self, expected: Shapes, excused: Callable[[str], bool]) -> None:
        made: dict[str, Step] = {}
        for step in self.steps:
            for target, shape in zip(step.targets, step.shapes, strict=True):
                if target in made:
                    self._problem(f"made twice, from {step.sources} and {made[target].sources}", target)
                elif target not in expected:
                    kind = "made for nothing, the model does not have it (--drop KEY leaves it out)"
                    self._problem(kind, _derived(target, step.sources[0]))
                elif tuple(expected[target]) != shape:
                    wanted = f"{list(shape)}, the model has {list(expected[target])}"
                    self._problem("of another shape than in the model", f"{', '.join(step.sources)} ({wanted})")
                made[target] = step
        broken = self._blamed()
        missing = [key for key in expected if key not in made and not excused(key) and key not in broken]
        for key in missing:
            self._problem("needed by the model, but no tensor of the file makes it", self._origin(key))

    def _blamed(self) -> set[str]:
        """Targets of steps that failed for a reason that is already reported."""
        blamed = set()
        for (number, values), _ in self._groups.items():
            template = self._templates[number][0]
            blamed.update(template.fill(target, dict(values)) for target in self._table.rules[number].targets)
        return blamed

    def _origin(self, target: str) -> str:
        for rule in self._table.rules:
            for text in rule.targets:
                back = Template(text, self._table.inverse.paths)
                if (values := back.match(target)) is not None:
                    sources = ", ".join(back.fill(source, values) for source in rule.sources)
                    return sources if sources == target else f"{sources} (for {target})"
        return target

    def _problem(self, kind: str, *keys: str) -> None:
        self._problems.setdefault(kind, []).extend(keys)

    def raise_problems(self, title: str) -> None:
        if not self._problems:
            return
        lines = [f"{title} does not add up:"]
        for kind, keys in self._problems.items():
            lines += [f"  {_count(keys)} {kind}:", *(f"    {key}" for key in _sample(keys))]
        raise ConversionError("\n".join(lines))


def _derived(target: str, source: str) -> str:
    return target if target == source else f"{target} (from {source})"


def _count(keys: Sequence[str]) -> str:
    return "1 key is" if len(keys) == 1 else f"{len(keys)} keys are"


def _sample(keys: Sequence[str]) -> list[str]:
    """The first keys of each form (numbers aside), so that one broken layer does not hide another problem."""
    forms: dict[str, list[str]] = {}
    for key in keys:
        forms.setdefault(re.sub(r"\d+", "#", key), []).append(key)
    shown = [key for form in forms.values() for key in form[:1]][: 4 * _SHOWN]
    if len(keys) <= _SHOWN:
        shown = list(keys)
    hidden = len(keys) - len(shown)
    return shown + ([f"... and {hidden} more of these forms"] if hidden else [])
