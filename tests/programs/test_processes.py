"""Programs of their own: interrupts, forks, exits, two at once, little memory.

As in test_faults.py, nothing waits for time to pass: where a load must be found in the middle,
a fault holds it there.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastst_patch import engine

pytestmark = [
    pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error())),
    pytest.mark.usefixtures("nothing_left"),
]

HELD = {"buffered": {"io": "buffered"}, "direct": {"io": "direct"}, "owned": {"tensors": "owned"}}

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
def program(warm_python, model, tmp_path: Path) -> Callable[..., str]:
    """Run a script beside the model; it must end well and say nothing on stderr."""

    def run(script: str, *args: str) -> str:
        source = PRELUDE + textwrap.dedent(script)
        done = warm_python.run(source, model, *args, folder=tmp_path, quiet=True, limit_s=300)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    return run


@pytest.fixture(params=HELD)
def held_way(request, model, need_o_direct) -> str:
    """A way whose reads can be held by a fault."""
    if request.param == "direct":
        need_o_direct(model)
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
            load(**{HELD[held_way]!r})
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
            target=lambda: results.append(load(**{HELD[held_way]!r})), daemon=True
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
        threading.Thread(target=lambda: load(**{HELD[held_way]!r}), daemon=True).start()
        wait_until(lambda: engine.fault_calls({call!r}) > first + 5)
        print("leaving")
        """
    )
    assert out.split() == ["leaving"]


def test_patched_and_unpatched_side_by_side(program) -> None:
    """Two programs on one file, one of which changes what it loaded: neither notices the other."""
    script = """
        for k in range(20):
            tensors = load(**WAYS[k % len(WAYS)]) if sys.argv[2] == "fast" else (
                safetensors.torch.load_file(path))
            assert same(tensors), k
            for tensor in tensors.values():
                tensor.zero_()
        """
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda kind: program(script, kind), ("fast", "stock", "fast")))


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
