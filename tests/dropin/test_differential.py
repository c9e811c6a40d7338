"""Generated files and generated calls, run on stock and on patched safetensors in lockstep.

Every result, every exception's type and text, and every byte that a tensor's storage holds has
to be equal, and a report has to show that the fast path (not stock behind our back) produced it.
"""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from generated_files import BITS, LOADABLE, files, nbytes_of
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import BAD_CALLS, BAD_NAMES, OPTIONS, Side

import fastst_patch

_ints = st.integers(-9, 9)
_bounds = st.one_of(st.none(), _ints, st.just(10**6), st.just(-(10**6)))
_slices = st.builds(slice, _bounds, _bounds, st.sampled_from([None, 1, 2, 3, 8, 0, -1]))
_atoms = st.one_of(
    _slices,
    _slices,
    _ints,
    st.just(Ellipsis),
    st.none(),
    st.booleans(),
    st.lists(st.integers(-5, 5), max_size=4),
    st.lists(st.booleans(), max_size=5),
    st.integers(-5, 5).map(np.int64),
    st.lists(st.integers(-3, 3), min_size=1, max_size=3).map(np.array),
    st.lists(st.integers(-3, 3), min_size=1, max_size=3).map(torch.tensor),
    st.lists(st.booleans(), min_size=1, max_size=5).map(torch.tensor),
    st.integers(-3, 3).map(torch.tensor),
    st.just(range(2)),
    st.sampled_from([1.5, "a", b"a", {}, object]),
)
_indices = st.one_of(_atoms, st.lists(_atoms, max_size=4).map(tuple))

_small = st.integers(0, 40)
_ops = st.one_of(
    st.tuples(st.just("open"), st.sampled_from(["pt", "torch", "pytorch"])),
    st.tuples(st.sampled_from(["keys", "offset_keys", "metadata", "get_tensors", "enter"]), _small),
    st.tuples(st.sampled_from(["exit", "exit_error"]), _small),
    st.tuples(st.just("get_tensor"), _small, _small),
    st.tuples(st.just("get_tensor"), _small, _small),
    st.tuples(st.just("get_slice"), _small, _small),
    st.tuples(st.sampled_from(["get_tensor", "get_slice"]), _small, st.sampled_from(BAD_NAMES)),
    st.tuples(st.just("index"), _small, _indices),
    st.tuples(st.just("index"), _small, _indices),
    st.tuples(st.sampled_from(["get_shape", "get_dtype"]), _small),
    st.tuples(st.just("bad_call"), _small, st.sampled_from(BAD_CALLS)),
    st.tuples(st.sampled_from(["mutate", "zero"]), _small, st.integers(0, 10**4)),
)


def _examples(factor: float) -> settings:
    """A multiple of the profile's examples, by what one costs (1 to 5 ms)."""
    return settings(max_examples=int(factor * settings.default.max_examples))


@_examples(8)
@given(file=files(), ops=st.lists(_ops, min_size=3, max_size=25))
def test_calls_in_lockstep(raw, stock, fast, agree, assert_same, watch, file, ops) -> None:
    path = raw.write(file.content)
    ours = Side(fast.safe_open, file, path)
    theirs = Side(stock.safe_open, file, path)
    with watch() as seen:
        for op in [("open", "pt"), *ops]:
            agree(functools.partial(ours.do, op), functools.partial(theirs.do, op))
            if op[0] in ("mutate", "zero"):  # seen through the same other tensors, or not at all
                assert_same(ours.tensors, theirs.tensors)
        for i in range(len(ours.handles)):
            agree(lambda i=i: ours.do(("exit", i)), lambda i=i: theirs.do(("exit", i)))
        assert_same(ours.tensors, theirs.tensors)
    if file.ours and any(tensor.numel() for tensor in ours.tensors):
        assert set(seen.paths(path)) - {"stock"}, seen.reports
    with open(path, "rb") as unchanged:
        assert unchanged.read() == file.content


@_examples(5)
@given(file=files())
def test_load_file(raw, stock, fast, agree, watch, file) -> None:
    path = raw.write(file.content)
    with watch() as seen:
        ours, theirs = agree(lambda: fast.load_file(path), lambda: stock.load_file(path))
    if ours is None:
        return
    assert file.order(list(ours)) == file.order(list(theirs))
    if file.ours and any(tensor.numel() for tensor in ours.values()):
        seen.assert_fast(path)
        assert sum(r.tensors for r in seen.reports) == len(ours)
        assert sum(r.bytes for r in seen.reports) == sum(
            t.untyped_storage().nbytes() for t in ours.values()
        )
        assert all(r.seconds >= 0 and r.fallback_reason is None for r in seen.reports)


@_examples(8)
@given(
    dtype=st.sampled_from(sorted(BITS)),
    shape=st.lists(st.integers(0, 6), max_size=4),
    indices=st.lists(_indices, min_size=1, max_size=10),
    pad=st.integers(0, 9),
)
def test_indexing(raw, stock, fast, agree, watch, dtype, shape, indices, pad) -> None:
    size = nbytes_of(dtype, shape)
    if size is None:
        return
    header = json.dumps({"t": raw.entry(dtype, shape, 0, size)}) + " " * pad
    part = random.Random(size).randbytes(size)
    path = raw.write(raw.pack(header, bytes(b & 1 for b in part) if dtype == "BOOL" else part))
    ours, theirs = agree(*(functools.partial(x.safe_open, path, "pt") for x in (fast, stock)))
    if theirs is None:  # a dtype that came later than this safetensors
        assert dtype not in LOADABLE
        return
    handed_out = 0
    with watch() as seen, ours, theirs:
        mine, other = ours.get_slice("t"), theirs.get_slice("t")
        agree(mine.get_shape, other.get_shape)
        agree(mine.get_dtype, other.get_dtype)
        for index in indices:
            got, _ = agree(lambda i=index: mine[i], lambda i=index: other[i])
            handed_out += 0 if got is None else got.numel()
    if handed_out:
        seen.assert_fast(path)


_F4 = getattr(torch, "float4_e2m1fn_x2", None)


@_examples(2)
@given(
    file=files(loadable=True),
    order=st.randoms(use_true_random=False),
    options=st.sampled_from(OPTIONS),
)
def test_options_change_no_value(raw, stock, fast, assert_same, watch, file, order, options):
    """io, tensors, chunk_bytes, threads: other ways to the same tensors."""
    path = raw.write(file.content)
    expected = stock.load_file(path)
    names = sorted(expected)
    if file.odd:
        options = {**options, "fallback": "auto"}
    with watch() as seen, fastst_patch.config_context(small_file_bytes=0, **options):
        ours = fast.load_file(path)
        with fast.safe_open(path, "pt") as handle:
            order.shuffle(names)
            single = {name: handle.get_tensor(name) for name in names}
            sliced = {n: handle.get_slice(n)[...] for n in names if expected[n].dtype != _F4}
    assert_same(ours, expected)
    assert_same(single, expected)
    assert_same(sliced, {name: expected[name] for name in sliced})
    if file.ours and any(tensor.numel() for tensor in ours.values()):
        seen.assert_fast(path, count=2)


@pytest.mark.parametrize("dtype", sorted(BITS))
@pytest.mark.parametrize("shape", [[4], [2, 4], [0], [3, 0, 2], [1, 8, 4], [2, 3], [4, 3]])
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_every_dtype(raw, stock, fast, agree, watch, dtype, shape, framework) -> None:
    size = nbytes_of(dtype, shape)
    if size is None:
        pytest.skip("not a whole number of bytes: see test_corrupt")
    data = bytes(i % 2 if dtype == "BOOL" else i * 37 % 251 for i in range(size))
    path = raw.write(raw.pack({"t": raw.entry(dtype, shape, 0, size)}, data))
    calls: list[Callable[[Any], Any]] = [lambda h: h.get_tensors()]
    for name in ("t", "missing"):
        calls += [
            lambda h, n=name: h.get_tensor(n),
            lambda h, n=name: h.get_slice(n).get_shape(),
            lambda h, n=name: h.get_slice(n).get_dtype(),
        ]
        for index in (slice(None), ..., 0, (slice(None), slice(1, None)), [1, 0], None):
            calls.append(lambda h, n=name, i=index: h.get_slice(n)[i])
    handed_out = 0
    with watch() as seen:
        opened = agree(*(functools.partial(x.safe_open, path, framework) for x in (fast, stock)))
        if opened == (None, None):  # a dtype that came later than this safetensors
            assert dtype not in LOADABLE
            return
        mine, other = opened
        for call in calls:
            got, _ = agree(functools.partial(call, mine), functools.partial(call, other))
            handed_out += got.numel() if isinstance(got, torch.Tensor) else 0
        mine.__exit__(None, None, None)
    if framework == "np":
        seen.assert_stock(path)
    elif handed_out:
        seen.assert_fast(path)


def test_fp8_and_friends_are_covered(raw, fast, watch) -> None:
    """The dtypes DLPack cannot carry are loaded by us, not quietly by stock."""
    if hasattr(safetensors.safe_open, "get_tensors") and _F4 is not None:  # all there by 0.8
        assert set(BITS) - LOADABLE == {"F6_E2M3", "F6_E3M2"}
    for dtype in sorted(LOADABLE):
        size = 2 * BITS[dtype]
        path = raw.write(raw.pack({"t": raw.entry(dtype, [16], 0, size)}, bytes(size)))
        with watch() as seen:
            assert fast.load_file(path)["t"].numel() == (8 if dtype == "F4" else 16)
        seen.assert_fast(path)


@pytest.mark.parametrize("count", [1000, 5000])
def test_many_tensors(raw, stock, fast, assert_same, watch, count) -> None:
    header = {f"experts.{i}.w": raw.entry("BF16", [2, 2], 8 * i, 8 * i + 8) for i in range(count)}
    path = raw.write(raw.pack(header, random.Random(0).randbytes(8 * count)))
    with watch() as seen:
        ours = fast.load_file(path)
    theirs = stock.load_file(path)
    assert list(ours) == list(theirs)
    assert_same(ours, theirs)
    seen.assert_fast(path)


@pytest.mark.parametrize("options", [{}, *OPTIONS[:4], OPTIONS[6], {"page_cache": "drop"}])
def test_cold_file(raw, stock, fast, assert_same, watch, options) -> None:
    """Nothing cached and reads still under way: whole, piecewise, or dropped half-way."""
    tensors = {f"t{i}": torch.arange(i, i + 2**19, dtype=torch.int32) for i in range(16)}
    path = raw.tensors(tensors)
    expected = stock.load_file(path)
    with watch() as seen, fastst_patch.config_context(small_file_bytes=0, **options):
        for turn in range(4):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with fast.safe_open(path, "pt") as handle:
                if turn % 2:
                    fast.load_file(path)  # let go while it is being read
                    assert_same(handle.get_slice("t15")[-5:].clone(), expected["t15"][-5:].clone())
                    assert_same(handle.get_tensor("t3"), expected["t3"])
                else:
                    assert_same(fast.load_file(path), expected)
                    for name in reversed(expected):
                        assert_same(handle.get_tensor(name), expected[name])
    seen.assert_fast(path, count=8)
