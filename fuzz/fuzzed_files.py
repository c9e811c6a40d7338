"""Files for the differential fuzzer: valid ones, and what mutations of a header make of them.

A mutation works on the JSON text of a header's members, fields and numbers, so that most results
are still JSON and reach the rules behind the parser. Some edits of the whole text follow.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from corrupt_files import DATA, FILES, HEADERS, TOKENS, apply_edit
from generated_files import BITS, ODD_NAMES, File, composed, nbytes_of

__all__ = [
    "HEADER_LIMIT",
    "ReadBack",
    "another_of_its_size",
    "fuzzed_file",
    "pack",
    "read_back",
    "rebuilt",
]

HEADER_LIMIT = 100_000_000
"""Bytes of the longest header that stock reads."""

_FIRST_READ = (16 << 10) - 8  # bytes of a header that our first read brings
_LENGTHS = (0, 1, 2, 7, 8, HEADER_LIMIT, HEADER_LIMIT + 1, 2**31, 2**32, 2**53, 2**63, 2**64 - 1)
_DTYPES = sorted(BITS)
_SHAPES = ([], [1], [2], [4], [3], [8], [2, 2], [4, 2], [2, 1, 3], [0], [0, 3], [2, 0], [1, 1, 1])
_PLAIN_NAMES = ("weight", "bias", "a.weight", "layers.0.w", "layers.10.w", "x", "model.norm")
_METADATA: tuple[Any, ...] = (None, None, None, {}, {"format": "pt"}, {"a": "é", "b\n": "\\"})

NUMBERS = (
    *("0", "-0", "-1", "1", "2", "3", "1.0", "1e0", "1E1", "1e-1", "01", "+1", ".1", "1.", "0x1"),
    *("1_0", "NaN", "Infinity", "-Infinity", "null", "true", '"1"', "[1]", "{}", "", "1 ", "\t1"),
    *map(str, (2**31, 2**32, 2**53, 2**53 + 1, 2**60, 2**61, 2**62, 2**63 - 1, 2**63)),
    *map(str, (2**64 - 4, 2**64 - 1, 2**64, -(2**63), 10**30)),
    *("9" * 400, "1e400", "-1e400", "1" + "0" * 18, "0.5", "-1.5"),
)
_DTYPE_TEXTS = ('"f32"', '"F128"', '""', '"F32 "', "null", "1", '["F32"]', '"F\\u00332"',
                '{"F32":null}', '{"F32":1}', '"F8"', '"BOOL\\n"', '"I4"')  # fmt: skip
_VALUES = ("null", "1", "[]", "{}", '"x"', "true", '["F32",[1],[0,4]]', "[[1],[0,4]]", "-1.5e3")
_METADATA_TEXTS = (
    *("null", "{}", "[]", "1", '"x"', '{"a":"b"}', '{"a":1}', '{"a":null}', '{"a":{}}'),
    *('{"a":"1","a":"2"}', '{"":""}', '[["a","b"]]', '{"a":"\\u0000"}', '{"a":"x\ty"}'),
    *('{"a":"\\ud83e\\udd99"}', '{"a":"\\udfff"}', '{"\\u0061":"b","a":"c"}', '{ "a" : "b" }'),
    *('{"a":"b",}', '{"a":"b"}null', '{"fastst_patch":"x"}', '{"a":"' + "x" * 300 + '"}'),
)
_NAME_TEXTS = ('"\\u0061"', '"\\ud83e\\udd99"', '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"',
               '"\\/"', '"\\x41"', '"a\nb"', '"\\u00E9"', "'a'", "a", "1", '"__metadata__"',
               '"\\u005f_metadata__"', '"a\\"b"', '"fastst_patch stand-in: x"')  # fmt: skip
_SPACES = ("", " ", "  ", "\n", "\t", "\r\n", " \n\t ", "\x0b", "\x0c", "\u00a0", "\ufeff", "\0")
_ENDS = (" ", "   ", "\n", "\0", "x", "}", ",", "//", "\x0c", "\u2028", "{}", "null", "\xff")

Field = list[str]  # the JSON text of a key and of a value
Member = tuple[str, Any]  # the JSON text of a name; fields, or the JSON text of a value


class ReadBack(File):
    """A mutated file. What Python's own JSON reader finds in it serves for comparing orders."""

    def order(self, names: list[str]) -> tuple[list[tuple[int, int]], list[str]]:
        """As of `File`; names alone where the header is not what it seems."""
        try:
            return super().order(names)
        except KeyError:
            return [], sorted(names)


def read_back(content: bytes) -> ReadBack:
    """A file of these bytes, with the tensors that it seems to have."""
    tensors: dict[str, tuple[str, list[int], int, int]] = {}
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")].decode())
        for name, info in header.items():
            if name != "__metadata__":
                fields = list(info.values()) if isinstance(info, dict) else info
                dtype, shape, (begin, end) = (
                    (info["dtype"], info["shape"], info["data_offsets"])
                    if isinstance(info, dict)
                    else fields[:3]
                )
                tensors[name] = dtype, shape, begin, end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        pass  # most of them are meant to be wrong
    return ReadBack(content, tensors, True)


def pack(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A file's bytes; ``length`` in the place of the header's true length."""
    size = len(header) if length is None else length
    return (size & 2**64 - 1).to_bytes(8, "little") + header + data


def rebuilt(file: File, names: Sequence[str]) -> File:
    """A file of some tensors of another one, in the plainest form."""
    data = file.content[8 + int.from_bytes(file.content[:8], "little") :]
    header, kept = {}, b""
    for name in names:
        dtype, shape, begin, end = file.tensors[name]
        at, kept = len(kept), kept + data[begin:end]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, len(kept)]}
    return read_back(pack(json.dumps(header, separators=(",", ":")).encode(), kept))


def another_of_its_size(rnd: random.Random, content: bytes) -> bytes:
    """The same bytes but for one: of the header, a letter or digit."""
    if not content:
        return content
    length = min(int.from_bytes(content[:8], "little"), len(content) - 8)
    places = [i for i in range(8, 8 + length) if content[i : i + 1].isalnum()]
    at = rnd.choice(places or [len(content) - 1])
    return content[:at] + rnd.choice((b"0", b"4", b"8", b"F", b"a", b"z")) + content[at + 1 :]


def fuzzed_file(rnd: random.Random) -> File:
    """A valid file, as often as not, or a mutated one."""
    kind = rnd.random()
    if kind < 0.5:
        return _valid(rnd)
    if kind < 0.9:
        return read_back(_mutated(rnd))
    if kind < 0.97:
        return read_back(_resized(rnd, _valid(rnd).content))
    return read_back(_corpus(rnd))


# ---- valid ones ----


def _valid(rnd: random.Random) -> File:
    wanted = {}
    for _ in range(rnd.choice((0, 1, 1, 2, 2, 2, 3, 3, 4, 6))):
        name = rnd.choice(_PLAIN_NAMES if rnd.random() < 0.7 else ODD_NAMES)
        dtype, shape = rnd.choice(_DTYPES), list(rnd.choice(_SHAPES))
        if nbytes_of(dtype, shape) is not None:
            wanted[name] = dtype, shape
    if rnd.random() < 0.002:
        for i in range(rnd.randrange(400)):
            wanted[f"layers.{i}.w"] = rnd.choice(("F32", "BF16", "U8")), [rnd.randrange(9)]
    file = composed(wanted, rnd.choice(_METADATA), rnd)
    if rnd.random() < 0.01:  # where the header ends about as far as the first read goes
        length = int.from_bytes(file.content[:8], "little")
        header = file.content[8 : 8 + length].ljust(_FIRST_READ + rnd.randrange(-9, 10))
        content = pack(header, file.content[8 + length :])
        file = dataclasses.replace(file, content=content)
    return file


# ---- mutations of the header ----


def _draft(rnd: random.Random) -> tuple[list[Member], bytes]:
    """Members of a valid header, as text, and its data."""
    file = _valid(rnd)
    members: list[Member] = []
    for name, (dtype, shape, begin, end) in file.tensors.items():
        fields = [
            ['"dtype"', f'"{dtype}"'],
            ['"shape"', json.dumps(shape)],
            ['"data_offsets"', f"[{begin},{end}]"],
        ]
        members.append((json.dumps(name, ensure_ascii=rnd.random() < 0.5), fields))
    if rnd.random() < 0.3:
        members.append(('"__metadata__"', '{"format":"pt"}'))
    data = file.content[len(file.content) - _data_bytes(file) :]
    return members, data


def _data_bytes(file: File) -> int:
    return max((end for *_, end in file.tensors.values()), default=0)


def _mutated(rnd: random.Random) -> bytes:
    members, data = _draft(rnd)
    for _ in range(rnd.choice((1, 1, 1, 2, 3))):
        rnd.choice(_MUTATIONS)(rnd, members)
    header = _rendered(rnd, members).encode("utf-8", "surrogatepass")
    if rnd.random() < 0.2:
        for _ in range(rnd.choice((1, 1, 2))):
            header = apply_edit(header, _an_edit(rnd))
    if rnd.random() < 0.1:
        header += rnd.choice(_ENDS).encode("latin-1" if rnd.random() < 0.1 else "utf-8", "replace")
    if rnd.random() < 0.03:
        header = header.ljust(_FIRST_READ + rnd.randrange(-9, 10))
    if rnd.random() < 0.001:
        header = header.ljust(rnd.choice((65_536, 300_000, 1 << 20)) + rnd.randrange(-9, 10))
    if rnd.random() < 0.00003:
        header = header.ljust(HEADER_LIMIT + rnd.randrange(-1, 2))
    return pack(header, data)


def _an_edit(rnd: random.Random) -> tuple[str, int, Any]:
    kind = rnd.choice(("flip", "cut", "insert", "token", "swap", "double"))
    where = rnd.randrange(10**6)
    if kind == "flip":
        return kind, where, rnd.randrange(1, 256)
    if kind == "insert":
        return kind, where, rnd.randbytes(rnd.randrange(1, 5))
    if kind in ("token", "swap"):
        return kind, where, rnd.choice(TOKENS)
    return kind, where, rnd.randrange(1, 60)


def _rendered(rnd: random.Random, members: Sequence[Member]) -> str:
    style = rnd.random()
    comma, colon = (",", ":") if style < 0.5 else (", ", ": ")

    def space() -> str:  # hardly ever: one wrong space hides what else is wrong
        return rnd.choice(_SPACES[:7] if rnd.random() < 0.9 else _SPACES) if style > 0.9 else ""

    def value(one: Any) -> str:
        if isinstance(one, str):
            return one
        return "{" + comma.join(f"{space()}{k}{colon}{v}{space()}" for k, v in one) + "}"

    body = comma.join(f"{space()}{name}{colon}{value(one)}{space()}" for name, one in members)
    return space() + "{" + body + "}" + " " * rnd.choice((0, 0, 1, 3, 8))


def _with_fields(
    change: Callable[[random.Random, list[Field]], None],
) -> Callable[[random.Random, list[Member]], None]:
    """A mutation of one tensor's fields."""

    def mutate(rnd: random.Random, members: list[Member]) -> None:
        fields = [one for _, one in members if isinstance(one, list) and one]
        if fields:
            change(rnd, rnd.choice(fields))

    return mutate


def _numbers_of(rnd: random.Random, fields: list[Field], key: str) -> tuple[Field, list[str]]:
    """The field of a key, or any field, and the numbers in its array, as text."""
    field = next((one for one in fields if one[0] == key), rnd.choice(fields))
    inner = field[1].strip("[]")
    return field, [one.strip() for one in inner.split(",")] if inner else []


def _write(field: Field, numbers: Sequence[object]) -> None:
    field[1] = "[" + ",".join(map(str, numbers)) + "]"


def _near(rnd: random.Random, text: str) -> str:
    try:
        return str(int(text) + rnd.choice((-8, -4, -2, -1, 1, 2, 4, 8)))
    except ValueError:
        return text


def _change_one(rnd: random.Random, fields: list[Field], name: str, near: float) -> None:
    """Change one number of a list: with a probability to one near it."""
    field, numbers = _numbers_of(rnd, fields, name)
    if numbers:
        at = rnd.randrange(len(numbers))
        numbers[at] = _near(rnd, numbers[at]) if rnd.random() < near else rnd.choice(NUMBERS)
        _write(field, numbers)


@_with_fields
def _offset(rnd: random.Random, fields: list[Field]) -> None:
    _change_one(rnd, fields, '"data_offsets"', 0.5)


@_with_fields
def _offsets(rnd: random.Random, fields: list[Field]) -> None:
    field, numbers = _numbers_of(rnd, fields, '"data_offsets"')
    what = rnd.randrange(6)
    if what == 0:
        numbers.reverse()
    elif what == 1:
        delta = rnd.choice((-4, -1, 1, 4, 8, 2**62))
        numbers = [str(int(n) + delta) if n.isdigit() else n for n in numbers]
    elif what == 2:
        numbers = numbers[:1]
    elif what == 3:
        numbers.append("0")
    elif what == 4:
        numbers = numbers[:1] * 2
    else:
        numbers = [rnd.choice(NUMBERS) for _ in range(2)]
    _write(field, numbers)


@_with_fields
def _dimension(rnd: random.Random, fields: list[Field]) -> None:
    _change_one(rnd, fields, '"shape"', 0.4)


@_with_fields
def _shape(rnd: random.Random, fields: list[Field]) -> None:
    """Most of these leave as many elements as there were."""
    field, numbers = _numbers_of(rnd, fields, '"shape"')
    what = rnd.randrange(6)
    if what == 0:
        rnd.shuffle(numbers)
    elif what == 1:
        for _ in range(rnd.choice((1, 1, 2, 62, 63, 64, 65, 70))):
            numbers.insert(rnd.randrange(len(numbers) + 1), "1")
    elif what == 2:
        numbers.insert(rnd.randrange(len(numbers) + 1), rnd.choice(("0", "2", *NUMBERS)))
    elif what == 3:
        numbers = numbers[1:]
    elif what == 4:  # no elements, whatever the others are
        numbers = [*numbers, "0", rnd.choice(NUMBERS)]
        rnd.shuffle(numbers)
    else:
        numbers = [rnd.choice(NUMBERS) for _ in range(rnd.randrange(1, 4))]
    _write(field, numbers)


@_with_fields
def _dtype(rnd: random.Random, fields: list[Field]) -> None:
    field, _ = _numbers_of(rnd, fields, '"dtype"')
    old = BITS.get(field[1].strip('"'))
    alike = [name for name in _DTYPES if BITS[name] == old] or _DTYPES
    which = rnd.choice(alike if rnd.random() < 0.5 else _DTYPES)
    field[1] = f'"{which}"' if rnd.random() < 0.7 else rnd.choice(_DTYPE_TEXTS)


def _nested(rnd: random.Random) -> str:
    depth = rnd.choice((1, 2, 3, 60, 120, *range(123, 131), 200, 1500))
    if rnd.random() < 0.5:
        return "[" * depth + "]" * depth
    return '{"x":' * depth + "1" + "}" * depth


@_with_fields
def _field(rnd: random.Random, fields: list[Field]) -> None:
    what = rnd.randrange(6)
    at = rnd.randrange(len(fields))
    if what == 0:
        del fields[at]
    elif what == 1:
        fields.insert(rnd.randrange(len(fields) + 1), list(fields[at]))
    elif what == 2:
        value = _nested(rnd) if rnd.random() < 0.5 else rnd.choice((*_VALUES, *NUMBERS))
        fields.insert(rnd.randrange(len(fields) + 1), ['"x"', value])
    elif what == 3:
        fields[at][0] = rnd.choice(('"Dtype"', '"dty\\u0070e"', '""', '"shape "', "shape"))
    elif what == 4:
        fields[at][1] = rnd.choice(_VALUES)
    else:
        rnd.shuffle(fields)


def _member(rnd: random.Random, members: list[Member]) -> None:
    what = rnd.randrange(6)
    if not members:
        members.append(('"a"', rnd.choice(_VALUES)))
        return
    at = rnd.randrange(len(members))
    name, value = members[at]
    if what == 0:
        del members[at]
    elif what == 1:
        copy = [list(one) for one in value] if isinstance(value, list) else value
        members.insert(rnd.randrange(len(members) + 1), (name, copy))
    elif what == 2:
        members[at] = name, _nested(rnd) if rnd.random() < 0.3 else rnd.choice(_VALUES)
    elif what == 3:
        rnd.shuffle(members)
    elif what == 4 and isinstance(value, list):
        members[at] = name, "[" + ",".join(one for _, one in value) + "]"
    else:
        members.insert(rnd.randrange(len(members) + 1), (rnd.choice(_NAME_TEXTS), value))
        if rnd.random() < 0.5:
            members.remove((name, value))


def _name(rnd: random.Random, members: list[Member]) -> None:
    if members:
        at = rnd.randrange(len(members))
        chosen = json.dumps(rnd.choice(ODD_NAMES), ensure_ascii=rnd.random() < 0.5)
        members[at] = rnd.choice((chosen, rnd.choice(_NAME_TEXTS))), members[at][1]


def _metadata(rnd: random.Random, members: list[Member]) -> None:
    text = _nested(rnd) if rnd.random() < 0.1 else rnd.choice(_METADATA_TEXTS)
    members.insert(rnd.randrange(len(members) + 1), ('"__metadata__"', text))


def _exchange(rnd: random.Random, members: list[Member]) -> None:
    """The offsets of two tensors, each other's: gaps and overlaps, or another order."""
    fields = [one for _, one in members if isinstance(one, list) and one]
    if len(fields) > 1:
        one, other = (
            _numbers_of(rnd, chosen, '"data_offsets"')[0] for chosen in rnd.sample(fields, 2)
        )
        one[1], other[1] = other[1], one[1]


_MUTATIONS: tuple[Callable[[random.Random, list[Member]], None], ...] = (
    _offset, _offset, _offsets, _dimension, _dimension, _shape, _shape, _dtype, _field, _field,
    _member, _member, _name, _metadata, _exchange,
)  # fmt: skip


# ---- mutations of the file ----


def _resized(rnd: random.Random, content: bytes) -> bytes:
    """Cut short, made longer, or with another header length than the true one."""
    what = rnd.randrange(4)
    length = int.from_bytes(content[:8], "little")
    if what == 0:
        return content[: rnd.randrange(len(content) + 1)]
    if what == 1:
        near = max(len(content) - rnd.randrange(1, 10), 0)
        return (
            content[:near] if rnd.random() < 0.5 else content + rnd.randbytes(len(content) - near)
        )
    if what == 2:
        return pack(content[8:], b"", length + rnd.choice((-8, -2, -1, 1, 2, 8, 1 << 32)))
    chosen = rnd.choice(_LENGTHS) if rnd.random() < 0.7 else rnd.randrange(len(content) + 9)
    return pack(content[8:], b"", chosen)


_CORPUS = [
    *FILES.values(),
    *(
        pack(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text, DATA[:size])
        for text, size in HEADERS.values()
    ),
]


def _corpus(rnd: random.Random) -> bytes:
    """A file that is known to be odd, or two edits away from one."""
    content = rnd.choice(_CORPUS)
    if rnd.random() < 0.5:
        return content
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    for _ in range(rnd.choice((1, 2))):
        header = apply_edit(header, _an_edit(rnd))
    return pack(header, data)
