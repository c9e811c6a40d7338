"""System calls that fail, interrupts, forks, exits, little memory: stock's bytes or a clear error.

Faults are injected into the engine's own system calls; stock's are untouched. Nothing waits for
time to pass: where a load must be found in the middle, a fault holds it there.
"""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError

import fastst_patch
from fastst_patch import engine

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

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


@pytest.fixture
def model(raw) -> str:
    """About 2.8 MB, with odd lengths, a scalar and an empty tensor: read-ahead starts at 1 MiB."""
    generator = torch.Generator().manual_seed(11)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    return raw.tensors(
        {
            "bytes": numbers(1_200_003),
            "floats": numbers(300, 700).float(),
            "halves": numbers(3, 5).to(torch.bfloat16),
            "scalar": torch.tensor(1 << 40),
            "empty": torch.empty(0, 4),
            "flags": numbers(777_777) > 127,
        }
    )


def _held() -> dict[str, int]:
    gc.collect()
    engine.shutdown()  # finishes what is in flight
    names = ("threads", "jobs", "arenas", "arena_bytes", "files")
    counters = engine.counters()
    return {name: counters[name] for name in names}


def _descriptors(folder: Path) -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith(os.path.realpath(folder)):
            found.append(target)
    return found


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    before = _held()
    yield
    engine.clear_faults()
    assert _held() == before
    assert _descriptors(tmp_path) == []


@pytest.fixture(params=WAYS)
def way(request) -> Iterator[str]:
    with fastst_patch.config_context(**WAYS[request.param], **SMALL_CHUNKS):
        yield request.param


def _need_o_direct(path: str) -> None:
    """Skip where the file system of the tests does not take O_DIRECT: those reads never come."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error.strerror}")


@pytest.fixture(params=READ)
def read_way(request, model) -> Iterator[str]:
    """The ways that read by themselves. On a map, stock's way, a bad read is SIGBUS."""
    if request.param in DIRECT:
        _need_o_direct(model)
    with fastst_patch.config_context(**WAYS[request.param], **SMALL_CHUNKS):
        yield request.param


@pytest.fixture(params=DIRECT)
def direct_way(request, model) -> Iterator[str]:
    _need_o_direct(model)
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


def _blind() -> None:
    """No probe tells what is cached, so that read-ahead has work to do."""
    Fault("cachestat", errno=errno.ENOSYS).set()
    Fault("preadv2", errno=errno.EOPNOTSUPP).set()
    Fault("mincore", errno=errno.ENOSYS).set()


# ---------------------------------------------------------------- results are stock's

HARMLESS = (
    Fault("preadv", errno=errno.EINTR, count=50, met_by=BUFFERED),
    Fault("preadv", errno=errno.EAGAIN, first=2, count=5, met_by=BUFFERED),
    Fault("preadv", short_bytes=7919, met_by=BUFFERED),
    Fault("preadv", short_bytes=1, first=3, count=40, met_by=BUFFERED),
    Fault("readahead", errno=errno.EINVAL),
    Fault("cachestat", errno=errno.ENOSYS, met_by=("auto", "buffered")),
    Fault("cachestat", errno=errno.EPERM, met_by=("auto", "buffered")),
    Fault("fadvise", errno=errno.EINVAL, met_by=("drop",)),
    Fault("madvise", errno=errno.EINVAL),
    Fault("madvise", errno=errno.EFAULT),
    Fault("madvise", errno=errno.EAGAIN),
    Fault("pthread_create", errno=errno.EAGAIN, met_by=READ),
    Fault("pthread_create", errno=errno.EAGAIN, first=2, met_by=READ),
)
IN_DATA = (  # counted from behind the header
    Fault("pread", errno=errno.EINTR, count=50, met_by=DIRECT),
    Fault("pread", errno=errno.EAGAIN, first=2, count=5, met_by=DIRECT),
    Fault("pread", short_bytes=4096, met_by=DIRECT),
    Fault("pread", short_bytes=9999, met_by=DIRECT),
    Fault("pread", short_bytes=333, met_by=DIRECT),
    Fault("pread", errno=errno.EINVAL, met_by=DIRECT),
    Fault("pread", errno=errno.EINVAL, first=4, met_by=DIRECT),
    Fault("pread", errno=errno.EOPNOTSUPP, first=2, count=1, met_by=DIRECT),
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


def test_blind_read_ahead(model, fast, stock, assert_same, way) -> None:
    for call in CALLS:
        expected = _load(stock, call, model)
        for fault in (None, *(f for f in HARMLESS if f.call in ("madvise", "readahead"))):
            engine.shutdown()
            _blind()
            if fault is not None:
                fault.set()
            assert_same(_load(fast, call, model), expected)
            engine.clear_faults()


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
def test_what_cannot_be_opened_is_stocks(model, fast, stock, assert_same, call, watch) -> None:
    expected = _load(stock, call, model)
    for fault in OPENING:
        fault.set()
        with watch() as seen:
            result = _load(fast, call, model)
        engine.clear_faults()
        assert_same(result, expected)
        seen.assert_stock(model)


@pytest.mark.parametrize("call", CALLS)
def test_memory_refused(model, fast, stock, assert_same, way, call) -> None:
    """At the n-th request: an arena, a map, or a worker's buffer. Stock has memory still."""
    expected = _load(stock, call, model)
    for first in (1, 2, 3):
        engine.shutdown()
        Fault("mmap", first=first, errno=errno.ENOMEM).set()
        result = _load(fast, call, model)
        engine.clear_faults()
        assert_same(result, expected)


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
    lib = engine._lib
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
            patched.setattr(engine, "_lib", Interrupting())
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


# ---------------------------------------------------------------- programs of their own

PRELUDE = """
import errno, gc, os, signal, sys, threading, time
import torch
torch.set_num_threads(1)  # OpenMP does not survive a fork
import safetensors, safetensors.torch
import fastst_patch
from fastst_patch import engine

path = sys.argv[1]
expected = {k: v.clone() for k, v in safetensors.torch.load_file(path).items()}
CHUNKS = {"chunk_bytes": 64 << 10, "threads": 3, "small_file_bytes": 0}
# Complete, because a forked child keeps the options of a thread that it does not have.
WAYS = [{"io": io, "tensors": "auto"} for io in ("mmap", "auto", "buffered", "direct")]
WAYS.append({"io": "auto", "tensors": "owned"})

def load(**options):
    with fastst_patch.patched(**CHUNKS, **options):
        return safetensors.torch.load_file(path)

def same(tensors):
    return list(tensors) == list(expected) and all(
        t.dtype == expected[k].dtype and torch.equal(t, expected[k]) for k, t in tensors.items()
    )

def header_reads():
    engine.set_fault("pread", first=1 << 62)
    engine.read_layout(engine.open_file(path))
    reads = engine.fault_calls("pread")
    engine.clear_faults()
    return reads

def hold(call, code=errno.EINTR, count=1 << 62):
    # From here on the call does not get done. Returns from when on it is tried in vain.
    first = header_reads() + 1 if call == "pread" else 1
    engine.set_fault(call, first=first, errno=code, count=count)
    return first

def hold_read_ahead():
    # No probe tells what is cached, and the fallback of old kernels never gets its bytes.
    hold("pread")
    for call in ("cachestat", "preadv2", "mincore"):
        engine.set_fault(call, errno=errno.ENOSYS)
    engine.set_fault("madvise", errno=errno.EINVAL)

def wait_until(condition):
    end = time.monotonic() + 100  # only so that a broken build fails instead of hanging
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)

def nothing_held():
    gc.collect()
    engine.shutdown()
    counters = engine.counters()
    return all(counters[k] == 0 for k in ("jobs", "threads", "arenas", "arena_bytes", "files"))

def in_child(function):
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return pid

def check_child(pid):
    assert os.waitpid(pid, 0) == (pid, 0)

def load_every_way():
    for options in WAYS:
        assert same(load(**options)), options
"""


@pytest.fixture
def program(model, tmp_path: Path) -> Callable[..., str]:
    """Run a script beside the model; it must end well and say nothing on stderr."""

    def run(script: str, *args: str) -> str:
        source = PRELUDE + textwrap.dedent(script)
        command = [sys.executable, "-W", "ignore", "-c", source, model, *args]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    return run


@pytest.fixture(params=["buffered", "direct", "owned"])
def held_way(request, model) -> str:
    """A way whose reads can be held by a fault."""
    if request.param == "direct":
        _need_o_direct(model)
    return str(request.param)


def test_ctrl_c(program, held_way) -> None:
    """The load cannot end by itself, so that it must be the interrupt that ends it."""
    call = "pread" if held_way == "direct" else "preadv"
    program(
        f"""
        first = hold({call!r})
        def interrupt():
            wait_until(lambda: engine.fault_calls({call!r}) > first + 100)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt, daemon=True).start()
        try:
            load(**{WAYS[held_way]!r})
        except KeyboardInterrupt:
            pass
        else:
            sys.exit("the load ended")
        engine.clear_faults()
        assert nothing_held(), engine.counters()
        load_every_way()
        """
    )


def test_fork_after_use(program) -> None:
    program(
        """
        for options in WAYS:
            kept = load(**options)
            def child():
                assert same(kept)
                load_every_way()
                kept["bytes"].zero_()  # its own copy
            check_child(in_child(child))
            assert same(kept)
        load_every_way()
        """
    )


def test_fork_during_a_load(program, held_way) -> None:
    """A direct read is waited for, so that one is held for a while only."""
    call, count = ("pread", 100) if held_way == "direct" else ("preadv", 1 << 62)
    code = "EAGAIN" if held_way == "direct" else "EINTR"
    program(
        f"""
        load_every_way()
        results = []
        loader = threading.Thread(
            target=lambda: results.append(load(**{WAYS[held_way]!r})), daemon=True
        )
        first = hold({call!r}, errno.{code}, {count})
        loader.start()
        wait_until(lambda: engine.fault_calls({call!r}) > first + 5)
        def child():
            engine.clear_faults()
            assert engine.counters()["threads"] == 0 and engine.counters()["jobs"] == 0
            load_every_way()
        pid = in_child(child)
        check_child(pid)
        engine.clear_faults()
        loader.join()
        assert same(results[0])
        del results
        assert nothing_held(), engine.counters()
        """
    )


def test_fork_during_read_ahead(program) -> None:
    program(
        """
        hold_read_ahead()
        kept = load(io="auto")
        wait_until(lambda: engine.counters()["jobs"] == 1)
        def child():
            assert engine.counters()["jobs"] == 0
            engine.clear_faults()
            assert same(kept)
            load_every_way()
        check_child(in_child(child))
        assert engine.counters()["jobs"] == 1
        engine.clear_faults()
        assert same(kept)
        del kept
        assert nothing_held(), engine.counters()
        """
    )


def test_multiprocessing_fork(program) -> None:
    program(
        """
        import multiprocessing
        fastst_patch.patch(**CHUNKS)
        kept = safetensors.torch.load_file(path)
        def work(k):
            with fastst_patch.config_context(**WAYS[k % len(WAYS)]):
                return same(safetensors.torch.load_file(path)) and same(kept)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(work, range(8)) == [True] * 8
        assert same(kept) and same(safetensors.torch.load_file(path))
        """
    )


def test_exit_with_tensors(program) -> None:
    out = program(
        """
        fastst_patch.patch(**CHUNKS)
        kept = [load(**options) for options in WAYS]
        handle = safetensors.safe_open(path, "pt")
        part = handle.get_slice("bytes")
        cycle = [handle.get_tensor("bytes"), part[:100]]
        cycle.append(cycle)
        sys.modules["somewhere_else"] = kept[0]
        class Late:
            def __del__(self):  # at the very end
                print(int(self.tensor[7]) == int(self.value))
        late = Late()
        late.tensor, late.value = kept[1]["bytes"], expected["bytes"][7]
        """
    )
    assert out.split() == ["True"]


def test_exit_during_read_ahead(program) -> None:
    out = program(
        """
        hold_read_ahead()
        kept = load(io="auto")
        assert same(kept) and engine.counters()["jobs"] == 1
        print("loaded")
        """
    )
    assert out.split() == ["loaded"]


def test_exit_during_a_load(program, held_way) -> None:
    """In a daemon thread, which Python does not wait for."""
    call = "pread" if held_way == "direct" else "preadv"
    out = program(
        f"""
        first = hold({call!r})
        threading.Thread(target=lambda: load(**{WAYS[held_way]!r}), daemon=True).start()
        wait_until(lambda: engine.fault_calls({call!r}) > first + 5)
        print("leaving")
        """
    )
    assert out.split() == ["leaving"]


def test_patched_and_unpatched_side_by_side(model, tmp_path: Path) -> None:
    """Two programs on one file, one of which changes what it loaded: neither notices the other."""
    script = PRELUDE + textwrap.dedent(
        """
        for k in range(20):
            tensors = load(**WAYS[k % len(WAYS)]) if sys.argv[2] == "fast" else (
                safetensors.torch.load_file(path))
            assert same(tensors), k
            for tensor in tensors.values():
                tensor.zero_()
        """
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script, model, kind],
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for kind in ("fast", "stock", "fast")
    ]
    for one in running:
        _, said = one.communicate(timeout=300)
        assert (one.returncode, said) == (0, "")


@pytest.mark.parametrize("margin", [8, 40, 100, 200])
def test_little_address_space(program, raw, margin) -> None:
    """The file takes 96 MiB; with this many MiB to spare: its bytes, or stock's kind of error."""
    big = 96 << 20
    header = raw.pack({"big": raw.entry("U8", [big], 0, big)})
    path = raw.write(header, "sparse.safetensors")
    os.truncate(path, len(header) + big)
    out = program(
        """
        import resource
        big = sys.argv[2]
        load_every_way()
        load_stock = safetensors.torch.load_file
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = used + (int(sys.argv[3]) << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        def attempt(load_file):
            try:
                tensor = load_file(big)["big"]
                return "wrong" if tensor.count_nonzero() or len(tensor) != 96 << 20 else "loaded"
            except Exception as error:
                return type(error).__name__

        stocks = attempt(load_stock)
        for options in WAYS:
            with fastst_patch.patched(**CHUNKS, **options):
                ours = attempt(safetensors.torch.load_file)
            print(stocks, ours)
        """,
        path,
        str(margin),
    )
    outcomes = [line.split() for line in out.splitlines()]
    assert len(outcomes) == 5
    for stocks, ours in outcomes:
        assert ours in ("loaded", stocks), outcomes
    if margin < 96:  # the limit bites
        assert outcomes[0][1] != "loaded", outcomes
    if margin >= 200:  # stock maps the file twice on its way
        assert outcomes[0] == ["loaded", "loaded"], outcomes
