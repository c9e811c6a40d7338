"""Generated safetensors files, with what is in them."""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors
from hypothesis import strategies as st

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def _loads(dtype: str) -> bool:
    """Whether this safetensors with this torch loads a dtype. Not before 0.6: F4, F8_E8M0, ..."""
    header = f'{{"x":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,{BITS[dtype] // 4}]}}}}'
    with tempfile.NamedTemporaryFile() as file:
        file.write(len(header).to_bytes(8, "little") + header.encode() + bytes(BITS[dtype] // 4))
        file.flush()
        try:
            return safetensors.safe_open(file.name, "pt").get_tensor("x") is not None
        except Exception:
            return False


LOADABLE = frozenset(dtype for dtype in BITS if _loads(dtype))
ODD_NAMES = (
    *("", " ", "a", "A", "a.b", "a/b", "a\\b", 'quo"te', "it's", "tab\t", "nul\0", "\x7f", "ü"),
    *("\ufeffbom", "日本語", "🦙", "e\u0301", "\u2028", "\ud7ff", "\ue000", "\U0010ffff"),
    *("__metadata", "dtype", "x" * 3000, "10", "9", "layer.10", "layer.9", "{", "\u200d"),
)


@dataclass(frozen=True)
class File:
    """A generated file: its bytes and what is in it."""

    content: bytes
    tensors: dict[str, tuple[str, list[int], int, int]]
    odd: bool  # a header whose reading may be left to stock

    def __repr__(self) -> str:
        return f"File({self.content[:2000]!r}, {len(self.content)} bytes)"

    @property
    def ours(self) -> bool:
        """Stock turns every tensor of it into a torch tensor, and so must the fast path."""
        return not self.odd and all(
            dtype in LOADABLE and (dtype != "F4" or shape[-1] % 2 == 0)
            for dtype, shape, _, _ in self.tensors.values()
        )

    def order(self, names: list[str]) -> tuple[list[tuple[int, int]], list[str]]:
        """Names in an order, comparable: stock orders tensors of one extent at random."""
        return [self.tensors[name][2:] for name in names], sorted(names)


def nbytes_of(dtype: str, shape: list[int]) -> int | None:
    bits = BITS[dtype] * math.prod(shape)
    return bits // 8 if bits % 8 == 0 else None


def composed(wanted: dict[str, tuple[str, list[int]]], metadata: Any, rnd: random.Random) -> File:
    """A valid file of tensors by name, dtype and shape, in a random order, style and spacing."""
    tensors, data = {}, b""
    for name in rnd.sample(sorted(wanted), len(wanted)):
        dtype, shape = wanted[name]
        size = nbytes_of(dtype, shape) or 0
        part = rnd.randbytes(size)
        data += bytes(b & 1 for b in part) if dtype == "BOOL" else part
        tensors[name] = (dtype, shape, len(data) - size, len(data))
    header: dict[str, Any] = {}
    for name in rnd.sample(sorted(tensors), len(tensors)):
        dtype, shape, start, stop = tensors[name]
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [start, stop])]
        header[name] = dict(rnd.sample(fields, 3))
    odd = metadata is None and rnd.random() < 0.1  # null is accepted, and means none
    if metadata is not None or odd:
        items = list(header.items())
        items.insert(rnd.randrange(len(items) + 1), ("__metadata__", metadata))
        header = dict(items)
    text = json.dumps(
        header,
        ensure_ascii=rnd.random() < 0.5,
        separators=rnd.choice([(",", ":"), (", ", ": "), (",\n", "\t:\r\n ")]),
    )
    # Odd lengths on purpose: tensors then start at addresses their dtype is not aligned to.
    text = rnd.choice(["", "", " ", "  \n"]) + text + " " * rnd.randrange(10)
    encoded = text.encode()
    odd |= "\\u0000" in text
    return File(len(encoded).to_bytes(8, "little") + encoded + data, tensors, odd)


_names = st.one_of(
    st.sampled_from(ODD_NAMES),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.from_regex(r"[a-z]{1,4}\.[0-9]{1,2}\.weight", fullmatch=True),
).filter(lambda name: name != "__metadata__")
_shapes = st.lists(st.sampled_from([0, 1, 2, 2, 3, 4, 4, 5, 8]), max_size=4)
_entries = st.tuples(st.sampled_from(sorted(BITS)), _shapes).filter(
    lambda entry: nbytes_of(*entry) is not None
)
_metadata = st.one_of(
    st.none(),
    st.just({}),
    st.dictionaries(st.text(max_size=4), st.text(max_size=8), max_size=3),
    st.just({"format": "pt"}),
)


@st.composite
def files(draw: Callable[..., Any], loadable: bool = False) -> File:
    wanted = draw(st.dictionaries(_names, _entries, max_size=8))
    rnd = random.Random(draw(st.integers(0, 2**32 - 1)))
    for i in range(draw(st.sampled_from([0] * 9 + [300]))):
        wanted[f"model.layers.{i}.w"] = (rnd.choice(("F32", "BF16", "U8")), [rnd.randrange(9)])
    if loadable:
        wanted = {
            name: (dtype, shape)
            for name, (dtype, shape) in wanted.items()
            if dtype in LOADABLE and (dtype != "F4" or shape[-1] % 2 == 0)
        }
    return composed(wanted, draw(_metadata), rnd)
