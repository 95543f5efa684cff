"""Rules: which key of an original file becomes which key of a model, as data.

A template is a key with placeholders in braces:

* ``{p}`` stands for ``weight`` or ``bias``, ``{rest}`` for any tail;
* a name of the table's ``paths`` stands for one of the listed module paths, which has another name on the other side;
* any other name stands for a whole number.

A rule from ``{rest}`` alone is for all keys that no other rule and no drop is for.
Templates match whole keys.  A :class:`RuleTable` runs in both directions: ``table.inverse`` holds the rules from the
model back to the original file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .transforms import Transform


Paths = Mapping[str, Mapping[str, str]]

REST = "{rest}"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_PATTERNS = {"p": r"weight|bias", "rest": r".+"}


@dataclass(frozen=True)
class Rule:
    """``sources`` become ``targets`` through ``transforms``, applied from left to right.

    An ``optional`` rule may match nothing.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transforms: tuple[Transform, ...] = ()
    optional: bool = False

    @property
    def takes_the_rest(self) -> bool:
        """Whether it is only for keys that nothing else is for."""
        return self.sources == (REST,)

    @property
    def inverse(self) -> Rule:
        """The rule from the targets back to the sources."""
        undo = tuple(transform.inverse for transform in reversed(self.transforms))
        return Rule(self.targets, self.sources, undo, self.optional)


@dataclass(frozen=True)
class Drop:
    """Keys that are left out on purpose; released files may or may not have them."""

    source: str
    reason: str


LIGHTNING_DROPS = tuple(
    Drop(name, "of Lightning, for going on with the training")
    for name in (
        "callbacks",
        "callbacks/{rest}",
        "epoch",
        "global_step",
        "hyper_parameters",
        "hyper_parameters/{rest}",
        "lr_schedulers",
        "optimizer_states",
        "pytorch-lightning_version",
    )
)


@dataclass(frozen=True)
class Constant:
    """A tensor of the model that the original keeps in code: ``value`` everywhere, in the model's shape, float32."""

    target: str
    value: float
    reason: str


def rename(source: str, target: str, *transforms: Transform, optional: bool = False) -> Rule:
    """One tensor becomes one tensor."""
    return Rule((source,), (target,), transforms, optional)


def split(source: str, targets: tuple[str, ...], *transforms: Transform) -> Rule:
    """One tensor becomes several."""
    return Rule((source,), targets, transforms)


def join(sources: tuple[str, ...], target: str, *transforms: Transform) -> Rule:
    """Several tensors become one."""
    return Rule(sources, (target,), transforms)


@dataclass(frozen=True)
class RuleTable:
    """The rules of one file, or of several when tables are added.

    Args:
        rules: what becomes of tensors.
        drops: what is left out.
        constants: what the file does not hold.
        elsewhere: templates of keys that the file holds for another model.
        paths: module paths by placeholder, ``{"up": {"decoder.up.0": "decoder.up_blocks.3"}}``; no path may occur
            twice on a side, so that the table can be read backwards.
    """

    rules: tuple[Rule, ...] = ()
    drops: tuple[Drop, ...] = ()
    constants: tuple[Constant, ...] = ()
    elsewhere: tuple[str, ...] = ()
    paths: Paths = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, table in self.paths.items():
            if len(set(table.values())) != len(table):
                raise ValueError(f"the paths of {{{name}}} lead to the same place twice")

    def __add__(self, other: RuleTable) -> RuleTable:
        if clash := self.paths.keys() & other.paths.keys():
            raise ValueError(f"both tables name the paths {sorted(clash)}")
        return RuleTable(
            self.rules + other.rules,
            self.drops + other.drops,
            self.constants + other.constants,
            self.elsewhere + other.elsewhere,
            {**self.paths, **other.paths},
        )

    @cached_property
    def inverse(self) -> RuleTable:
        """The rules from the model to the original file; dropped tensors cannot come back, constants are dropped."""
        return RuleTable(
            tuple(rule.inverse for rule in self.rules),
            tuple(Drop(constant.target, constant.reason) for constant in self.constants),
            paths={name: {target: source for source, target in table.items()} for name, table in self.paths.items()},
        )

    def target_of(self, key: str) -> str | None:
        """What a rule from one key to one key makes of ``key``; None if there is no such rule for it."""
        for rule in self.rules:
            template = Template(rule.sources[0], self.paths)
            if len(rule.sources) == len(rule.targets) == 1 and (values := template.match(key)) is not None:
                return template.fill(rule.targets[0], values)
        return None

    def produces(self, key: str) -> bool:
        """Whether some rule or constant makes the model's tensor ``key``."""
        templates = [target for rule in self.rules for target in rule.targets]
        templates += [constant.target for constant in self.constants]
        return any(Template(template, self.inverse.paths).match(key) is not None for template in templates)


class Template:
    """A compiled template; reads a key (``match``) or, with the paths of the other side, writes one (``fill``)."""

    def __init__(self, text: str, paths: Paths) -> None:
        self.text = text
        self._paths = paths
        self._regex = re.compile(self._pattern())

    def match(self, key: str) -> dict[str, str] | None:
        """The placeholders' values in ``key``, or None when the key has another form."""
        found = self._regex.fullmatch(key)
        if found is None:
            return None
        values = found.groupdict()
        known = all(value in self._paths[name] for name, value in values.items() if name in self._paths)
        return values if known else None

    def fill(self, template: str, values: Mapping[str, str]) -> str:
        """Write ``template``, which belongs to the other side, with the values that ``match`` found on this side."""
        return _PLACEHOLDER.sub(lambda found: self._translate(found[1], values[found[1]]), template)

    def _translate(self, name: str, value: str) -> str:
        return self._paths[name][value] if name in self._paths else value

    def _pattern(self) -> str:
        pieces = _PLACEHOLDER.split(self.text)
        for index in range(0, len(pieces), 2):
            pieces[index] = re.escape(pieces[index])
        seen: set[str] = set()
        for index in range(1, len(pieces), 2):
            name = pieces[index]
            pattern = r".+?" if name in self._paths else _PATTERNS.get(name, r"\d+")
            pieces[index] = f"(?P={name})" if name in seen else f"(?P<{name}>{pattern})"
            seen.add(name)
        return "".join(pieces)
