"""What a pickle would make, found out without making anything.

``torch.load(weights_only=True)`` calls nothing but a list of harmless functions.  A file can still exhaust memory or
the stack with these: ``bytearray(10**12)``, a tuple in a tuple a million times as a key, or lists that hold the
previous one twice, which are 2^n entries for whoever walks through them.  So the stream is read first as data.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from dataclasses import dataclass, field
from typing import IO, Any


Node = list[Any]  # what something consists of: more of these

_MOST_STEPS = 1_000_000  # the largest published files have less than a fifth of it
_MOST_OBJECTS = 1_000_000  # with each as often as it is met on the way through all
_DEEPEST = 64

_LEAF: Node = []
_LEAVES = {
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINSTRING",
    "EMPTY_TUPLE",
}
_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
# from how many objects on the stack something new is made
_MAKERS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "BINPERSID": 1}
# how many objects on the stack go into the one below
_FILLERS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
_MARKED_FILLERS = {"APPENDS", "SETITEMS"}

# what plain tensors and the containers around them are made with; a Storage is but a name here, except these two
_PLAIN = re.compile(
    r"(collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter\.Parameter|torch\.(Size|device)"
    r"|torch\.(?!Untyped|Typed)\w+Storage"
    r"|torch\.(u?int\d+|float\d+\w*|bfloat16|half|double|long|bool|complex\d+))"
)


def foreign_names(stream: IO[bytes]) -> set[str]:
    """What a pickle refers to beside the functions and classes that plain tensors need.

    Args:
        stream: stands at the beginning of the pickle; afterwards at its end.

    Raises:
        pickle.UnpicklingError: it is none that PyTorch writes, or what it makes is too large or too deep.
    """
    walk = _Walk()
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if step == _MOST_STEPS:
                raise pickle.UnpicklingError(f"the pickle has more than {_MOST_STEPS} steps")
            walk.take(opcode.name, argument)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise pickle.UnpicklingError(f"the pickle is damaged: {error}") from error
    for node in walk.stack:
        _measure(node, {}, 0)
    return {name for name in walk.names if not _PLAIN.fullmatch(name)}


@dataclass
class _Walk:
    """The pickle machine, with parts instead of objects."""

    stack: list[Node] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    _marks: list[int] = field(default_factory=list)
    _memo: dict[int, Node] = field(default_factory=dict)

    def take(self, name: str, argument: Any) -> None:
        if name in _LEAVES:
            self.stack.append(_LEAF)
        elif name == "GLOBAL":
            self.names.add(argument.replace(" ", "."))
            self.stack.append(_LEAF)
        elif name in _CONTAINERS:
            self.stack.append([])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif name == "MARK":
            self._marks.append(len(self.stack))
        elif name == "TUPLE":
            self.stack.append(self._above(self._marks.pop()))
        elif name in _MAKERS:
            self.stack.append(self._above(len(self.stack) - _MAKERS[name]))
        elif name in _FILLERS:
            self._fill(len(self.stack) - _FILLERS[name])
        elif name in _MARKED_FILLERS:
            self._fill(self._marks.pop())
        elif name not in ("PROTO", "STOP"):
            raise pickle.UnpicklingError(f"the pickle has the opcode {name}, which PyTorch does not write")

    def _above(self, start: int) -> Node:
        """Take from the stack what lies above ``start``."""
        if not 0 <= start <= len(self.stack):
            raise IndexError("it takes more than there is")
        parts = self.stack[start:]
        del self.stack[start:]
        return parts

    def _fill(self, start: int) -> None:
        parts = self._above(start)
        if self.stack[-1] is _LEAF:
            raise pickle.UnpicklingError("the pickle puts something into a number or a name")
        self.stack[-1].extend(parts)


def _measure(node: Node, known: dict[int, tuple[int, int]], above: int) -> tuple[int, int]:
    """How many objects are in it, and how deep."""
    if id(node) in known:
        return known[id(node)]
    if above > _DEEPEST:
        raise pickle.UnpicklingError(f"what the pickle makes is more than {_DEEPEST} levels deep")
    objects, height = 1, 0
    for part in node:
        more, deeper = _measure(part, known, above + 1)
        objects, height = objects + more, max(height, deeper + 1)
    if objects > _MOST_OBJECTS or height > _DEEPEST:
        raise pickle.UnpicklingError(f"what the pickle makes has {objects} objects, {height} levels deep")
    known[id(node)] = objects, height
    return objects, height
