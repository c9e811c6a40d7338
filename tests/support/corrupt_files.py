"""Corrupt and odd headers and files, by name, and edits that make more of them."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

DATA = bytes(range(64))
GOOD = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


def info(
    dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]", extra: str = "", end: str = ""
) -> str:
    return f'{{{extra}"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{end}}}'


def one(info: str) -> str:
    return '{"a":' + info + "}"


# (header text, number of data bytes)
HEADERS: dict[str, tuple[str | bytes, int]] = {
    # -- JSON that is not JSON
    "empty": ("", 0),
    "only spaces": ("    ", 0),
    "open brace": ("{", 0),
    "unfinished": (GOOD[:-1], 4),
    "no colon": ('{"a" 1}', 0),
    "trailing comma": (one(info() + ","), 4),
    "trailing comma inside": (one(info(end=",")), 4),
    "trailing comma in shape": (one(info(shape="[1,]")), 4),
    "single quotes": (GOOD.replace('"', "'"), 4),
    "comment": (GOOD + "//x", 4),
    "garbage after": (GOOD + "x", 4),
    "second object after": (GOOD + GOOD, 4),
    "brace after": (GOOD + "}", 4),
    "nul after": (GOOD + "\0\0", 4),
    "nul before": ("\0" + GOOD, 4),
    "bom": ("\ufeff" + GOOD, 4),
    "form feed after": (GOOD + "\x0c", 4),
    "vertical tab before": ("\x0b" + GOOD, 4),
    "no-break space": ("\u00a0" + GOOD, 4),
    "line separator": (GOOD + "\u2028", 4),
    "white space": (" \t\r\n" + GOOD.replace(":", " \n:\t") + " \r\n\t ", 4),
    "newline in string": ('{"a\nb":' + info() + "}", 4),
    "tab in string": ('{"a\tb":' + info() + "}", 4),
    "delete in string": ('{"a\x7fb":' + info() + "}", 4),
    "bad escape": ('{"\\x41":' + info() + "}", 4),
    "short escape": ('{"\\u12":' + info() + "}", 4),
    "uppercase escape": ('{"\\u00E9":' + info() + "}", 4),
    "slash escape": ('{"\\/\\b\\f":' + info() + "}", 4),
    "python literals": ('{"__metadata__":None}', 0),
    # -- encodings
    "invalid utf-8": (GOOD.replace("a", "\xff", 1).encode("latin-1"), 4),
    "overlong utf-8": (b'{"\xc0\xaf":' + info().encode() + b"}", 4),
    "cut utf-8": (GOOD.encode() + b"\xe2\x82", 4),
    "surrogate as utf-8": (b'{"\xed\xa0\x80":' + info().encode() + b"}", 4),
    "beyond unicode": (b'{"\xf5\x80\x80\x80":' + info().encode() + b"}", 4),
    "utf-16": (GOOD.encode("utf-16"), 4),
    "utf-32": (GOOD.encode("utf-32-le"), 4),
    "latin-1": ('{"\xe9":'.encode("latin-1") + info().encode() + b"}", 4),
    "lone lead surrogate": ('{"\\ud800":' + info() + "}", 4),
    "lone trail surrogate": ('{"\\udc00":' + info() + "}", 4),
    "reversed surrogates": ('{"\\udc00\\ud800":' + info() + "}", 4),
    "surrogate then text": ('{"\\ud800x":' + info() + "}", 4),
    "surrogate pair": ('{"\\ud83e\\udd99":' + info() + "}", 4),
    "lone surrogate elsewhere": (one(info(extra='"x":"\\ud800",')), 4),
    "lone surrogate in metadata": ('{"__metadata__":{"a":"\\udfff"}}', 0),
    "nul name": ('{"\\u0000":' + info() + "}", 4),
    "escaped field": (one(info().replace("dtype", "dty\\u0070e")), 4),
    "escaped metadata key": ('{"\\u005f_metadata__":{"k":"v"},' + GOOD[1:], 4),
    "escaped dtype": (one(info(dtype='"F\\u00332"')), 4),
    # -- the wrong kind of thing
    **{f"top is {x}": (x, 0) for x in ("[]", "null", "1", '"a"', "true", "[{}]", "{}", "[[], {}]")},
    **{
        f"info is {x}": (one(x), 4)
        for x in ("null", "1", "[]", "{}", '"x"', "true", '["F32",[1],[0,4]]', '["F32",[1]]')
    },
    "info array too long": (one('["F32",[1],[0,4],1]'), 4),
    "info array wrong order": (one('[[1],"F32",[0,4]]'), 4),
    "dtype as enum map": (one(info(dtype='{"F32":null}')), 4),
    "dtype as enum map with value": (one(info(dtype='{"F32":1}')), 4),
    "dtype as two-entry map": (one(info(dtype='{"F32":null,"F16":null}')), 4),
    **{
        f"dtype {x}": (one(info(dtype=x)), 4)
        for x in ("null", "1", '"f32"', '"F128"', '""', '"F32 "', "[]", '["F32"]', "true", '"F8"')
    },
    **{
        f"shape {x}": (one(info(shape=x)), 4)
        for x in (
            *("null", "1", '"1"', "{}", '["1"]', "[null]", "[true]", "[[1]]", "[1.0]", "[1e0]"),
            *("[-1]", "[-0]", "[01]", "[+1]", "[0x1]", "[1_0]", "[.1]", "[1.]", "[1E2]", "[ 1 ]"),
            *("[NaN]", "[Infinity]", "[-Infinity]", "[nan]", "[1e400]", "[-1e400]", "[2]", "[0]"),
            *("[18446744073709551615]", "[18446744073709551616]", "[9223372036854775808]"),
            *("[4611686018427387904]", "[4611686018427387904,4]", "[2305843009213693952]"),
            *("[4294967296,4294967296]", "[4294967296,4294967296,4294967296]", "[1,1,1]", "[]"),
            *("[99999999999999999999999999999]", "[1,-9223372036854775809]", "[0,0]", "[1,1.5]"),
        )
    },
    **{
        f"offsets {x}": (one(info(offsets=x)), 4)
        for x in (
            *("null", "4", "{}", "[]", "[0]", "[0,4,4]", "[4,0]", "[0,5]", "[0,3]", "[1,5]"),
            *("[0.0,4]", "[-0,4]", "[0,-4]", "[0,4.0]", '["0","4"]', "[false,4]", "[null,4]"),
            *("[0,18446744073709551615]", "[18446744073709551612,18446744073709551615]"),
            *("[0,18446744073709551616]", "[0,1e1]", '{"0":0,"1":4}', "[0,04]", "[0,8]", "[4,8]"),
        )
    },
    # -- nothing in them, yet dimensions that overflow something
    **{
        f"no elements {x}": (one(info(shape=x, offsets="[0,0]")), 0)
        for x in (
            *("[0,9223372036854775808]", "[9223372036854775808,0]", "[0,4611686018427387904,2]"),
            *("[4611686018427387904,2,0]", "[9223372036854775808,4,0]", "[0,18446744073709551615]"),
            *("[0,9223372036854775807]", "[9223372036854775807,0]", "[0,4294967296,4294967296]"),
        )
    },
    "70 dimensions": (one(info(shape=str([1] * 70))), 4),
    "2000 dimensions": (one(info(shape=str([1] * 2000))), 4),
    # -- fields and keys
    "unknown field": (one(info(extra='"x":{"y":[1,null,"z"]},')), 4),
    "unknown field last": (one(info(end=',"shape2":[1]')), 4),
    "unknown field with NaN": (one(info(extra='"x":NaN,')), 4),
    "unknown field with 1e400": (one(info(extra='"x":1e400,')), 4),
    "unknown field with a long integer": (one(info(extra=f'"x":{"9" * 300},')), 4),
    "unknown field with a very long integer": (one(info(extra=f'"x":{"9" * 5000},')), 4),
    "unknown field with many digits": (one(info(extra=f'"x":0.{"1" * 5000},')), 4),
    "no dtype": (one('{"shape":[1],"data_offsets":[0,4]}'), 4),
    "no shape": (one('{"dtype":"F32","data_offsets":[0,4]}'), 4),
    "no offsets": (one('{"dtype":"F32","shape":[1]}'), 4),
    "dtype twice": (one(info(extra='"dtype":"F32",')), 4),
    "shape twice": (one(info(extra='"shape":[2],')), 4),
    "offsets twice": (one(info(extra='"data_offsets":[0,4],')), 4),
    "unknown twice": (one(info(extra='"x":1,"x":2,')), 4),
    "Dtype": (one(info().replace("dtype", "Dtype")), 4),
    "name twice": ('{"a":' + info() + ',"a":' + info() + "}", 4),
    "name twice, last differs": ('{"a":' + info(shape="[7]") + ',"a":' + info() + "}", 4),
    "name twice, first is broken": ('{"a":5,"a":' + info() + "}", 4),
    "name twice, first lacks dtype": ('{"a":{"shape":[]},"a":' + info() + "}", 4),
    "name twice, once escaped": ('{"a":5,"\\u0061":' + info() + "}", 4),
    "name twice, last is broken": ('{"a":' + info() + ',"a":null}', 4),
    # -- metadata
    **{
        f"metadata {x}": ('{"__metadata__":' + x + "," + GOOD[1:], 4)
        for x in (
            *("null", "{}", "[]", "1", '"x"', "true", '{"a":"b"}', '{"a":1}', '{"a":null}'),
            *('{"a":{}}', '{"a":"1","a":"2"}', '{"a":1,"a":"2"}', '{"":""}', '[["a","b"]]'),
            *('{"a":"\\u0000"}', '{"a":"x\ty"}', '{"a":1.5}', '{"a":true}', info()),
        )
    },
    "metadata twice": ('{"__metadata__":{},"__metadata__":{},' + GOOD[1:], 4),
    "metadata twice, null first": ('{"__metadata__":null,"__metadata__":{},' + GOOD[1:], 4),
    "metadata last": (GOOD[:-1] + ',"__metadata__":{"k":"v"}}', 4),
    "metadata only": ('{"__metadata__":{"k":"v"}}', 0),
    "metadata only, data after": ('{"__metadata__":{"k":"v"}}', 1),
    "nearly metadata": ('{"__metadata":{},' + GOOD[1:], 4),
    # -- sizes
    "no tensors, data after": ("{}", 1),
    "data too short": (GOOD, 3),
    "data too long": (GOOD, 5),
    "no data": (GOOD, 0),
    "f4 scalar": (one(info(dtype='"F4"', shape="[]", offsets="[0,0]")), 0),
    "f4 odd": (one(info(dtype='"F4"', shape="[3]", offsets="[0,2]")), 2),
    "f4 odd last dimension": (one(info(dtype='"F4"', shape="[2,3]", offsets="[0,3]")), 3),
    "f4 nothing": (one(info(dtype='"F4"', shape="[0,3]", offsets="[0,0]")), 0),
    "f6 odd": (one(info(dtype='"F6_E2M3"', shape="[3]", offsets="[0,2]")), 2),
    "f6": (one(info(dtype='"F6_E3M2"', shape="[4]", offsets="[0,3]")), 3),
}


def _two(first: tuple[int, int], second: tuple[int, int]) -> str:
    shape = [[(stop - start) // 4] for start, stop in (first, second)]
    return json.dumps(
        {
            name: {"dtype": "F32", "shape": shape[i], "data_offsets": list((first, second)[i])}
            for i, name in enumerate("ab")
        }
    )


HEADERS |= {
    "gap": (_two((0, 4), (8, 12)), 12),
    "gap at the start": (_two((4, 8), (8, 12)), 12),
    "overlap": (_two((0, 8), (4, 12)), 12),
    "same extent": (_two((0, 4), (0, 4)), 4),
    "same extent, two files' worth": (_two((0, 4), (0, 4)), 8),
    "contained": (_two((0, 12), (4, 8)), 12),
    "names against offsets": (_two((4, 8), (0, 4)), 8),
    "hole at the end": (_two((0, 4), (4, 8)), 12),
    "empty between": (_two((4, 4), (0, 4)), 4),
    "empty inside": (_two((2, 2), (0, 4)), 4),
    "empty at the end": (_two((0, 4), (4, 4)), 4),
    "empty beyond the end": (_two((0, 4), (8, 8)), 4),
    "both empty": (_two((0, 0), (0, 0)), 0),
    "backwards": (_two((0, 4), (8, 4)), 8),
}

FILES: dict[str, bytes] = {
    "no bytes": b"",
    "one byte": b"\0",
    "seven bytes": bytes(7),
    "eight zeros": bytes(8),
    "length without header": struct.pack("<Q", 2),
    "length one short": struct.pack("<Q", len(GOOD) - 1) + GOOD.encode() + DATA[:4],
    "length one long": struct.pack("<Q", len(GOOD) + 1) + GOOD.encode() + DATA[:4],
    "length is all": struct.pack("<Q", len(GOOD) + 4) + GOOD.encode() + DATA[:4],
    "length past the end": struct.pack("<Q", len(GOOD) + 5) + GOOD.encode() + DATA[:4],
    "big-endian length": struct.pack(">Q", len(GOOD)) + GOOD.encode() + DATA[:4],
    "not safetensors": b"PK\x03\x04" + bytes(100),
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    **{
        f"length {n}": struct.pack("<Q", n) + GOOD.encode() + DATA[:4]
        for n in (
            *(0, 1, 99_999_999, 100_000_000, 100_000_001, 2**31 - 1, 2**31, 2**32, 2**32 + 54),
            *(2**53, 2**63 - 1, 2**63, 2**64 - 9, 2**64 - 8, 2**64 - 1),
        )
    },
}


TOKENS = (
    *("0", "1", "-1", "-0", "1.0", "1e3", "18446744073709551615", "18446744073709551616", "00"),
    *("null", "true", "NaN", "Infinity", "[]", "{}", "[0,4]", "[4,8]", '"F32"', '"BF16"', '"F4"'),
    *('"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"a"', '"\\ud800"', '"\\n"'),
    *(",", ":", "[", "]", "{", "}", '"', " ", "\n", "\0", "\\", "\ufeff", "é", "\t"),
    *(',"a":null', ',"x":1', '"x":[[[[1]]]],', "[" * 140, "]" * 140, "9" * 400, '"a":{},'),
)


def base(seed: int) -> tuple[bytes, bytes]:
    """A valid header and its data: a few tensors, some empty, in any order of name and offset."""
    rnd = random.Random(seed)
    header, data = {}, b""
    for name in rnd.sample(["a", "b", "layer.0", "é", "10", "x" * 40], rnd.randint(0, 5)):
        dtype, size = rnd.choice([("F32", 4), ("U8", 1), ("BF16", 2), ("I64", 8), ("F8_E4M3", 1)])
        shape = rnd.choice([[], [1], [2], [0], [2, 2], [3, 0], [1, 3]])
        count = 1
        for dimension in shape:
            count *= dimension
        start = len(data)
        data += rnd.randbytes(count * size)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(data)]}
    items = rnd.sample(sorted(header.items()), len(header))
    if rnd.random() < 0.4:
        items.insert(rnd.randint(0, len(items)), ("__metadata__", {"format": "pt"}))  # type: ignore
    text = json.dumps(dict(items), ensure_ascii=rnd.random() < 0.5)
    return (text + " " * rnd.randint(0, 9)).encode(), data


def apply_edit(header: bytes, edit: tuple[str, int, Any]) -> bytes:
    kind, where, what = edit
    at = where % (len(header) + 1)
    if kind == "flip" and header:
        at %= len(header)
        return header[:at] + bytes([header[at] ^ what]) + header[at + 1 :]
    if kind == "cut":
        return header[:at] + header[at + what :]
    if kind == "insert":
        return header[:at] + what + header[at:]
    if kind == "double":
        return header[:at] + header[at : at + what] + header[at:]
    if kind in ("token", "swap"):
        # Tokens go where one begins: between characters few edits survive the first parser.
        places = [i for i, byte in enumerate(header) if byte in b'[]{},:"'] or [0]
        at = places[where % len(places)]
        gone = 1 if kind == "swap" else 0
        return header[:at] + what.encode() + header[at + gone :]
    return header
