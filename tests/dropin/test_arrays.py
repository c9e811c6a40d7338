"""``framework="np"``, and the libraries that make their tensors of arrays, against stock."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from generated_files import BITS, File, files, nbytes_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastst_patch
from fastst_patch.dropin import eligibility


@pytest.fixture(autouse=True)
def _small_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "SMALL_FOR_ARRAYS", 0)


NUMPY = {
    *("F64", "F32", "F16", "I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL"),
    *(["C64"] if "C64" in getattr(safetensors.numpy, "_TYPES", {}) else []),
}
_ints = st.integers(-3, 9)
_slices = st.builds(
    slice, st.one_of(st.none(), _ints), st.one_of(st.none(), _ints), st.sampled_from([None, 1, 2])
)
_atoms = st.one_of(
    _slices, _slices, _ints, st.just(...), st.none(), st.booleans(), st.just([]), st.just([0, 1]),
    _ints.map(np.int64), st.just("a"), st.just(1.5),
)  # fmt: skip
_indices = st.one_of(_atoms, st.lists(_atoms, max_size=4).map(tuple))
_small = st.integers(0, 40)
_ops = st.one_of(
    st.tuples(st.just("open"), st.sampled_from(["np", "numpy"])),
    st.tuples(st.sampled_from(["keys", "metadata", "get_tensors", "exit"]), _small),
    st.tuples(st.just("get_tensor"), _small, _small),
    st.tuples(st.just("get_tensor"), _small, _small),
    st.tuples(st.just("get_tensor"), _small, st.just("no such tensor")),
    st.tuples(st.just("index"), _small, _small, _indices),
    st.tuples(st.just("index"), _small, _small, _indices),
    st.tuples(st.just("mutate"), _small, st.integers(0, 10**4)),
)


def _of_numpy(file: File) -> bool:
    return not file.odd and all(dtype in NUMPY for dtype, *_ in file.tensors.values())


class Side:
    """One loader, driven by operations; remembers what it was given."""

    def __init__(self, safe_open: Any, file: File, path: str) -> None:
        self.safe_open, self.path = safe_open, path
        self.names = sorted(file.tensors)
        self.handles: list[Any] = []
        self.arrays: list[np.ndarray] = []

    def do(self, op: tuple[Any, ...]) -> Any:
        kind, *args = op
        if kind == "open":
            return self.handles.append(self.safe_open(self.path, args[0]))
        if kind == "mutate":
            if self.arrays:
                raw = self.arrays[args[0] % len(self.arrays)].reshape(-1).view(np.uint8)
                if raw.size:
                    raw[args[1] % raw.size] ^= 1
            return None
        handle = self.handles[args[0] % len(self.handles)]
        if kind == "exit":
            return handle.__exit__(None, None, None)
        if kind == "get_tensors":
            found = handle.get_tensors()
            self.arrays += [found[name] for name in sorted(found)]
            return found
        if kind in ("keys", "metadata"):
            return getattr(handle, kind)()
        name = args[1]
        if type(name) is int and self.names:
            name = self.names[name % len(self.names)]
        if kind == "get_tensor":
            self.arrays.append(handle.get_tensor(name))
        else:
            self.arrays.append(handle.get_slice(name)[args[2]])
        return self.arrays[-1]


OF_NUMPY = {
    "BOOL",
    "U8",
    "I8",
    "U16",
    "I16",
    "U32",
    "I32",
    "U64",
    "I64",
    "F16",
    "F32",
    "F64",
    "C64",
}


@settings(max_examples=2 * settings.default.max_examples)
@given(file=files(), ops=st.lists(_ops, min_size=3, max_size=25))
def test_calls_in_lockstep(raw, stock, fast, agree, assert_same, watch, file, ops) -> None:
    # Stock orders equal offsets at random, and so chooses which of several dtypes it refuses.
    empty = {dtype for dtype, _, begin, end in file.tensors.values() if begin == end}
    assume(len(empty - OF_NUMPY) < 2)
    path = raw.write(file.content)
    ours, theirs = (Side(one.safe_open, file, path) for one in (fast, stock))
    with watch() as seen:
        for op in [("open", "np"), *ops]:
            agree(functools.partial(ours.do, op), functools.partial(theirs.do, op))
            if op[0] == "mutate":  # no other array shows it
                assert_same(ours.arrays, theirs.arrays)
        for i in range(len(ours.handles)):
            agree(lambda i=i: ours.do(("exit", i)), lambda i=i: theirs.do(("exit", i)))
        assert_same(ours.arrays, theirs.arrays)
    if _of_numpy(file) and any(one.size for one in ours.arrays):
        assert set(seen.paths(path)) - {"stock"}, seen.reports
    with open(path, "rb") as unchanged:
        assert unchanged.read() == file.content


@settings(max_examples=2 * settings.default.max_examples)
@given(
    dtype=st.sampled_from(sorted(NUMPY)),
    shape=st.lists(st.integers(0, 6), max_size=4),
    indices=st.lists(_indices, min_size=1, max_size=10),
    options=st.sampled_from([{}, {"io": "buffered"}, {"io": "direct"}, {"tensors": "owned"}]),
)
def test_indexing(raw, stock, fast, agree, watch, dtype, shape, indices, options) -> None:
    size = nbytes_of(dtype, shape)
    data = bytes(i % 2 if dtype == "BOOL" else i * 37 % 251 for i in range(size))
    path = raw.write(raw.pack({"t": raw.entry(dtype, shape, 0, size)}, data))
    with (
        watch() as seen,
        fastst_patch.config_context(**options),
        fast.safe_open(path, "np") as ours,
        stock.safe_open(path, "np") as theirs,
    ):
        got = [agree(lambda i=i: ours.get_slice("t")[i], lambda i=i: theirs.get_slice("t")[i])[0]
               for i in indices]  # fmt: skip
    plain = [i for i, one in zip(indices, got, strict=True) if one is not None and i is ...]
    if plain and size:
        assert set(seen.paths(path)) - {"stock"}, seen.reports


@pytest.mark.parametrize("options", [
    {"io": "mmap"}, {"io": "buffered"}, {"io": "direct"}, {"page_cache": "drop"},
    {"tensors": "owned"}, {"io": "direct", "tensors": "owned"},
    {"verify": True, "fallback": "error"}, {"verify": True, "fallback": "error", "io": "buffered"},
])  # fmt: skip
def test_options_change_no_value(raw, stock, fast, assert_same, watch, options) -> None:
    content = _content(raw)
    path = raw.write(content)
    with stock.safe_open(path, "np") as handle:
        expected = stock.all_tensors(handle)
    with watch() as seen, fastst_patch.config_context(**options):
        assert_same(safetensors.numpy.load_file(path), expected)
        with fast.safe_open(path, "np") as handle:
            assert_same({name: handle.get_tensor(name) for name in expected}, expected)
            assert_same({name: handle.get_slice(name)[...] for name in expected}, expected)
    assert "stock" not in seen.paths(path), seen.reports


def _content(raw: Any, count: int = 40, length: int = 3000) -> bytes:
    header, at, data = {}, 0, b""
    for i in range(count):
        dtype = sorted(NUMPY)[i % len(NUMPY)]
        size = length * BITS[dtype] // 8
        header[f"t{i}"] = raw.entry(dtype, [length // 10, 10], at, at + size)
        data += bytes(size) if dtype == "BOOL" else os.urandom(size)
        at += size
    return raw.pack(header, data)


@pytest.mark.parametrize("options", [{}, {"io": "buffered"}, {"tensors": "owned"}], ids=str)
@pytest.mark.parametrize("shape", [[2**63 - 1, 0], [0, 2**63 - 1], [2**62, 0, 2], [3, 0, 2**61]])
def test_nothing_of_a_shape_that_is_too_large(raw, stock, fast, agree, options, shape) -> None:
    path = raw.write(raw.pack({"t": raw.entry("F32", shape, 0, 0)}))
    with (
        fastst_patch.config_context(**options),
        fast.safe_open(path, "np") as ours,
        stock.safe_open(path, "np") as theirs,
    ):
        for index in (..., 0, 4, slice(None), slice(1, 2), (0, 0), (slice(None), slice(0, 0))):
            agree(lambda i=index: ours.get_slice("t")[i], lambda i=index: theirs.get_slice("t")[i])
        agree(lambda: ours.get_tensor("t"), lambda: theirs.get_tensor("t"))
    agree(lambda: fast.load_arrays(path), lambda: stock.load_arrays(path))


def test_a_file_not_in_the_page_cache_is_read_ahead(raw, stock, fast, assert_same, watch) -> None:
    path = raw.write(_content(raw, 40, 100_000))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    with watch() as seen:
        ours = safetensors.numpy.load_file(path)
    with stock.safe_open(path, "np") as handle:
        assert_same(ours, stock.all_tensors(handle))
    assert set(seen.paths(path)) <= {"mmap", "mmap+readahead"}


def test_arrays_outlive_handle_and_file(raw, fast) -> None:
    path = raw.write(raw.pack({"t": raw.entry("U8", [5], 0, 5)}, b"hello"))
    handle = fast.safe_open(path, "np")
    found, part = handle.get_tensor("t"), handle.get_slice("t")
    handle.__exit__(None, None, None)
    del handle
    os.unlink(path)
    gc.collect()
    assert found.tobytes() == b"hello"
    assert part[1:3].tobytes() == b"el"
    assert pickle.loads(pickle.dumps(found)).tobytes() == b"hello"
    with pytest.raises(ValueError, match="own"):
        found.resize(2)


def test_threads_never_share_an_array(raw, fast) -> None:
    path = raw.write(raw.pack({"t": raw.entry("U8", [4096], 0, 4096)}, bytes(4096)))
    with fast.safe_open(path, "np") as handle:
        found: list[np.ndarray] = []
        threads = [
            threading.Thread(target=lambda: found.append(handle.get_tensor("t"))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, one in enumerate(found):
        assert not one.any()
        one[:] = i + 1
    assert sorted(int(one[0]) for one in found) == list(range(1, 9))


def test_an_unaligned_tensor_is_aligned(raw, stock, fast, assert_same) -> None:
    header = {"a": raw.entry("U8", [3], 0, 3), "b": raw.entry("F32", [2], 3, 11)}
    path = raw.write(raw.pack(header, bytes(range(11))))
    with fast.safe_open(path, "np") as ours, stock.safe_open(path, "np") as theirs:
        assert_same(ours.get_tensor("b"), theirs.get_tensor("b"))
        assert ours.get_tensor("b").flags.aligned


@pytest.mark.parametrize("framework", ["jax", "flax", "tf", "tensorflow", "paddle", "mlx", "nope"])
@pytest.mark.parametrize("device", ["cpu", "cuda", 0, "meta"])
def test_a_missing_library_or_device_is_stocks_to_refuse(
    raw, stock, fast, agree, framework, device
) -> None:
    library = {"flax": "jax", "tf": "tensorflow"}.get(framework, framework)
    if importlib.util.find_spec(library) is not None and (device == "cpu" or library == "paddle"):
        pytest.skip("it is not missing; and some cannot be imported beside others")
    path = raw.write(raw.pack({"t": raw.entry("F32", [2], 0, 8)}, bytes(8)))

    def load(safe_open: Any) -> Any:
        with safe_open(path, framework, device) as handle:
            return [np.asarray(handle.get_tensor("t")), np.asarray(handle.get_slice("t")[0:1])]

    agree(lambda: load(fast.safe_open), lambda: load(stock.safe_open))


WITHOUT_TORCH = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
import fastst_patch
print(fastst_patch.patch().reason)
with fastst_patch.profile() as profile:
    import safetensors.numpy
    found = safetensors.numpy.load_file(sys.argv[1])
    with safetensors.safe_open(sys.argv[1], "numpy") as handle:
        assert handle.get_slice("t2")[2:5].tobytes() == found["t2"][2:5].tobytes()
        handle.get_tensor("t3")
    try:
        handle.keys()
    except safetensors.SafetensorError as error:
        print(error)
print(sorted({report.path for report in profile.reports}), len(found), "torch" in sys.modules)
"""


def test_without_torch(raw) -> None:
    path = raw.write(_content(raw, length=20_000))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, path],
        cwd=os.path.dirname(path),  # not the checkout
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["None", "File is closed", "['mmap'] 40 False"], done
    assert done.stderr == ""


def test_a_small_file_is_stocks(raw, stock, fast, assert_same, watch, monkeypatch) -> None:
    content = raw.pack({"t": raw.entry("U8", [1 << 20], 0, 1 << 20)}, bytes(1 << 20))
    path = raw.write(content)
    for limit, expected in ((len(content), "stock"), (len(content) - 1, "mmap")):
        monkeypatch.setattr(eligibility, "SMALL_FOR_ARRAYS", limit)
        with watch() as seen, fastst_patch.config_context(fallback="error"):  # by design: no error
            found = safetensors.numpy.load_file(path)
        with stock.safe_open(path, "np") as handle:
            assert_same(found, stock.all_tensors(handle))
        assert seen.paths(path) == [expected]


def test_a_header_only_file(raw, stock, fast, agree) -> None:
    for header in ({}, {"__metadata__": {"a": "b"}}, {"e": raw.entry("F32", [0, 3], 0, 0)}):
        path = raw.write(raw.pack(header, b""))

        def load(one: Any, path: str = path) -> Any:
            with one.safe_open(path, "np") as handle:
                return handle.metadata(), stock.all_tensors(handle)

        agree(lambda load=load: load(fast), lambda load=load: load(stock))


def test_truncated(raw, stock, fast, agree) -> None:
    content = raw.pack({"t": raw.entry("F32", [2], 0, 8)}, bytes(8))
    path = raw.write(content[:-1])
    agree(lambda: fast.safe_open(path, "np"), lambda: stock.safe_open(path, "np"))
