"""Memory, drivers and disks that fail during loads to a device: stock's result, or its error.

Each single call fails in the fault matrix (tests/faults); here is what errors and reports say.
Before stock is asked nothing of ours is left on the device: a load that nearly fits must.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from numbered import file_of_numbers
from safetensors import SafetensorError

import fastst_patch
from fastst_patch import engine

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

WAYS = {
    f"{tensors}-{io}": {"tensors": tensors, "io": io, "chunk_bytes": 64 << 10, "threads": 2}
    for tensors in ("dlpack", "owned")
    for io in ("buffered", "direct")
}
CALLS = ("load_file", "get_tensors", "walk", "rows")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: on a busy machine, more of them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _nothing_left(cuda, nothing_left) -> Iterator[None]:
    """Neither in the engine nor on the device, once the tensors handed out are freed."""
    yield
    engine.clear_faults()
    cuda.driver.clear()
    gc.collect()
    engine.shutdown()
    left = cuda.driver.live()
    assert (left.blocks, left.ranges, cuda.driver.lib.fake_pending()) == (0, 0, 0)


@pytest.fixture(params=WAYS)
def way(request) -> Iterator[str]:
    with fastst_patch.config_context(**WAYS[request.param]):
        yield request.param


def _load(loaders: Any, call: str, path: str) -> dict[str, torch.Tensor]:
    """Copies, so that nothing handed out is alive while the rest is loaded."""
    if call == "load_file":
        return loaders.load_file(path, device="cuda")
    with loaders.safe_open(path, "pt", device="cuda") as handle:
        if call == "get_tensors":
            return handle.get_tensors()
        if call == "walk":
            return {name: handle.get_tensor(name).clone() for name in handle.offset_keys()}
        shapes = {name: handle.get_slice(name).get_shape() for name in handle.offset_keys()}
        return {
            name: (handle.get_slice(name)[:] if shape else handle.get_tensor(name)).clone()
            for name, shape in shapes.items()
        }


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("budget", [0, 400_000, None])
def test_out_of_memory_at_every_allocation(
    cuda, asked, model, fast, stock, assert_same, way, call, budget
) -> None:
    expected = stock.load_file(model)
    with fastst_patch.config_context(device_memory_budget=budget):
        for k in range(1, 40):
            cuda.allocated, cuda.refuse_from = 0, k
            asked.asked.clear()
            asked.alive.clear()
            assert_same(_load(fast, call, model), expected)
            assert set(asked.alive) <= {0}, k
            if cuda.allocated < k:
                break
            # Reading ahead may do without; a tensor that was asked for may not.
            assert asked.asked or call == "walk", k
    assert cuda.allocated < k
    assert asked.asked == []


@pytest.mark.parametrize("call", CALLS)
def test_out_of_memory_is_torchs(cuda, asked, model, fast, way, call) -> None:
    """Stock has no memory either: its own exception, with no trace of our attempt."""
    cuda.refuse_from = 1
    asked.error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    with pytest.raises(torch.cuda.OutOfMemoryError, match="Tried to allocate") as caught:
        _load(fast, call, model)
    assert caught.value is asked.error
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    assert asked.alive == [0]
    asked.error.__traceback__ = None  # it keeps the handle


def test_a_tensor_that_fits_alone(cuda, asked, model, fast, stock, assert_same, watch, way) -> None:
    """Tensors read ahead are freed before stock is asked for a tensor."""
    expected = stock.load_file(model)
    with watch() as seen, fast.safe_open(model, "pt", "cuda") as handle:
        names = handle.offset_keys()
        for name in names[:3]:
            handle.get_tensor(name)
        cuda.refuse_from = 1
        assert_same(handle.get_tensor(names[0]), expected[names[0]])
    assert asked.alive == [0]
    assert "not enough memory on cuda:0" in seen.reports[-1].fallback_reason


@pytest.mark.parametrize("first", [1, 2, 3])
def test_pinning_refused(cuda, asked, model, fast, stock, assert_same, way, first) -> None:
    expected = stock.load_file(model)
    engine.shutdown()
    cuda.driver.lib.fake_refuse_pin(first, 1 << 40)
    for call in CALLS:
        assert_same(_load(fast, call, model), expected)
    assert asked.asked == []
    assert cuda.driver.live().ranges == min(first - 1, 2 * 2 + 1)
    assert (cuda.driver.lib.fake_pageable_copies() > 1) == (first == 1)


# ---------------------------------------------------------------- the driver


def test_errors_of_a_fallback_are_stocks_alone(cuda, asked, model, fast, way) -> None:
    for call in CALLS:
        cuda.driver.clear()
        cuda.driver.fail("cuMemcpyHtoDAsync_v2", 1, 1 << 40)
        asked.error = RuntimeError("CUDA error: unspecified launch failure")
        with pytest.raises(RuntimeError, match="unspecified launch") as caught:
            _load(fast, call, model)
        assert caught.value.__context__ is None
        asked.error.__traceback__ = None  # it keeps the handle
    assert set(asked.alive) == {0}


@pytest.mark.parametrize("call", CALLS)
def test_fallback_option(cuda, asked, model, fast, way, call) -> None:
    cuda.driver.fail("cuMemcpyHtoDAsync_v2", 1, 1 << 40)
    with fastst_patch.config_context(fallback="error"):
        with pytest.raises(fastst_patch.FaststError, match="left to stock"):
            _load(fast, call, model)
    with fastst_patch.config_context(fallback="warn"):
        with pytest.warns(fastst_patch.FallbackWarning, match="left to stock"):
            _load(fast, call, model)


# ---------------------------------------------------------------- bytes


def _spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "compare", lambda *args, **kwargs: False)


@pytest.mark.parametrize("call", CALLS)
def test_bytes_that_arrive_wrong(
    cuda, asked, model, fast, stock, assert_same, monkeypatch, watch, caplog, way, call
) -> None:
    """The first load is read back; once it differs stock does all for that device."""
    expected = stock.load_file(model)
    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR, "fastst_patch"):
        _spoil(patched)
        assert_same(_load(fast, call, model), expected)
    assert sum("bytes read back from cuda:0" in r.getMessage() for r in caplog.records) == 1
    assert set(asked.alive) == {0}
    before = engine.counters()["bytes_copied"]
    with watch() as seen:
        assert_same(fast.load_file(model, device="cuda"), expected)
    assert engine.counters()["bytes_copied"] == before
    assert {r.path for r in seen.reports} == {"stock"}
    assert "read back" in seen.reports[0].fallback_reason
    with watch() as seen:  # another device is not to blame
        assert_same(fast.load_file(model, device="cuda:1"), expected)
    assert seen.reports[0].path.startswith("ring")


# ---------------------------------------------------------------- the disk


def _fault_of(way: str) -> str:
    return "pread" if way.endswith("direct") else "preadv"


def _header_reads(path: str) -> int:
    engine.set_fault("pread", first=1 << 62)
    engine.read_layout(engine.open_file(path))
    reads = engine.fault_calls("pread")
    engine.clear_faults()
    return reads


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("short", [False, True])
def test_unreadable(cuda, asked, model, fast, stock, assert_same, way, call, short) -> None:
    """The type of error that reading to the CPU raises, with the file and the offset."""
    for first in (1, 3, 9):
        name = _fault_of(way)
        after = _header_reads(model) if name == "pread" else 0
        fault: dict[str, int] = {"short_bytes": 0} if short else {"errno": errno.EIO}
        engine.set_fault(name, first=first + after, **fault)
        with pytest.raises(SafetensorError if short else OSError) as caught:
            _load(fast, call, model)
        engine.clear_faults()
        assert model in str(caught.value)
        assert "offset" in str(caught.value)
        assert short or caught.value.errno == errno.EIO
        # An exception that the caller keeps does not keep device memory.
        assert cuda.driver.live().blocks == 0
    assert asked.asked == []
    assert_same(_load(fast, call, model), stock.load_file(model))


def test_harmless(cuda, asked, model, fast, stock, assert_same, watch, way) -> None:
    expected = stock.load_file(model)
    name = _fault_of(way)
    for fault in (
        {"errno": errno.EINTR, "count": 50},
        {"errno": errno.EAGAIN, "first": 2, "count": 3},
        {"short_bytes": 4096},
        {"short_bytes": 7919},
    ):
        for call in CALLS:
            after = _header_reads(model) if name == "pread" else 0
            chosen = {"first": 1, **fault}
            engine.set_fault(name, **{**chosen, "first": chosen["first"] + after})
            with watch() as seen:
                assert_same(_load(fast, call, model), expected)
            assert engine.fault_calls(name) > after
            engine.clear_faults()
            assert all(r.path.startswith("ring") for r in seen.reports)
    assert asked.asked == []


def test_a_bad_place_behind_does_not_spoil_what_is_before(
    cuda, asked, raw, fast, stock, assert_same, way
) -> None:
    """An error in reading ahead is raised for the tensor at that place, and for no other."""
    size = 60_000
    path = file_of_numbers(raw, 12, size)
    expected = stock.load_file(path)
    with fast.safe_open(path, "pt", device="cuda") as handle:
        names = handle.offset_keys()
        assert_same(handle.get_tensor(names[0]), expected[names[0]])
        os.truncate(path, os.path.getsize(path) - 8 * size)  # 4 whole ones are left
        for name in names[1:4]:
            assert_same(handle.get_tensor(name), expected[name])
        for name in names[4:7]:
            with pytest.raises(SafetensorError, match="truncated"):
                handle.get_tensor(name)
        assert_same(handle.get_tensor(names[2]), expected[names[2]])
    assert asked.asked == []


def test_a_read_that_fails_once(cuda, asked, model, fast, stock, assert_same, way) -> None:
    """The error is raised once, and tensors that were read ahead with it are read anew."""
    expected = stock.load_file(model)
    name = _fault_of(way)
    with fast.safe_open(model, "pt", device="cuda") as handle:
        names = handle.offset_keys()
        assert_same(handle.get_tensor(names[0]), expected[names[0]])
        engine.set_fault(name, first=1, count=1, errno=errno.EIO)
        wrong = 0
        for key in names[1:]:
            try:
                found = handle.get_tensor(key)
            except OSError:
                wrong += 1
                found = handle.get_tensor(key)
            assert_same(found, expected[key])
    assert wrong <= 1


# ---------------------------------------------------------------- many at once


def _in_threads(work: Callable[[int], None], count: int) -> None:
    wrong: list[BaseException] = []

    def run(k: int) -> None:
        try:
            work(k)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("mode", [0, 1])
def test_many_threads(cuda, asked, model, fast, stock, assert_same, way, mode) -> None:
    expected = stock.load_file(model)
    cuda.driver.lib.fake_mode(mode, 3)

    def work(k: int) -> None:
        for i in range(4):
            assert_same(_load(fast, CALLS[(k + i) % len(CALLS)], model), expected)

    _in_threads(work, 5)
    assert asked.asked == []


def test_one_handle_in_many_threads_meets_errors(
    cuda, asked, model, fast, stock, assert_same, way
) -> None:
    """Wherever an error strikes: right bytes or that error, for every thread."""
    expected = stock.load_file(model)
    name = _fault_of(way)
    for first in (2, 5, 11):
        with fast.safe_open(model, "pt", device="cuda") as handle:
            names = handle.offset_keys()
            engine.set_fault(name, first=first, count=2, errno=errno.EIO)

            def work(k: int, handle: Any = handle, names: Any = names) -> None:
                for key in names[k:] + names[:k]:
                    try:
                        found = handle.get_tensor(key)
                    except OSError:
                        continue
                    assert_same(found, expected[key])

            _in_threads(work, 4)
            engine.clear_faults()
