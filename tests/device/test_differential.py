"""Generated files and calls to a device, beside stock's on the CPU: the same names and bytes.

The fake driver is adversarial: whoever forgets to wait gets wrong bytes here.
"""

from __future__ import annotations

import functools
import os
import random
from typing import Any

import fake_device
import pytest
import torch
from generated_files import BITS, LOADABLE, File, files
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastst_patch
from fastst_patch import engine

MIB = 1 << 20
RING = {"ring", "ring+direct"}
WAYS = [{"tensors": t, "io": io} for t in ("dlpack", "owned") for io in ("buffered", "direct")]

_options = st.fixed_dictionaries(
    {
        "tensors": st.sampled_from(["auto", "dlpack", "owned"]),
        "io": st.sampled_from(["auto", "buffered", "direct"]),
        "page_cache": st.sampled_from(["auto", "keep", "drop"]),
        "chunk_bytes": st.sampled_from([64 << 10, 4 * MIB]),
        "threads": st.sampled_from([0, 1, 3]),
        "device_memory_budget": st.sampled_from([None, 0, 1, 100, 3000, 1 << 40]),
        "pinned_bytes": st.sampled_from([None, 0, 64 << 10, 1 << 40]),
        "fallback": st.just("error"),
    }
)


def _examples(factor: float) -> settings:
    return settings(max_examples=int(factor * settings.default.max_examples))


def _paths(seen: Any) -> set[str]:
    return {report.path for report in seen.reports}


@_examples(2)
@given(file=files(loadable=True), options=_options, device=st.sampled_from(["cuda", "cuda:1", 1]))
def test_load_file(cuda, raw, stock, fast, assert_same, watch, file, options, device) -> None:
    assume(not file.odd)
    path = raw.write(file.content)
    with watch() as seen, fastst_patch.config_context(**options):
        ours = fast.load_file(path, device=device)
    theirs = stock.load_file(path)
    assert_same(ours, theirs)
    assert file.order(list(ours)) == file.order(list(theirs))
    (load,) = seen.reports
    assert load.path in RING
    assert load.device == ("cuda:0" if device == "cuda" else "cuda:1")
    assert (load.tensors, load.bytes) == (len(ours), sum(t.nbytes for t in ours.values()))
    del ours
    assert cuda.driver.live().blocks == 0


_small = st.integers(0, 40)
_bounds = st.one_of(st.none(), st.integers(-9, 9), st.just(10**6), st.just(-(10**6)))
_atoms = st.one_of(
    st.builds(slice, _bounds, _bounds, st.sampled_from([None, 1, 1, 2, 3, 8, 0, -1])),
    st.builds(slice, _bounds, _bounds),
    st.integers(-9, 9),
    st.just(Ellipsis),
    st.none(),
)
_others = st.one_of(  # left to stock
    st.booleans(),
    st.lists(st.integers(-5, 5), max_size=4),
    st.lists(st.booleans(), max_size=5),
    st.lists(st.integers(-3, 3), min_size=1, max_size=3).map(torch.tensor),
    st.sampled_from([1.5, "a", {}]),
)
_plain = st.one_of(_atoms, st.lists(_atoms, max_size=4).map(tuple))
_any = st.one_of(_others, st.lists(_atoms | _others, max_size=4).map(tuple))
_ops = st.one_of(
    st.tuples(st.sampled_from(["keys", "offset_keys", "metadata", "get_tensors", "forget"])),
    st.tuples(st.sampled_from(["exit", "open"])),
    st.tuples(st.just("get_tensor"), _small),
    st.tuples(st.just("walk"), _small, _small),
    st.tuples(st.just("walk"), st.just(0), st.just(300)),
    st.tuples(st.just("slice"), _small),
    st.tuples(st.just("index"), _small, _plain),
    st.tuples(st.just("missing"), st.sampled_from(["no such", "__metadata__", 3, None, b"w"])),
)


class Caller:
    """One side's handle and slices, driven by operations."""

    def __init__(self, safe_open: Any, file: File, path: str) -> None:
        self.open = functools.partial(safe_open, path, "pt")
        self.file = file
        self.names = sorted(file.tensors)
        # The same on both sides: stock orders tensors of one extent at random.
        self.in_order = sorted(file.tensors, key=lambda name: (file.tensors[name][2:], name))
        self.handle = self.open()
        self.slices: list[Any] = []
        self.kept: list[Any] = []

    def do(self, kind: str, *args: Any) -> Any:
        result = getattr(self, kind)(*args)
        self.kept.append(result)
        return result

    def name(self, k: int) -> str:
        return self.names[k % len(self.names)] if self.names else "none"

    def forget(self) -> None:
        self.kept.clear()

    def exit(self) -> None:
        self.handle.__exit__(None, None, None)

    def reopen(self) -> None:
        self.handle = self.open()

    def keys(self) -> Any:
        return self.handle.keys()

    def offset_keys(self) -> Any:
        return self.file.order(self.handle.offset_keys())

    def metadata(self) -> Any:
        return self.handle.metadata()

    def get_tensors(self) -> Any:
        found = self.handle.get_tensors()
        return self.file.order(list(found)), found

    def get_tensor(self, k: int) -> Any:
        return self.handle.get_tensor(self.name(k))

    def walk(self, first: int, count: int) -> Any:
        return [self.handle.get_tensor(name) for name in self.in_order[first : first + count]]

    def missing(self, name: Any) -> Any:
        return self.handle.get_tensor(name)

    def slice(self, k: int) -> Any:
        self.slices.append(self.handle.get_slice(self.name(k)))
        return self.slices[-1].get_shape(), self.slices[-1].get_dtype()

    def index(self, k: int, index: Any) -> Any:
        return self.slices[k % len(self.slices)][index] if self.slices else None


def _kept(value: Any) -> Any:
    """A result as the device's copy of it would be."""
    return fake_device.on_device(value) if isinstance(value, torch.Tensor) else value


@_examples(3)
@given(file=files(loadable=True), ops=st.lists(_ops, min_size=3, max_size=20), options=_options)
def test_handle_in_lockstep(cuda, asked, raw, stock, fast, agree, watch, file, ops, options):
    assume(not file.odd)
    path = raw.write(file.content)
    asked.asked.clear()
    with watch() as seen, fastst_patch.config_context(**options):
        ours = Caller(functools.partial(fast.safe_open, device="cuda"), file, path)
        theirs = Caller(stock.safe_open, file, path)
        for kind, *args in ops:
            call = {"open": "reopen"}.get(kind, kind)
            agree(
                functools.partial(ours.do, call, *args),
                lambda call=call, args=args: _kept(theirs.do(call, *args)),
            )
        ours.exit()
    assert _paths(seen) <= RING
    # Stock was asked for its words only, never for a tensor.
    assert all(kind in ("missing", "index", "slice") for kind, *_ in ops) or not any(
        report.fallback_reason for report in seen.reports
    )
    del ours
    assert cuda.driver.live().blocks == 0


@_examples(3)
@given(
    dtype=st.sampled_from(sorted(LOADABLE - {"F4"})),
    shape=st.lists(st.integers(0, 6), max_size=4),
    plain=st.lists(_plain, min_size=1, max_size=8),
    others=st.lists(_any, max_size=3),
    pad=st.integers(0, 9),
    options=_options,
)
def test_indexing(
    cuda, asked, raw, stock, fast, agree, assert_same, dtype, shape, plain, others, pad, options
) -> None:
    """Own storage, and the strides that stock's copy to the device has."""
    size = BITS[dtype] // 8
    for length in shape:
        size *= length
    part = random.Random(size).randbytes(size)
    data = bytes(b & 1 for b in part) if dtype == "BOOL" else part
    header = {"p": raw.entry("U8", [pad], 0, pad), "t": raw.entry(dtype, shape, pad, pad + size)}
    path = raw.write(raw.pack(header, bytes(pad) + data))
    with fastst_patch.config_context(**{**options, "fallback": "auto"}):
        with fast.safe_open(path, "pt", device="cuda") as ours, stock.safe_open(path, "pt") as its:
            mine, other = ours.get_slice("t"), its.get_slice("t")
            assert (mine.get_shape(), mine.get_dtype()) == (other.get_shape(), other.get_dtype())
            asked.asked.clear()
            for index in plain:
                agree(lambda i=index: mine[i], lambda i=index: _kept(other[i]))
            assert asked.asked == []
            for index in others:
                agree(lambda i=index: _kept(mine[i]), lambda i=index: _kept(other[i]))


def test_a_column_does_not_hold_the_tensor(cuda, raw, stock, fast) -> None:
    path = raw.tensors({"w": torch.arange(512 * 512.0).view(512, 512)})
    with fast.safe_open(path, "pt", device="cuda") as handle:
        piece = handle.get_slice("w")
        column, row, number = piece[:, 7:9], piece[3], piece[5, 6]
    for part in (column, row, number):
        assert part.untyped_storage().nbytes() == part.nbytes
    assert torch.equal(column, stock.load_file(path)["w"][:, 7:9])
    assert cuda.driver.live().block_bytes == sum(part.nbytes for part in (column, row, number))


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("dtype", sorted(LOADABLE))
def test_every_dtype(cuda, asked, raw, stock, fast, agree, assert_same, dtype, options) -> None:
    """Each at an odd offset, whole, in rows, empty; F4 is halved, and its slices are stock's."""
    shapes = [[6, 4], [0], [3, 0, 2], [2], [1, 8, 4]] + ([[]] if BITS[dtype] >= 8 else [])
    header, data = {"pad": raw.entry("U8", [1], 0, 1)}, b"\1"
    for i, shape in enumerate(shapes):
        count = 1
        for length in shape:
            count *= length
        part = bytes((i + k * 37) % (2 if dtype == "BOOL" else 251) for k in range(count * 8))
        header[f"t{i}"] = raw.entry(dtype, shape, len(data), len(data) + count * BITS[dtype] // 8)
        data += part[: count * BITS[dtype] // 8]
    path = raw.write(raw.pack(header, data))
    expected = stock.load_file(path)
    with fastst_patch.config_context(**options, fallback="error"):
        assert_same(fast.load_file(path, device="cuda"), expected)
        with fast.safe_open(path, "pt", "cuda") as ours, stock.safe_open(path, "pt") as theirs:
            assert_same({name: ours.get_tensor(name) for name in expected}, expected)
            for name, tensor in expected.items():
                if dtype == "F4" and name != "pad":
                    for index in (slice(None), (slice(None), 0)):
                        agree(
                            lambda n=name, i=index: ours.get_slice(n)[i],
                            lambda n=name, i=index: theirs.get_slice(n)[i],
                        )
                elif tensor.dim():
                    other = theirs.get_slice(name)
                    agree(lambda n=name: ours.get_slice(n)[1:3], lambda o=other: _kept(o[1:3]))


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize(("odd", "shape", "nbytes"), [("F6_E2M3", [4], 3), ("F4", [2, 3], 3)])
def test_beside_a_tensor_that_cannot_be_made(
    cuda, asked, raw, stock, fast, agree, options, odd, shape, nbytes
) -> None:
    """The others are read ahead or alone, and that one is stock's to refuse."""
    header = {f"t{i}": raw.entry("U8", [3], 3 * i, 3 * i + 3) for i in range(8)}
    header["t4"] = raw.entry(odd, shape, 12, 12 + nbytes)
    path = raw.write(raw.pack(header, bytes(range(24))))
    order = [f"t{i}" for i in (0, 1, 2, 3, 5, 6, 7, 4, 0)]
    with fastst_patch.config_context(**options):
        with fast.safe_open(path, "pt", "cuda") as ours, stock.safe_open(path, "pt") as theirs:
            for name in order:
                agree(lambda n=name: ours.get_tensor(n), lambda n=name: theirs.get_tensor(n))
    assert set(asked.asked) <= {"handle"}


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_many_chunks(cuda, raw, stock, fast, assert_same, watch, options, seed) -> None:
    """Tensors over several chunks and chunks over several tensors, in every mode of the fake."""
    rnd = random.Random(seed)
    sizes = [rnd.choice([0, 1, 3, 999, 65536, 200_001, rnd.randrange(400_000)]) for _ in range(24)]
    header, at = {}, 0
    for i, size in enumerate(sizes):
        header[f"t{i:02}"] = raw.entry("U8", [size], at, at + size)
        at += size
    path = raw.write(raw.pack(header, rnd.randbytes(at)))
    if seed % 2:
        cuda.driver.lib.fake_mode(1, seed)
    if rnd.random() < 0.5:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    chosen = {"chunk_bytes": 64 << 10, "threads": rnd.choice([1, 2, 5]), "fallback": "error"}
    chosen["pinned_bytes"] = rnd.choice([0, 64 << 10, 200 << 10, None])
    chosen["device_memory_budget"] = rnd.choice([0, 300_000, 1 << 20, None])
    expected = stock.load_file(path)
    with watch() as seen, fastst_patch.config_context(**options, **chosen):
        before = engine.counters()["bytes_copied"]
        assert_same(fast.load_file(path, device="cuda"), expected)
        assert engine.counters()["bytes_copied"] - before == at
        with fast.safe_open(path, "pt", "cuda:1") as handle:
            names = handle.offset_keys() + rnd.sample(sorted(header), 10)
            for name in names:
                assert_same(handle.get_tensor(name), expected[name])
    assert _paths(seen) == {"ring+direct" if options["io"] == "direct" else "ring"}
    assert cuda.driver.live().blocks == 0


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_thousands_of_tensors(cuda, raw, stock, fast, assert_same, options) -> None:
    header = {f"experts.{i}.w": raw.entry("BF16", [2, 3], 12 * i, 12 * i + 12) for i in range(3000)}
    path = raw.write(raw.pack(header, random.Random(0).randbytes(12 * 3000)))
    expected = stock.load_file(path)
    with fastst_patch.config_context(**options, fallback="error"):
        ours = fast.load_file(path, device="cuda")
        assert list(ours) == list(expected)
        assert_same(ours, expected)
        with fast.safe_open(path, "pt", "cuda") as handle:
            walked = {name: handle.get_tensor(name) for name in handle.offset_keys()}
    assert_same(walked, expected)
    assert options["tensors"] == "owned" or cuda.allocated < 10


def test_files_with_nothing_in_them(cuda, raw, stock, fast, agree, watch) -> None:
    for content in (
        raw.pack({}),
        raw.pack({"__metadata__": {"a": "b"}}),
        raw.pack({"e": raw.entry("F32", [0], 0, 0), "f": raw.entry("I8", [2, 0], 0, 0)}),
    ):
        path = raw.write(content)
        with watch() as seen, fastst_patch.config_context(fallback="error"):
            agree(lambda p=path: fast.load_file(p, "cuda"), lambda p=path: stock.load_file(p))
            agree(
                lambda p=path: fast.safe_open(p, "pt", 0).metadata(),
                lambda p=path: stock.safe_open(p, "pt").metadata(),
            )
        assert _paths(seen) == {"ring"}
