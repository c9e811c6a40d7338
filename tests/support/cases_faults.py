"""Cases of ranks: one of them fails, and the errors that the others raise."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cases_forms import FORMS, Me, full_of, way_of
from rank_nursery import attempt
from sharded import assert_tensors, load_sharded

from fastst_patch import RankError, engine, sharding

FOREVER = 1 << 62


def _form(rank: Any, files: list[str], form: str) -> Any:
    return FORMS[form](full_of(files), Me(rank.rank, rank.world))


def _read_calls(way: Mapping[str, Any]) -> str:
    """The system call that reads data; pread also reads headers."""
    return "pread" if way.get("io") == "direct" else "preadv"


def _header_reads(files: list[str]) -> int:
    """Number of preads that open all files."""
    engine.set_fault("pread", first=FOREVER)
    for file in files:
        engine.read_layout(engine.open_file(file))
    reads = engine.fault_calls("pread")
    engine.clear_faults()
    return reads


@contextlib.contextmanager
def fault(call: str, **options: Any) -> Iterator[None]:
    """Inject a fault into the engine's system calls in a ``with`` block."""
    engine.set_fault(call, **options)
    try:
        yield
    finally:
        engine.clear_faults()


def _held(rank: Any) -> dict[str, Any]:
    """Resources that a rank holds after its tensors are gone."""
    gc.collect()
    engine.shutdown()
    counters = engine.counters()
    held: dict[str, Any] = {
        name: counters[name] for name in ("threads", "jobs", "arenas", "arena_bytes", "files")
    }
    # By path: gloo may replace a socket by another.
    held["descriptors"] = sorted(
        path for fd in os.listdir("/proc/self/fd")
        for path in [_target(fd)] if path.startswith(("/", "memfd:")) and "/proc" not in path
    )  # fmt: skip
    held["maps"] = sorted(
        {line.split(maxsplit=5)[5].strip() for line in _lines("/proc/self/maps")
         if "safetensors" in line or "/dev/shm" in line or "memfd" in line}
    )  # fmt: skip
    held["python threads"] = sorted(thread.name for thread in threading.enumerate())
    held["shm"] = sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else []
    return held


def _lines(path: str) -> list[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().splitlines()


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _failing(
    rank: Any,
    files: list[str],
    form: str,
    way: Mapping[str, Any],
    trouble: Callable[[Any], contextlib.AbstractContextManager[Any]],
) -> dict[str, Any]:
    """A load that fails; afterwards nothing is held, and the group loads again.

    Args:
        rank: this process.
        files: to load.
        form: of the plan.
        way: options.
        trouble: returns the context of the failing load; takes the device's runtime, or None.
    """
    full = full_of(files)
    plan, expect = _form(rank, files, form)
    with way_of(rank, way) as options:
        runtime = rank.runtime
        assert_tensors(load_sharded(files, None, plan, **options), full, expect)
        before = _held(rank)
        rank.meet()
        with trouble(runtime):
            outcome = attempt(lambda: load_sharded(files, None, plan, **options) and None)
        if runtime is not None:
            engine.shutdown()  # workers release the reads in progress
            outcome["blocks"] = runtime.driver.live().blocks
            # Streams may still wait for events; no copy may be left.
            runtime.driver.lib.fake_drain()
            outcome["pending"] = runtime.driver.violations()
        after = _held(rank)
        rank.meet()  # the node's ranks share files of shared memory
        after["shm"] = before["shm"] = []
        assert after == before
        rank.meet()
        assert_tensors(load_sharded(files, None, plan, **options), full, expect)
    return outcome


def unreadable(rank: Any, files: list[str], form: str, bad: int, first: int = 1, **way: Any) -> Any:
    """The storage of one rank fails at its `first` read of data."""
    call = _read_calls(way)

    @contextlib.contextmanager
    def trouble(_: Any) -> Iterator[None]:
        if rank.rank != bad:
            yield
            return
        after = _header_reads(files) if call == "pread" else 0
        with fault(call, first=first + after, errno=errno.EIO):
            yield

    return _failing(rank, files, form, way, trouble)


def unreadable_header(rank: Any, files: list[str], bad: int, **way: Any) -> Any:
    """One rank cannot read a header; then no rank reads data."""

    @contextlib.contextmanager
    def trouble(_: Any) -> Iterator[None]:
        chosen = {"first": 1, "errno": errno.EIO} if rank.rank == bad else {"first": FOREVER}
        before = engine.counters()
        with fault("pread", **chosen):
            yield
        moved = {name: engine.counters()[name] - before[name] for name in before
                 if name.startswith("bytes_")}  # fmt: skip
        assert set(moved.values()) == {0}, moved

    return _failing(rank, files, "rows", way, trouble)


def no_memory(rank: Any, files: list[str], form: str, bad: int, first: int = 1) -> Any:
    """The device of one rank has no memory left."""

    @contextlib.contextmanager
    def trouble(runtime: Any) -> Iterator[None]:
        runtime.allocated = 0
        runtime.refuse_from = first if rank.rank == bad else None
        try:
            yield
        finally:
            runtime.refuse_from = None

    return _failing(rank, files, form, {"device": "cuda"}, trouble)


class Planned(Exception):
    """Raised by a plan."""


def bad_plan(rank: Any, files: list[str], bad: int, error: str, **way: Any) -> Any:
    """One rank's plan raises at a tensor in the middle."""
    kinds: dict[str, type[BaseException]] = {
        "Planned": Planned, "KeyboardInterrupt": KeyboardInterrupt, "MemoryError": MemoryError,
        "SystemExit": SystemExit, "StopIteration": StopIteration,
    }  # fmt: skip
    middle = sorted(full_of(files).tensors)[len(full_of(files).tensors) // 2]

    def plan(name: str, shape: Any, dtype: Any) -> Any:
        if rank.rank == bad and name == middle:
            raise kinds[error](f"no spec for {name}")
        return 0 if len(shape) else None

    with way_of(rank, way) as options:
        outcome = attempt(lambda: load_sharded(files, None, plan, **options))
        good, expect = _form(rank, files, "rows")
        assert_tensors(load_sharded(files, None, good, **options), full_of(files), expect)
    return outcome


def wrong_on_one(rank: Any, files: list[str], bad: int, what: str) -> Any:
    """One rank alone has a wrong argument."""
    plan: Any = {"F32.7x4": 0}
    options: dict[str, Any] = {}
    if rank.rank == bad:
        plan = {"name": {"nobody": 0}, "scalar": {"F32.": 0}}.get(what, plan)
        options = {"option": {"io": "sideways"}, "read_once": {"read_once": "never"}}.get(what, {})
    outcome = attempt(lambda: load_sharded(files, None, plan, **options))
    good, expect = _form(rank, files, "rows")
    assert_tensors(load_sharded(files, None, good), full_of(files), expect)
    return outcome


def other_file(rank: Any, files: list[str], other: str, bad: int, **way: Any) -> Any:
    """One rank finds another file under the name. No rank reads data before all know that."""
    name = "mine.safetensors"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    os.symlink(other if rank.rank == bad else files[0], name)
    rank.meet()
    before = engine.counters()
    with way_of(rank, way) as options:
        outcome = attempt(lambda: load_sharded(name, None, None, **options))
    after = engine.counters()
    moved = {n: after[n] - before[n] for n in before if n.startswith("bytes_")}
    assert set(moved.values()) == {0}, moved
    return outcome


def other_names(rank: Any, files: list[str], bad: int) -> Any:
    """One rank names fewer files."""
    mine = files[:-1] if rank.rank == bad else files
    outcome = attempt(lambda: load_sharded(mine, None, None) and None)
    assert_tensors(load_sharded(files), full_of(files), lambda _, t: t)
    return outcome


def missing(rank: Any, files: list[str], **way: Any) -> Any:
    """No rank has one of the files."""
    with way_of(rank, way) as options:
        return attempt(lambda: load_sharded([*files, "nowhere.safetensors"], None, None, **options))


def damaged(rank: Any, file: str, **way: Any) -> Any:
    """A header that stock refuses, too."""
    with way_of(rank, way) as options:
        return attempt(lambda: load_sharded(file, None, None, **options))


def picklable(rank: Any, files: list[str]) -> bool:
    """A RankError is the same after pickling."""
    try:
        load_sharded(files, None, lambda *_: 1 / 0 if rank.rank == 0 else None)
    except RankError as error:
        again = pickle.loads(pickle.dumps(error))
        expected = (type(error), str(error), error.rank, error.cause)
        return expected == (type(again), str(again), again.rank, again.cause)
    return False


# ---------------------------------------------------------------- killed ranks


def killed_in_plan(rank: Any, files: list[str], bad: int, **way: Any) -> Any:
    """A rank is killed before the ranks agreed on anything."""

    def plan(name: str, shape: Any, dtype: Any) -> Any:
        if rank.rank == bad:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0 if len(shape) else None

    with way_of(rank, way) as options:
        return attempt(lambda: load_sharded(files, None, plan, **options) and None)


def _hold(files: list[str], way: Mapping[str, Any], then: Callable[[], None]) -> None:
    """Make this process's reads return early again and again; call ``then`` once they do."""
    call = _read_calls(way)
    after = _header_reads(files) if call == "pread" else 0
    engine.set_fault(call, first=1 + after, errno=errno.EINTR)

    def watch() -> None:
        while engine.fault_calls(call) <= 1 + after:
            time.sleep(0.001)
        then()

    threading.Thread(target=watch, daemon=True).start()


def killed_reading(rank: Any, files: list[str], form: str, bad: int, **way: Any) -> Any:
    """A rank is killed in the middle of its reads."""
    full_of(files)
    with way_of(rank, way) as options:
        if rank.rank == bad:
            _hold(files, way, lambda: os.kill(os.getpid(), signal.SIGKILL))
        plan, _ = _form(rank, files, form)
        return attempt(lambda: load_sharded(files, None, plan, **options) and None)


def stuck_reading(rank: Any, files: list[str], form: str, bad: int, **way: Any) -> Any:
    """A rank's storage hangs: the others wait for the group's timeout at most."""
    full_of(files)
    with way_of(rank, way) as options:
        if rank.rank == bad:
            _hold(files, way, lambda: None)
        plan, _ = _form(rank, files, form)
        return attempt(lambda: load_sharded(files, None, plan, **options) and None)


def absent(rank: Any, files: list[str], bad: int) -> Any:
    """A rank ends without calling load_sharded."""
    if rank.rank == bad:
        return None
    return attempt(lambda: load_sharded(files, None, None) and None)


def owner_names(rank: Any, files: list[str]) -> int:
    """Every rank takes its own tensors, and skips the others'."""
    full = full_of(files)
    mine = sorted(full.tensors)[rank.rank :: rank.world]
    plan = {name: None if name in mine else sharding.SKIP for name in full.tensors}
    result = load_sharded(files, None, plan)
    return assert_tensors(result, full, lambda n, t: t if n in mine else None)
