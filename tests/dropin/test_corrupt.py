"""Broken, hostile and merely strange files: the same exception and text, or the same tensors.

Both loaders read the same bytes. Nothing here says what stock should answer, except in one test
that pins the texts other programs match on.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import pytest
import safetensors
from corrupt_files import DATA, FILES, GOOD, HEADERS, TOKENS, apply_edit, base, info, one
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError


@pytest.fixture
def both(raw, stock, fast, agree) -> Callable[[bytes], Any]:
    """Reads the bytes in every way there is, on both loaders; returns what load_file gave."""

    def describe(loaders: Any, path: str) -> Any:
        with loaders.safe_open(path, framework="pt") as handle:
            names = handle.keys()
            shapes = {n: handle.get_slice(n).get_shape() for n in names}
            dtypes = {n: handle.get_slice(n).get_dtype() for n in names}
            return names, handle.metadata(), shapes, dtypes

    def both(content: bytes) -> Any:
        path = raw.write(content)
        ours, _ = agree(lambda: fast.load_file(path), lambda: stock.load_file(path))
        names, _ = agree(lambda: describe(fast, path), lambda: describe(stock, path))
        agree(lambda: fast.safe_open(path, "np"), lambda: stock.safe_open(path, "np"))
        if names is not None:
            for name in names[0]:
                with fast.safe_open(path, "pt") as mine, stock.safe_open(path, "pt") as other:
                    get = functools.partial(lambda h, n: h.get_tensor(n), n=name)
                    agree(functools.partial(get, mine), functools.partial(get, other))
                    cut = functools.partial(lambda h, n: h.get_slice(n)[...], n=name)
                    agree(functools.partial(cut, mine), functools.partial(cut, other))
        return ours

    return both


@pytest.mark.parametrize("name", HEADERS)
def test_header(raw, both, name) -> None:
    header, size = HEADERS[name]
    both(raw.pack(header, DATA[:size]))


@pytest.mark.parametrize("name", FILES)
def test_file(both, name) -> None:
    both(FILES[name])


@pytest.mark.parametrize("opener", ["[", '{"x":'])
def test_nesting(raw, both, opener) -> None:
    """Stock's parser stops at 128 levels; ours must neither stop earlier nor go on."""
    closer = "]" if opener == "[" else "}"
    for depth in (*range(118, 132), 500, 990, 1100, 20_000):
        value = opener * depth + ("" if opener == "[" else "1") + closer * depth
        both(raw.pack(one(info(extra=f'"x":{value},')), DATA[:4]))
        both(raw.pack('{"a":' + value + "}"))
        both(raw.pack('{"__metadata__":' + value + "}"))
    both(raw.pack(opener * 100_000))


def test_what_stock_says_today(raw, fast, outcome) -> None:
    """The texts users and programs match on, so that stock and we cannot both drift unseen."""
    wide = one(info(shape="[4294967296,4294967296]"))
    worded = hasattr(safetensors, "_safe_open_handle")  # names of Rust's variants before 0.6
    for header, size, *texts in (
        ("[", 0, "InvalidHeaderDeserialization", "invalid JSON in header: "),
        (b'"\xff"', 0, "InvalidHeader", "invalid UTF-8 in header: "),
        (GOOD, 5, "MetadataIncompleteBuffer", "incomplete metadata, file not fully covered"),
        (one(info(offsets="[1,5]")), 5, 'InvalidOffset("a")', "invalid offset for tensor `a`"),
        (
            *(one(info(shape="[2]")), 4, "TensorInvalidInfo"),
            "invalid shape, data type, or offset for tensor",
        ),
        (wide, 4, "ValidationOverflow", "overflow computing buffer size"),
    ):
        path = raw.write(raw.pack(header, DATA[:size]))
        got = outcome(lambda path=path: fast.load_file(path))
        assert got.error is SafetensorError
        assert got.text.startswith("Error while deserializing header: " + texts[worded])
    for content, *texts in (
        (b"", "HeaderTooSmall", "header too small"),
        (struct.pack("<Q", 2**40), "HeaderTooLarge", "header too large"),
        (struct.pack("<Q", 9), "InvalidHeaderLength", "invalid header length"),
    ):
        path = raw.write(content)
        got = outcome(lambda path=path: fast.safe_open(path, "pt"))
        assert got.text == "Error while deserializing header: " + texts[worded]


_FIFO = """
import os, sys, fastst_patch, safetensors, safetensors.torch
path = sys.argv[1]
os.mkfifo(path)
keep = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # so that no open() blocks
os.write(keep, b"\\2\\0\\0\\0\\0\\0\\0\\0{}")
def attempt(load):
    try:
        return repr(load(path))
    except Exception as error:
        return f"{type(error)} {error}"
stock = attempt(safetensors.torch.load_file)
with fastst_patch.patched(small_file_bytes=0):
    print(stock == attempt(safetensors.torch.load_file), stock)
print(os.read(keep, 100))
"""


def test_fifo(tmp_path, warm_python) -> None:
    """The same refusal as stock, without waiting for bytes and without eating any."""
    done = warm_python.run(_FIFO, tmp_path / "fifo", folder=tmp_path)
    assert done.stdout.splitlines()[-1:] == ["b'\\x02\\x00\\x00\\x00\\x00\\x00\\x00\\x00{}'"], done
    assert done.stdout.startswith("True "), done


# ---------------------------------------------------------------- fuzz

_edits = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 10**6), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, 10**6), st.integers(1, 40)),
    st.tuples(st.just("insert"), st.integers(0, 10**6), st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("token"), st.integers(0, 10**6), st.sampled_from(TOKENS)),
    st.tuples(st.just("swap"), st.integers(0, 10**6), st.sampled_from(TOKENS)),
    st.tuples(st.just("double"), st.integers(0, 10**6), st.integers(1, 60)),
)


_many = settings(max_examples=20 * settings.default.max_examples)  # 2 ms an example
_some = settings(max_examples=4 * settings.default.max_examples)


@_many
@given(
    seed=st.integers(0, 2**20),
    edits=st.lists(_edits, min_size=1, max_size=3),
    fix_length=st.booleans() | st.just(True),
)
def test_fuzzed_header(raw, both, seed, edits, fix_length) -> None:
    header, data = base(seed)
    edited = header
    for edit in edits:
        edited = apply_edit(edited, edit)
    both(raw.pack(edited, data, length=None if fix_length else len(header)))


@_some
@given(seed=st.integers(0, 2**20), at=st.integers(0, 10**6), tail=st.binary(max_size=9))
def test_truncated_or_grown(raw, both, seed, at, tail) -> None:
    content = raw.pack(*base(seed))
    both(content[: at % (len(content) + 1)] + tail)


@_some
@given(
    seed=st.integers(0, 2**20),
    length=st.integers(0, 400) | st.integers(0, 2**64 - 1) | st.integers(99_999_990, 10**8),
)
def test_any_header_length(raw, both, seed, length) -> None:
    both(raw.pack(*base(seed), length=length))


@_some
@given(
    extents=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5),
    dtype=st.sampled_from(["U8", "F16", "F4"]),
    size=st.integers(0, 13),
)
def test_any_extents(raw, both, extents, dtype, size) -> None:
    """Gaps, overlaps, disorder, reversed pairs: shapes fit, so only the offsets can be wrong."""
    per_byte = {"U8": 1, "F16": 0.5, "F4": 2}[dtype]
    header = {
        f"t{i}": raw.entry(dtype, [int(max(0, stop - start) * per_byte)], start, stop)
        for i, (start, stop) in enumerate(extents)
    }
    both(raw.pack(header, DATA[:size]))
