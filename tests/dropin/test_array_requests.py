"""Arrays requested one by one: made in groups, in any order, and never sharing memory."""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import subprocess
import sys
import threading
from array import array
from typing import Any

import numpy as np
import pytest
from generated_files import BITS

import fastst_patch
from fastst_patch import engine
from fastst_patch.dropin import eligibility
from fastst_patch.errors import Fallback, FaststError
from fastst_patch.files import array_file

COUNT = 700
WAYS = [{}, {"io": "buffered"}, {"io": "direct"}, {"tensors": "owned"}]


@pytest.fixture(autouse=True)
def _small_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "SMALL_FOR_ARRAYS", 0)


def _content(raw: Any, dtypes: tuple[str, ...] = ("F32",), large: int = 0) -> bytes:
    """Many tensors, one of which may be large, and every 50th of which is empty."""
    header, data, rng = {}, b"", random.Random(1)
    for i in range(COUNT):
        length = large if large and i == 300 else 0 if i % 50 == 7 else 8
        dtype = dtypes[i % len(dtypes)]
        one = rng.randbytes(length * BITS[dtype] // 8)
        header[f"layers.{i}.w"] = raw.entry(dtype, [length], len(data), len(data) + len(one))
        data += one
    text = json.dumps(header)
    return raw.pack(text + " " * (-len(text) % 8), data)  # aligned, as safetensors writes files


def _orders(names: list[str]) -> dict[str, list[str]]:
    by_file = sorted(names, key=lambda name: int(name.split(".")[1]))
    shuffled = list(names)
    random.Random(2).shuffle(shuffled)
    return {
        "file": by_file,
        "sorted": sorted(names),
        "backwards": by_file[::-1],
        "tenth": by_file[::10],
        "random": shuffled,
        "two loops": [name for pair in zip(by_file, by_file[::-1], strict=True) for name in pair],
    }


@pytest.mark.parametrize("order", ["file", "sorted", "backwards", "tenth", "random", "two loops"])
@pytest.mark.parametrize("options", [{}, {"io": "buffered"}, {"verify": True}], ids=str)
def test_every_order(raw, stock, fast, assert_same, watch, order, options) -> None:
    path = raw.write(_content(raw, large=1 << 18))
    with stock.safe_open(path, "np") as handle:
        names = _orders(handle.keys())[order]
        expected = {name: handle.get_tensor(name) for name in names}
    with watch() as seen, fastst_patch.config_context(fallback="error", **options):
        with fast.safe_open(path, "np") as handle:
            found: list[tuple[str, np.ndarray]] = []
            for name in names:
                found.append((name, handle.get_tensor(name)))
                assert_same(found[-1][1], expected[name])
                if len(found) % 3 == 0:
                    found[-1][1][...] = 7  # shows through no other array
            for name, one in found[::3] + found[1::3]:
                assert_same(one, expected[name])
            assert_same({name: handle.get_tensor(name) for name in expected}, expected)
            for name, right in stock.all_tensors(handle).items():
                if name in expected:
                    assert_same(right, expected[name])
    assert "stock" not in seen.paths(path)


def test_groups_grow_and_are_handed_out(raw, fast, monkeypatch) -> None:
    made: list[int] = []
    over = array_file.arrays.over

    def counting(*args: Any, **kwargs: Any) -> Any:
        result = over(*args, **kwargs)
        made.append(len(result))
        return result

    monkeypatch.setattr(array_file.arrays, "over", counting)
    path = raw.write(_content(raw))
    with fast.safe_open(path, "np") as handle:
        for name in handle.keys():  # noqa: SIM118
            handle.get_tensor(name)
        assert sum(made) == COUNT
        assert made[0] == 2
        assert max(made) <= array_file.GROUP + 1
        assert len(made) < COUNT / 20
        assert not handle._opened.ready


def test_the_engine_makes_nothing_of_what_does_not_fit(raw) -> None:
    header = {"a": raw.entry("I16", [4], 0, 8), "b": raw.entry("I16", [2, 2], 8, 16)}
    layout = engine.read_layout(engine.open_file(raw.write(raw.pack(header, bytes(16)))))
    memory = memoryview(bytearray(layout.data_begin + 16))
    table = engine.np_table()
    make = functools.partial(engine.make_arrays, memory, layout, table, np.frombuffer)
    with pytest.raises(FaststError, match="dtype that was not looked up"):
        make()
    engine.set_np_dtype(table, layout.dtype(0), np.dtype("i2"))
    some, at = array("Q", [1, 0]), array("Q", [0, 3])  # the second is not aligned
    made, left = make(tensors=some, offsets=at)
    assert (made[0].shape, made[1:], left) == ((2, 2), [None], 1)
    with pytest.raises(FaststError, match="no such tensor"):
        make(tensors=array("Q", [2]))
    with pytest.raises(Fallback, match="NumPy refused a tensor: "):
        make(offsets=array("Q", [0, layout.data_begin + 10]))
    del made, make
    assert sys.getrefcount(memory) == 2


def test_reports_count_what_was_handed_out(raw, fast, watch) -> None:
    path = raw.write(_content(raw))
    with watch() as seen, fast.safe_open(path, "np") as handle:
        for i in range(10):
            handle.get_tensor(f"layers.{i}.w")
        assert handle._opened._arrays
    (report,) = [one for one in seen.reports if one.file == path]
    assert (report.tensors, report.bytes) == (10, 9 * 32)


def test_a_dtype_that_numpy_lacks(raw, stock, fast, agree) -> None:
    """It is refused when it is requested, and no neighbour with it."""
    path = raw.write(_content(raw, ("F32", "F16", "F32", "BF16", "I16")))
    handles = fast.safe_open(path, "np"), stock.safe_open(path, "np")
    for name in handles[1].keys():  # noqa: SIM118
        agree(*[lambda one=one, name=name: one.get_tensor(name) for one in handles])
    for one in handles:
        one.__exit__(None, None, None)


def test_threads_share_a_handle(raw, stock, fast) -> None:
    path = raw.write(_content(raw))
    with stock.safe_open(path, "np") as handle:
        expected = stock.all_tensors(handle)
    found: list[tuple[str, np.ndarray]] = []
    with fast.safe_open(path, "np") as handle:

        def walk() -> None:
            for name in expected:
                found.append((name, handle.get_tensor(name)))

        threads = [threading.Thread(target=walk) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 * COUNT
    addresses = {one.__array_interface__["data"][0] for _, one in found if one.size}
    assert len(addresses) == sum(one.size > 0 for _, one in found)
    for name, one in found:
        assert one.tobytes() == expected[name].tobytes()
        one[...] = 0


@pytest.mark.parametrize("options", [{}, {"io": "buffered"}, {"tensors": "owned"}], ids=str)
def test_each_array_has_a_base_of_its_own(raw, stock, fast, options) -> None:
    """Some look at the base to tell whether an array is a small part of something large."""
    path = raw.write(_content(raw))
    with stock.safe_open(path, "np") as handle:
        theirs = [handle.get_tensor("layers.0.w"), handle.get_slice("layers.0.w")[1:3]]
    with fastst_patch.config_context(**options), fast.safe_open(path, "np") as handle:
        ours = [handle.get_tensor("layers.0.w"), handle.get_slice("layers.0.w")[1:3]]
        again = [handle.get_tensor("layers.0.w"), handle.get_tensor("layers.1.w")]
        whole = list(stock.all_tensors(handle).values())
    for mine, other in zip(ours, theirs, strict=True):
        assert (type(mine.base), mine.base.shape) == (np.ndarray, other.base.shape)
        assert mine.base.dtype == other.base.dtype
    bases = [id(one.base) for one in (*ours, *again, *whole)]
    assert len(set(bases)) == len(bases)


def test_the_map_goes_with_the_last_array(raw, fast) -> None:
    before = engine.counters()["arenas"]
    path = raw.write(_content(raw))
    with fast.safe_open(path, "np") as handle:
        kept = handle.get_tensor("layers.3.w")
        handle.get_slice("layers.4.w")[2:]
        part = handle.get_tensor("layers.3.w")
    del handle
    gc.collect()
    assert engine.counters()["arenas"] == before + 1
    view = kept[2:4]
    del kept
    gc.collect()
    assert engine.counters()["arenas"] == before + 1
    del view
    gc.collect()
    assert engine.counters()["arenas"] == before
    assert part.size == 8


@pytest.mark.parametrize("index", [slice(2, 5), 3, (slice(1, 7),), (slice(None),), ...])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_slices_read_and_count_their_rows(
    raw, stock, fast, assert_same, watch, index, options
) -> None:
    path = raw.write(_content(raw))
    with stock.safe_open(path, "np") as handle:
        expected = handle.get_slice("layers.9.w")[index]
    with watch() as seen, fastst_patch.config_context(fallback="error", **options):
        with fast.safe_open(path, "np") as handle:
            assert_same(handle.get_slice("layers.9.w")[index], expected)
    (report,) = [one for one in seen.reports if one.file == path]
    assert (report.tensors, report.bytes) == (1, expected.nbytes)


FORK = """
import os, sys
import fastst_patch, safetensors
from fastst_patch.dropin import eligibility
eligibility.SMALL_FOR_ARRAYS = 0
fastst_patch.patch()
handle = safetensors.safe_open(sys.argv[1], "np")
right = {name: handle.get_tensor(name).tobytes() for name in handle.keys()}
handle = safetensors.safe_open(sys.argv[1], "np")
mine = handle.get_tensor("layers.0.w")
mine[:] = 1
handle.get_tensor("layers.1.w")[:] = 1
handle.get_slice("layers.2.w")[1:]
child = os.fork()
for name, value in right.items():  # the same in both
    found = handle.get_tensor(name)
    assert found.tobytes() == value, name
    found[...] = child != 0
assert (mine == 1).all()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("both", len(right))
"""


def test_a_forked_child_has_its_own(raw) -> None:
    path = raw.write(_content(raw))
    done = subprocess.run(
        [sys.executable, "-c", FORK, path],
        cwd=os.path.dirname(path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["both", str(COUNT)], done


@pytest.mark.parametrize("device", [np.array([1, 2]), "cpu", None, "CPU", b"cpu", 0])
def test_odd_devices(raw, stock, fast, agree, device) -> None:
    path = raw.write(_content(raw))
    agree(*[
        lambda one=one: one.safe_open(path, "np", device).get_tensor("layers.0.w")
        for one in (fast, stock)
    ])  # fmt: skip


def test_a_small_file_without_listeners(raw, fast, monkeypatch) -> None:
    """It is counted, and no report is made unless somebody wants it."""
    monkeypatch.setattr(eligibility, "SMALL_FOR_ARRAYS", 1 << 20)
    path = raw.write(_content(raw))

    def counts() -> tuple[int, int]:
        found = fastst_patch.stats()
        loads = found["paths"].get("stock", {"loads": 0})["loads"]
        return loads, found["fallbacks"].get("the file is small", 0)

    loads, fallbacks = counts()
    for arguments in ((path, "np"), (path,)):
        more = {} if len(arguments) == 2 else {"framework": "numpy", "device": "cpu"}
        assert type(fast.safe_open(*arguments, **more)).__name__ == "safe_open"
    assert type(fast.safe_open(filename=path, framework="np")).__name__ == "safe_open"
    assert counts() == (loads + 3, fallbacks + 3)
    with fastst_patch.profile() as profile:
        fast.safe_open(path, "np")
    (report,) = profile.reports
    assert (report.path, report.fallback_reason) == ("stock", "the file is small")


def test_path_bytes(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert engine.path_bytes(str(file)) == 5
    assert engine.path_bytes(str(tmp_path)) == -1
    assert engine.path_bytes(str(tmp_path / "none")) == -1
    assert engine.path_bytes("/\udc80") == -1
