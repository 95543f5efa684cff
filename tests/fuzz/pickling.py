"""Pickles that nobody would write, opcode by opcode."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from .sandbox import CANARY


NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    256,
    65535,
    2**31 - 1,
    -(2**31),
    2**31,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    -(2**63),
    2**70,
)
STORAGES = ("FloatStorage", "HalfStorage", "LongStorage", "ByteStorage", "BoolStorage", "BFloat16Storage")
STORAGES += ("ComplexFloatStorage", "QInt8Storage", "UntypedStorage", "storage.UntypedStorage", "NoStorage")


@dataclass(frozen=True)
class Name:
    """A function or class."""

    path: str


@dataclass(frozen=True)
class Call:
    """What a function gives; `opcode` calls it."""

    function: Any
    arguments: Any
    opcode: bytes = pickle.REDUCE


@dataclass(frozen=True)
class Build:
    """An object with attributes."""

    value: Any
    state: Any


@dataclass(frozen=True)
class Persistent:
    """What is kept outside the pickle under an id."""

    id: Any


@dataclass(frozen=True)
class Raw:
    """Opcodes that leave one object on the stack."""

    code: bytes


def dumps(value: Any) -> bytes:
    """A pickle of protocol 2."""
    return pickle.PROTO + b"\x02" + encode(value) + pickle.STOP


def encode(value: Any) -> bytes:
    """Opcodes that make `value`."""
    match value:
        case Raw(code):
            return code
        case Name(path):
            module, _, name = path.rpartition(".")
            return pickle.GLOBAL + f"{module}\n{name}\n".encode()
        case Call(function, arguments, opcode):
            return encode(function) + encode(arguments) + opcode
        case Build(inner, state):
            return encode(inner) + encode(state) + pickle.BUILD
        case Persistent(id):
            return encode(id) + pickle.BINPERSID
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int() if -(2**31) <= value < 2**31:
            return pickle.BININT + struct.pack("<i", value)
        case int():
            content = pickle.encode_long(value)
            return pickle.LONG1 + bytes([len(content)]) + content
        case float():
            return pickle.BINFLOAT + struct.pack(">d", value)
        case str():
            content = value.encode("utf-8", "surrogatepass")
            return pickle.BINUNICODE + struct.pack("<I", len(content)) + content
        case bytes():
            return pickle.SHORT_BINSTRING + bytes([len(value)]) + value
        case tuple():
            return pickle.MARK + b"".join(map(encode, value)) + pickle.TUPLE
        case list():
            return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(encode, value)) + pickle.APPENDS
        case dict():
            parts = b"".join(encode(key) + encode(part) for key, part in value.items())
            return pickle.EMPTY_DICT + pickle.MARK + parts + pickle.SETITEMS
    raise TypeError(type(value))


def tensor(
    size: tuple[Any, ...],
    stride: tuple[Any, ...],
    offset: Any = 0,
    storage: str = "FloatStorage",
    count: Any = 6,
    **how: Any,
) -> Call:
    """A tensor in the storage ``data/0``, as `torch.save` has it."""
    id = how.get("id", ("storage", Name(f"torch.{storage}"), how.get("key", "0"), how.get("place", "cpu"), count))
    arguments = (Persistent(id), offset, size, stride, False, Call(Name("collections.OrderedDict"), ()))
    return Call(Name(f"torch._utils.{how.get('function', '_rebuild_tensor_v2')}"), arguments)


def hostile(random: Random) -> Any:
    """Something that a pickle of tensors should not have, or has in another way."""
    return random.choice(_HOSTILE)(random)


def _code(random: Random) -> Any:
    function, arguments = random.choice(
        (
            ("os.system", (f"touch {CANARY}",)),
            ("posix.system", (f"touch {CANARY}",)),
            ("nt.system", (CANARY,)),
            ("os.mkdir", (CANARY,)),
            ("builtins.exec", (f"open('../{CANARY}', 'w')",)),
            ("builtins.eval", (f"__import__('{CANARY}')",)),
            ("builtins.getattr", (Name("os.path"), "os")),
            ("builtins.__import__", (CANARY,)),
            ("subprocess.Popen", (["touch", CANARY],)),
            (f"{CANARY}.run", ()),
            ("torch.load", (CANARY,)),
            ("torch.hub.load", (CANARY, CANARY)),
            ("torch._utils._rebuild_tensor_v2.__globals__", ()),
            ("torch._tensor._rebuild_from_type_v2", (Name("os.system"), Name("torch.Tensor"), (CANARY,), {})),
            ("torch._utils._rebuild_wrapper_subclass", (Name("os.system"), 1, 1, 1, 1, 1, 1)),
            ("pytorch_lightning.callbacks.Callback", (CANARY,)),
            ("pytorch_lightning.os.system", (CANARY,)),
            ("numpy.core.multiarray.scalar", (Name("os.system"), CANARY)),
            ("shutil.rmtree", ("../outside",)),
            ("operator.attrgetter", ("system",)),
        )
    )
    opcode = random.choice((pickle.REDUCE, pickle.NEWOBJ, pickle.OBJ, pickle.NEWOBJ_EX, pickle.BUILD))
    called = Call(Name(function), arguments, opcode)
    module, _, name = function.rpartition(".")
    others = (
        called,
        Raw(encode(module) + encode(name) + pickle.STACK_GLOBAL + encode(arguments) + pickle.REDUCE),
        Raw(pickle.MARK + b"".join(map(encode, arguments)) + pickle.INST + f"{module}\n{name}\n".encode()),
        Raw(pickle.EXT1 + b"\x01" + encode(arguments) + pickle.REDUCE),
        Build(Call(Name("collections.OrderedDict"), ()), {"items": called}),
        Call(Name("collections.OrderedDict"), ([("a", called)],)),
        Name(function),
    )
    return random.choice(others)


def _large(random: Random) -> Any:
    number = random.choice((10**6, 10**9, 2**31 - 1, 2**40, 2**62))
    return random.choice(
        (
            Call(Name("builtins.bytearray"), (number,)),
            Call(Name("torch.Tensor"), (number,)),
            Call(Name("torch.FloatTensor"), (number,)),
            Call(Name("torch.storage.UntypedStorage"), (number,)),
            Call(Name("_codecs.encode"), ("a" * 1000, "utf-32")),
            Call(Name("torch.Size"), ([number] * 20,)),
            Call(Name("collections.Counter"), ("a" * 1000,)),
            Raw(pickle.LONG4 + struct.pack("<i", 2**31 - 1)),
            Raw(pickle.LONG4 + struct.pack("<i", -1)),
            Raw(pickle.BINUNICODE + struct.pack("<I", 2**32 - 1)),
            Raw(pickle.BINUNICODE8 + struct.pack("<Q", 2**63)),
            Raw(pickle.BINBYTES8 + struct.pack("<Q", 2**62)),
            Raw(pickle.BYTEARRAY8 + struct.pack("<Q", 2**40)),
            Raw(pickle.FRAME + struct.pack("<Q", 2**63) + pickle.NONE),
            Raw(pickle.INT + b"9" * 10_000 + b"\n"),
        )
    )


def _deep(random: Random) -> Any:
    depth = random.choice((10, 100, 1000, 300_000))
    wrapped = random.choice((pickle.TUPLE1, b"", pickle.TUPLE2))
    if wrapped == pickle.TUPLE1:
        return Raw(pickle.EMPTY_TUPLE + wrapped * depth)
    if wrapped == pickle.TUPLE2:
        return Raw(pickle.NONE * (depth + 1) + wrapped * depth)
    return Raw(pickle.EMPTY_LIST * depth + pickle.APPEND * (depth - 1))


def doubled(levels: int, kind: str) -> Raw:
    """2^levels entries from as many steps: what is in the memo, twice in the next."""
    code = encode("leaf")
    for level in range(levels):
        put, get = (opcode + struct.pack("<I", 1000 + level) for opcode in (pickle.LONG_BINPUT, pickle.LONG_BINGET))
        if kind == "tuple":
            code = code + put + get + pickle.TUPLE2
        elif kind == "list":
            code = pickle.EMPTY_LIST + pickle.MARK + code + put + get + pickle.APPENDS
        else:
            code = pickle.EMPTY_DICT + pickle.MARK + encode("a") + code + put + encode("b") + get + pickle.SETITEMS
    return Raw(code)


def _doubled(random: Random) -> Any:
    return doubled(random.choice((5, 20, 60)), random.choice(("tuple", "list", "dict")))


def _in_itself(random: Random) -> Any:
    put, get = pickle.BINPUT + b"\x65", pickle.BINGET + b"\x65"
    return random.choice(
        (
            Raw(pickle.EMPTY_DICT + put + encode("a") + get + pickle.SETITEM),
            Raw(pickle.EMPTY_LIST + put + get + pickle.APPEND),
            Raw(pickle.EMPTY_DICT + put + pickle.EMPTY_LIST + get + pickle.APPEND + encode(1) + pickle.SETITEM),
            Build(Call(Name("collections.OrderedDict"), ()), {"items": 3, "shape": ("a",), "keys": None}),
            Build(Call(Name("collections.OrderedDict"), ()), {"__class__": 3, "__len__": 4}),
        )
    )


def _key(random: Random) -> Any:
    """A dict with an odd key."""
    key = random.choice((_deep, _doubled, _odd, _odd, _code))(random)
    return Raw(pickle.EMPTY_DICT + pickle.MARK + encode(key) + encode(1) + pickle.SETITEMS)


def _odd(random: Random) -> Any:
    return random.choice(
        (
            random.choice(NUMBERS),
            "k" * random.choice((0, 1, 499, 501, 10**5)),
            "../x",
            "/etc/passwd",
            "a\0b",
            "\ud800",
            "a\nb: c\n---\n",
            b"bytes",
            float("nan"),
            (1, "a", None),
            None,
            True,
            Name("torch.float32"),
            Name("torch.FloatStorage"),
            Call(Name("torch.device"), ("cuda:99",)),
            Call(Name("builtins.set"), ([1, 2],)),
            Call(Name("builtins.complex"), (1.0, 2.0)),
            Call(Name("torch.Size"), ([2, 3],)),
            Call(Name("torch.nn.parameter.Parameter"), (1,), pickle.NEWOBJ),
            Raw(pickle.TUPLE),
            Raw(pickle.BINGET + b"\xfe"),
            Raw(b""),
            Raw(pickle.STOP),
            Raw(bytes(random.randrange(256) for _ in range(random.randrange(1, 20)))),
        )
    )


def _tensor(random: Random) -> Any:
    def size() -> tuple[Any, ...]:
        return tuple(
            random.choice((*NUMBERS, 1, 2, 3, 2, 3, "a", None, 1.5)) for _ in range(random.choice((0, 1, 2, 2, 3, 70)))
        )

    how: dict[str, Any] = {}
    if random.random() < 0.2:
        how["key"] = random.choice(("1", "../0", "/etc/passwd", "", 0, "data.pkl", "0\0", "9" * 300))
    if random.random() < 0.1:
        how["place"] = random.choice(("cuda", "meta", "", b"cpu", 3, "mps:7"))
    if random.random() < 0.1:
        how["id"] = random.choice((("storage",), "0", 5, ("module", Name("os.system"), "a", "b"), (), (1, 2, 3, 4, 5)))
    if random.random() < 0.2:
        others = (
            "tensor",
            "tensor_v3",
            "qtensor",
            "sparse_tensor",
            "meta_tensor_no_storage",
            "nested_tensor",
            "parameter",
        )
        how["function"] = f"_rebuild_{random.choice(others)}"
    count = random.choice((6, 6, 6, *NUMBERS))
    shape = random.choice(((2, 3), size(), size()))
    stride = random.choice(((3, 1), (0, 0), size(), tuple(0 for _ in shape)))
    offset = random.choice((0, 0, *NUMBERS))
    made = tensor(shape, stride, offset, random.choice(("FloatStorage", *STORAGES)), count, **how)
    return random.choice(
        (made, made, Build(made, {"a": 1}), Call(Name("torch._utils._rebuild_parameter"), (made, True, {})))
    )


_HOSTILE: tuple[Callable[[Random], Any], ...] = (
    _code,
    _large,
    _deep,
    _doubled,
    _in_itself,
    _key,
    _odd,
    _tensor,
    _tensor,
)

# what has once brought the library or PyTorch down
KNOWN: dict[str, bytes] = {
    "3 GB of zeros": dumps({"a": Call(Name("builtins.bytearray"), (3 * 10**9,))}),
    "dicts doubled 40 times": dumps({"a": doubled(40, "dict")}),
    "a dict in itself": dumps(Raw(pickle.EMPTY_DICT + b"q\0" + encode("a") + b"h\0s")),
    "a dict whose items are a number": dumps(Build(Call(Name("collections.OrderedDict"), ()), {"items": 3})),
    "a long name before many": dumps({"k" * 10**6: {str(number): 1 for number in range(20_000)}}),
    "10^12 times one number": dumps({"a": tensor((10**6, 10**6), (0, 0))}),
    "2^50 numbers on no device": dumps(
        {
            "a": Call(
                Name("torch._utils._rebuild_meta_tensor_no_storage"), (Name("torch.float32"), (2**50,), (1,), False)
            )
        }
    ),
    "a key of tuples doubled 40 times": dumps(
        Raw(pickle.EMPTY_DICT + doubled(40, "tuple").code + encode(1) + pickle.SETITEM)
    ),
    "a key of 300,000 tuples in each other": dumps(
        Raw(pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.TUPLE1 * 300_000 + encode(1) + pickle.SETITEM)
    ),
}
