"""Hostile forms of files: bytes, zip archives, safetensors, JSON, YAML."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from . import pickling


PATHS = (
    "../x",
    "../../outside/keep.txt",
    "/etc/passwd",
    "a/../../x",
    "..",
    ".",
    "",
    "x\0y",
    "~/x",
    "C:\\x",
    "\\\\h\\x",
    "//x",
)
SIZES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def damaged(random: Random, content: bytes, other: bytes = b"") -> bytes:
    """With some bytes changed, gone, doubled, overwritten with numbers, or the end of another file."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        place = random.randrange(len(data) + 1)
        if random.random() < 0.5:  # where the structure is rather than the numbers
            place = min(len(data), random.choice((place % 512, max(len(data) - place % 512, 0))))
        match random.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << random.randrange(8)
            case 1 if place < len(data):
                data[place] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
            case 2:
                del data[place:]
            case 3:
                del data[place : place + random.choice((1, 4, 64, 4096))]
            case 4:
                data[place:place] = data[place : place + random.choice((1, 16, 1024))] * random.choice((1, 3, 50))
            case 5:
                size = random.choice((2, 4, 8))
                data[place : place + size] = (random.choice(SIZES) % 2 ** (8 * size)).to_bytes(size, "little")
            case 6 if other:
                data[place:] = other[random.randrange(len(other)) :]
    return bytes(data)


# ---------------------------------------------------------------------------------------------------------------- zip
def archive_with(content: bytes, data: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """A file of `torch.save` with another pickle."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(packed, "w", method) as other:
        for entry in archive.infolist():
            other.writestr(entry.filename, data if entry.filename.endswith("data.pkl") else archive.read(entry))
    return packed.getvalue()


def torch_archive(random: Random, content: bytes) -> bytes:
    """A file of `torch.save` with another structure, or another pickle."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    changes = random.sample(_ENTRY_CHANGES, random.choice((0, 1, 1, 2)))
    for change in changes:
        change(random, entries)
    packed = io.BytesIO()
    method = random.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name or "e", (1980, 1, 1, 0, 0, 0))
            info.compress_type = method
            if random.random() < 0.05:
                info.external_attr = 0o120777 << 16  # a link
            if random.random() < 0.1:
                info.extra = bytes(random.randrange(256) for _ in range(random.choice((4, 40))))
            archive.writestr(info, data)
        if random.random() < 0.05:
            archive.comment = b"PK\x05\x06" + bytes(random.randrange(256) for _ in range(30))
    data = packed.getvalue()
    return _other_headers(random, data) if not changes or random.random() < 0.3 else data


def _other_pickle(random: Random, entries: list[tuple[str, bytes]]) -> None:
    for number, (name, data) in enumerate(entries):
        if name.endswith("data.pkl"):
            entries[number] = (name, hostile_pickle(random, data))


def _other_names(random: Random, entries: list[tuple[str, bytes]]) -> None:
    number = random.randrange(len(entries))
    name, data = entries[number]
    entries[number] = (random.choice((*PATHS[:6], name.upper(), f"x/{name}", name[:-1], "é" * 200)), data)


def _doubled_entry(random: Random, entries: list[tuple[str, bytes]]) -> None:
    name, data = random.choice(entries)
    entries.append((name, random.choice((data, b"", hostile_pickle(random, data)))))


def _more_entries(random: Random, entries: list[tuple[str, bytes]]) -> None:
    top = entries[0][0].split("/")[0]
    names = (".format_version", ".storage_alignment", "byteorder", "version", "constants.pkl", "data.pkl", "code/x.py")
    content = (b"1", b"2", b"little", b"big", b"-1", b"9" * 30, b"", bytes(2**22), b"import os")
    entries.append((f"{top}/{random.choice((*names, *PATHS[:6]))}", random.choice(content)))


def _fewer_entries(random: Random, entries: list[tuple[str, bytes]]) -> None:
    del entries[random.randrange(len(entries))]


def _bomb(random: Random, entries: list[tuple[str, bytes]]) -> None:
    number = random.randrange(len(entries))
    entries[number] = (entries[number][0], bytes(random.choice((2**20, 2**24))))


_ENTRY_CHANGES = (
    *[_other_pickle] * 8,
    _other_names,
    _doubled_entry,
    _more_entries,
    _fewer_entries,
    _bomb,
)


def _other_headers(random: Random, data: bytes) -> bytes:
    """Numbers in the headers of entries, of the directory and of its end are others."""
    content = bytearray(data)
    signatures = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
    for _ in range(random.choice((1, 1, 3))):
        signature = random.choice(signatures)
        places = [i for i in range(len(content)) if content.startswith(signature, i)] if len(content) < 2**16 else []
        place = random.choice(places) if places else content.rfind(signature)
        if place < 0:
            continue
        offset, size = random.choice(
            ((6, 2), (8, 2), (14, 4), (16, 4), (18, 4), (20, 4), (22, 4), (24, 4), (26, 2), (28, 2), (42, 4))
        )
        number = random.choice((*SIZES, len(content), len(content) - 22)) % 2 ** (8 * size)
        content[place + offset : place + offset + size] = number.to_bytes(size, "little")
    if random.random() < 0.15:  # an end of directory with numbers of 64 bits
        end = content.rfind(b"PK\x05\x06")
        numbers = [random.choice((*SIZES, len(content))) for _ in range(6)]
        content[end:end] = struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, *numbers[:4]) + struct.pack(
            "<4sLQL", b"PK\x06\x07", 0, numbers[4], 1
        )
    return bytes(content)


# ------------------------------------------------------------------------------------------------------------- pickles
def hostile_pickle(random: Random, content: bytes) -> bytes:
    """The pickle with something else in it, or another in its place."""
    if random.random() < 0.15:
        return damaged(random, content)
    more = pickling.encode(random.choice(("x.weight", "a", 3))) + pickling.encode(pickling.hostile(random)) + b"s"
    match random.randrange(4):
        case 0:
            return pickling.dumps(pickling.hostile(random))
        case 1:
            return pickling.dumps({"state_dict": {"w": pickling.hostile(random)}, "a": pickling.hostile(random)})
        case 2:
            return pickling.dumps((pickling.tensor((2, 3), (3, 1)), pickling.hostile(random)))
    return content[:-1] + more + b"."


# --------------------------------------------------------------------------------------------------------- safetensors
def safetensors(random: Random, content: bytes) -> bytes:
    """Another header."""
    if random.random() < 0.3:
        return damaged(random, content)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for name in random.sample(names, min(len(names), random.choice((1, 1, 3)))):
        entry = header[name]
        match random.randrange(6):
            case 0:
                entry["shape"] = (
                    json_value(random, 2)
                    if random.random() < 0.5
                    else [random.choice(pickling.NUMBERS) for _ in range(3)]
                )
            case 1:
                entry["dtype"] = random.choice(
                    ("F64", "F16", "BF16", "I8", "U16", "F8_E4M3", "F4", "C64", "BOOL", "x", 3, None)
                )
            case 2:
                entry["data_offsets"] = [
                    random.choice((*pickling.NUMBERS, *entry["data_offsets"], -4)) for _ in range(2)
                ]
            case 3:
                header[random.choice((*PATHS, "k" * 501, "\ud800", "a" * 10**5))] = header.pop(name)
            case 4:
                header["__metadata__"] = json_value(random, 3)
            case 5:
                del header[name]
    if random.random() < 0.1:
        header |= {
            f"t{number}": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]} for number in range(20_001)
        }
    text = json_text(random, header)
    size = random.choice((len(text),) * 6 + (*SIZES, len(text) - 1, len(text) + 1))
    return max(size, 0).to_bytes(8, "little") + text + random.choice((data, data, data, data[:100], b""))


# ---------------------------------------------------------------------------------------------------------------- JSON
def json_value(random: Random, depth: int = 2) -> Any:
    """Any value."""
    numbers = (*pickling.NUMBERS, 10**400, 1e308, float("nan"), float("-inf"), 0.5, -3)
    texts = (*PATHS, "a", "x" * 1000, "\ud800", "\x00", "🙂", "${HOME}", "{{ 1 }}", "os.system", "true")
    kinds: list[Callable[[], Any]] = [
        lambda: random.choice(numbers),
        lambda: random.choice(numbers),
        lambda: random.choice(texts),
        lambda: random.choice((None, True, False, [], {}, "")),
    ]
    if depth:
        kinds.append(lambda: [json_value(random, depth - 1) for _ in range(random.randrange(4))])
        kinds.append(lambda: {random.choice(texts): json_value(random, depth - 1) for _ in range(random.randrange(4))})
    return random.choice(kinds)()


def changed(random: Random, content: Any, keys: tuple[str, ...] = ()) -> Any:
    """JSON content with other values at some places, other keys, more of them, and fewer."""
    if isinstance(content, dict) and content:
        content = dict(content)
        for name in random.sample(list(content), min(len(content), random.choice((0, 1, 1, 2)))):
            content[name] = changed(random, content[name], keys) if random.random() < 0.6 else json_value(random)
        if random.random() < 0.1:
            del content[random.choice(list(content))]
        if random.random() < 0.3:
            content[random.choice((*keys, *PATHS, "__class__", "self"))] = json_value(random)
        return content
    if isinstance(content, list) and content and random.random() < 0.7:
        content = list(content)
        place = random.randrange(len(content))
        content[place] = changed(random, content[place], keys)
        return content * random.choice((1, 1, 2, 1000))
    return json_value(random)


def json_text(random: Random, content: Any) -> bytes:
    """JSON, or something near it."""
    text = json.dumps(content).encode()
    match random.randrange(16):
        case 0:
            return damaged(random, text)
        case 1:
            deep = random.choice((60, 70, 900, 100_000))
            return text[:-1] + b', "deep": ' + b"[" * deep + b"]" * random.choice((deep, 0)) + b"}"
        case 2:
            return text[:-1] + b', "deep": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}"
        case 3:
            return text[:-1] + b', "n": ' + b"9" * random.choice((4000, 5000)) + b"}"
        case 4:
            return random.choice(
                (b"", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf" + text, text * 2, b"{}")
            )
    return text


# ---------------------------------------------------------------------------------------------------------------- YAML
def front_matter(random: Random) -> bytes:
    """A card that names a prior, among other things."""
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))
    merged = "m0: &m0 {x: 1}\n" + "".join(
        f"m{n}: &m{n}\n  <<: [{', '.join([f'*m{n - 1}'] * 10)}]\n" for n in range(1, 12)
    )
    deep = random.choice((100, 3000))
    named = random.choice(
        ("someone/prior", "[someone/prior]", "../../x", "[]", "{a: b}", "[[a]]", "[5]", "!!int 5", "", "~")
    )
    lines = [
        f"prior: {named}",
        laughs,
        laughs + "prior: *a29",
        merged,
        merged + "prior: *m11",
        "prior: &x [*x]",
        "a: &a [*a]\nprior: *a",
        'prior: !!python/object/apply:os.system ["touch fuzz_canary"]',
        "prior: !!python/name:os.system",
        "prior: !!python/module:fuzz_canary",
        "prior: !!binary aGFsbG8=",
        "prior: 2001-99-99",
        "a: !!timestamp x",
        f"a: {'9' * 5000}",
        f"a: {'1:' * 5000}1",
        f"prior: {'[' * deep}",
        f"prior: {'{a: ' * deep}",
        "? [a, b]\n: c",
        "? {a: b}\n: c",
        "%YAML 9.9",
        "\tprior: x",
        "prior: |\n  x\n  y",
        "x: " + "a" * 70_000,
        "\x00",
        "prior: 'x",
        "<<: 3",
    ]
    text = "\n".join(random.sample(lines, random.choice((1, 1, 2, 4))))
    start = random.choice(("---\n",) * 6 + ("--- \r\n", "\n---\n", "---", "", "---\n---\n"))
    whole = (start + text + random.choice(("\n---\n",) * 4 + ("\n---", "", "\n...\n")) + "# Title\n").encode()
    return damaged(random, whole) if random.random() < 0.2 else whole
