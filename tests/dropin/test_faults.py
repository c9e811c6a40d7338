"""System calls that fail, interrupts, many threads: stock's bytes or a clear error.

Each single call fails in the fault matrix (tests/faults); here many fail, or come short. Faults are
injected into the engine's own system calls; stock's are untouched. Nothing waits for time to pass:
where a load must be found in the middle, a fault holds it there.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import fastst_patch
from fastst_patch import engine

pytestmark = [
    pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error())),
    pytest.mark.usefixtures("nothing_left"),
]

WAYS: dict[str, dict[str, Any]] = {
    "auto": {"io": "auto"},
    "mmap": {"io": "mmap"},
    "buffered": {"io": "buffered"},
    "direct": {"io": "direct"},
    "drop": {"page_cache": "drop"},
    "owned": {"tensors": "owned"},
    "owned-direct": {"tensors": "owned", "io": "direct"},
}
BUFFERED = ("buffered", "owned")
DIRECT = ("direct", "drop", "owned-direct")
READ = BUFFERED + DIRECT  # the others are maps, as stock makes them
CALLS = ("load_file", "get_tensor", "get_slice")
SMALL_CHUNKS = {"chunk_bytes": 64 << 10, "threads": 3}
FOREVER = 1 << 62


class Fault(NamedTuple):
    """One argument list of engine.set_fault, and the ways to read that must meet it."""

    call: str
    first: int = 1
    count: int = FOREVER
    errno: int = 0
    short_bytes: int = 0
    met_by: tuple[str, ...] = ()

    def set(self, after: int = 0) -> None:
        engine.set_fault(
            self.call,
            first=self.first + after,
            count=self.count,
            errno=self.errno,
            short_bytes=self.short_bytes,
        )


@pytest.fixture(params=WAYS)
def way(request) -> Iterator[str]:
    with fastst_patch.config_context(**WAYS[request.param], **SMALL_CHUNKS):
        yield request.param


@pytest.fixture(params=READ)
def read_way(request, model, need_o_direct) -> Iterator[str]:
    """The ways that read by themselves. On a map, stock's way, a bad read is SIGBUS."""
    if request.param in DIRECT:
        need_o_direct(model)
    with fastst_patch.config_context(**WAYS[request.param], **SMALL_CHUNKS):
        yield request.param


@pytest.fixture(params=DIRECT)
def direct_way(request, model, need_o_direct) -> Iterator[str]:
    need_o_direct(model)
    with fastst_patch.config_context(**WAYS[request.param], **SMALL_CHUNKS):
        yield request.param


def _load(loaders: Any, call: str, path: str) -> dict[str, torch.Tensor]:
    if call == "load_file":
        return loaders.load_file(path)
    with loaders.safe_open(path, "pt") as f:
        if call == "get_tensor":
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        shapes = {name: f.get_slice(name).get_shape() for name in f.keys()}  # noqa: SIM118
        return {
            name: f.get_slice(name)[:] if shape else f.get_tensor(name)
            for name, shape in shapes.items()
        }


def _header_reads(path: str) -> int:
    """How many preads opening takes; those of the data come after them."""
    engine.set_fault("pread", first=FOREVER)
    file = engine.open_file(path)
    engine.read_layout(file)
    reads = engine.fault_calls("pread")
    engine.clear_faults()
    return reads


# ---------------------------------------------------------------- results are stock's

HARMLESS = (
    Fault("preadv", errno=errno.EINTR, count=50, met_by=BUFFERED),
    Fault("preadv", errno=errno.EAGAIN, first=2, count=5, met_by=BUFFERED),
    Fault("preadv", short_bytes=7919, met_by=BUFFERED),
    Fault("preadv", short_bytes=1, first=3, count=40, met_by=BUFFERED),
)
IN_DATA = (  # counted from behind the header
    Fault("pread", errno=errno.EINTR, count=50, met_by=DIRECT),
    Fault("pread", errno=errno.EAGAIN, first=2, count=5, met_by=DIRECT),
    Fault("pread", short_bytes=4096, met_by=DIRECT),
    Fault("pread", short_bytes=9999, met_by=DIRECT),
    Fault("pread", short_bytes=333, met_by=DIRECT),
)


def _check_harmless(
    fast: Any, stock: Any, assert_same: Any, way: str, call: str, path: str, faults: Any, after: int
) -> None:
    expected = _load(stock, call, path)
    for fault in faults:
        engine.shutdown()  # every fault meets a pool that has to start its workers
        fault.set(after)
        try:
            result = _load(fast, call, path)
        except Exception as error:
            raise AssertionError((way, call, fault)) from error
        calls = engine.fault_calls(fault.call)
        engine.clear_faults()
        assert_same(result, expected)
        assert way not in fault.met_by or calls >= fault.first + after, (way, call, fault, calls)


@pytest.mark.parametrize("call", CALLS)
def test_faults_that_change_nothing(model, fast, stock, assert_same, way, call) -> None:
    _check_harmless(fast, stock, assert_same, way, call, model, HARMLESS, 0)


@pytest.mark.parametrize("call", CALLS)
def test_direct_reads_that_are_refused(model, fast, stock, assert_same, direct_way, call) -> None:
    after = _header_reads(model)
    _check_harmless(fast, stock, assert_same, direct_way, call, model, IN_DATA, after)


def test_o_direct_refused_at_open(model, fast, stock, assert_same, direct_way, watch) -> None:
    expected = stock.load_file(model)
    for code in (errno.EINVAL, errno.EMFILE, errno.ENOENT, errno.EACCES):
        Fault("open", first=2, errno=code).set()  # the first is the file itself
        with watch() as seen:
            result = fast.load_file(model)
        calls = engine.fault_calls("open")
        engine.clear_faults()
        assert_same(result, expected)
        assert calls >= 2
        seen.assert_fast(model)
        assert any("O_DIRECT" in (report.fallback_reason or "") for report in seen.reports)


OPENING = (
    *(Fault("open", errno=code) for code in (errno.EMFILE, errno.ENOENT, errno.EACCES)),
    Fault("fstat", errno=errno.EIO),
    Fault("pread", errno=errno.EIO),
    Fault("pread", errno=errno.EIO, first=2),
    Fault("pread", short_bytes=0, first=2),
)


@pytest.mark.parametrize("call", CALLS)
def test_what_cannot_be_opened_is_stocks(
    model, fast, stock, assert_same, call, watch, tmp_path
) -> None:
    expected = _load(stock, call, model)
    long = str(tmp_path / "long.safetensors")  # its header takes a second read
    save_file(load_file(model), long, metadata={"note": "x" * 20_000})
    for fault in OPENING:
        path = model if fault.first == 1 else long
        fault.set()
        with watch() as seen:
            result = _load(fast, call, path)
        engine.clear_faults()
        assert_same(result, expected)
        seen.assert_stock(path)


# ---------------------------------------------------------------- clear errors


def _fails(fast: Any, call: str, path: str, fault: Fault, kind: type[Exception]) -> Exception:
    """The error of a load that meets a fault, which must name the file and the offset."""
    fault.set(after=_header_reads(path) if fault.call == "pread" else 0)
    with pytest.raises(kind) as caught:
        _load(fast, call, path)
    engine.clear_faults()
    error = caught.value.with_traceback(None)
    assert path in str(error)
    assert "offset" in str(error)
    return error


def test_unreadable(model, fast, stock, assert_same, read_way) -> None:
    name = "pread" if read_way in DIRECT else "preadv"
    for call in CALLS:
        for first in (1, 5):
            fault = Fault(name, first=first, errno=errno.EIO)
            error = _fails(fast, call, model, fault, OSError)
            assert isinstance(error, OSError)
            assert error.errno == errno.EIO
        assert_same(_load(fast, call, model), _load(stock, call, model))  # and then all is well


def test_end_of_file_in_the_data(model, fast, read_way) -> None:
    name = "pread" if read_way in DIRECT else "preadv"
    for call in CALLS:
        error = _fails(fast, call, model, Fault(name, first=2, short_bytes=0), SafetensorError)
        assert "truncated" in str(error)


@pytest.mark.parametrize("kept", [0.999, 0.5, 0])
def test_truncated_while_open(model, fast, read_way, kept) -> None:
    with fast.safe_open(model, "pt") as f:
        names = f.keys()
        os.truncate(model, int(os.path.getsize(model) * kept))
        with pytest.raises(SafetensorError, match="truncated") as caught:
            for name in names:
                f.get_tensor(name)
        assert model in str(caught.value)


def test_replaced_while_open(model, raw, fast, stock, assert_same, way) -> None:
    """A handle reads the file it opened, whatever its path means by now."""
    expected = {name: tensor.clone() for name, tensor in stock.load_file(model).items()}
    with fast.safe_open(model, "pt") as f:
        os.replace(raw.tensors({"bytes": torch.zeros(9)}, "other"), model)
        for name, tensor in expected.items():
            assert_same(f.get_tensor(name), tensor)


def test_interrupted_before_the_job_is_known(model, fast, monkeypatch) -> None:
    """A signal that arrives inside the call that starts a read: nothing may go on reading.

    With tensors="owned" the workers write into torch's memory, which is about to be freed.
    """
    lib = engine.jobs.lib
    started = []

    class Interrupting:
        def __getattr__(self, name: str) -> Any:
            return start if name == "fst_job_read" else getattr(lib, name)

    def start(*args: Any) -> int:
        assert lib.fst_job_read(*args) == 0
        started.append(args[5])  # where the job's address is
        raise KeyboardInterrupt

    for options in ({"tensors": "owned"}, {"io": "buffered"}):
        with fastst_patch.config_context(**options), monkeypatch.context() as patched:
            Fault("preadv", errno=errno.EINTR).set()  # this load never ends by itself
            patched.setattr(engine.jobs, "lib", Interrupting())
            with pytest.raises(KeyboardInterrupt) as caught:
                fast.load_file(model)
            jobs = engine.counters()["jobs"]
            if jobs:  # stop it before its memory goes with the traceback
                lib.fst_job_release(started[-1][0])
            engine.clear_faults()
            del caught
            assert jobs == 0


# ---------------------------------------------------------------- many at once


def test_many_threads(model, fast, stock, assert_same) -> None:
    """Each way in several threads at once, beside stock on the same file."""
    expected = {call: _load(stock, call, model) for call in CALLS}
    wrong: list[BaseException] = []

    def work(k: int) -> None:
        try:
            for i in range(6):
                call = CALLS[(k + i) % len(CALLS)]
                assert_same(_load(stock if k == 0 else fast, call, model), expected[call])
        except BaseException as error:
            wrong.append(error)

    for options in WAYS.values():
        with fastst_patch.config_context(**options, **SMALL_CHUNKS):
            threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert wrong == []


def test_one_handle_in_many_threads(model, fast, stock, assert_same, way) -> None:
    expected = stock.load_file(model)
    wrong: list[BaseException] = []

    def work(f: Any) -> None:
        try:
            for name, tensor in expected.items():
                assert_same(f.get_tensor(name), tensor)
        except BaseException as error:
            wrong.append(error)

    with fast.safe_open(model, "pt") as f:
        threads = [threading.Thread(target=work, args=(f,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
