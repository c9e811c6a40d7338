"""The fault matrix: on each path, each call that a load makes fails once, and from then on.

``python tests/support/fault_matrix.py`` tries every single call of every path; ``--thin`` tries the
first, the second, the last, and one by the seed. A load with a fault gives stock's result, or an
exception of a documented type whose text names the file. Afterwards everything is as it was
(descriptors, maps, blocks, threads, what is alive in the driver), and a load without a fault works.

Each path runs in a process of its own. A process that hangs or dies is a failure of its path.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cases_matrix
import fake_device
import fault_kills
import torch
from fault_calls import LOST, NOT_TAKEN_BACK, Allocations, How, numbers_of, size_of
from fault_loads import NO_DEVICE, Load, LoadPath, Place, load_paths
from fault_summary import Summary
from places import NATIVE_TESTS
from safetensors import SafetensorError
from waiting import until

from fastst_patch import FaststError, device, engine

HANG_S = 120
"""A load with a fault that takes longer hangs: its process ends, and shows its stacks."""

ALLOWED = (OSError, SafetensorError, MemoryError, FaststError)
"""What a load may raise: see docs/trust.md."""

EVENTS = 64
"""Events are kept for reuse, as many as were ever needed at a time; a leak makes more."""

MAIN_AND_WATCHDOG = 2  # threads of a process that is between loads


# ---------------------------------------------------------------- what a process holds


def _targets() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}").split("[")[0])  # sockets have numbers
        except OSError:
            continue
    return sorted(one for one in found if not one.startswith("/proc/"))


def _held(load: Load) -> dict[str, Any]:
    gc.collect()
    engine.shutdown()  # finishes what is in flight
    counters = engine.counters()
    names = ("threads", "jobs", "arenas", "arena_bytes", "files", "fed_files", "pinned_bytes")
    found: dict[str, Any] = {name: counters[name] for name in names}
    found["descriptors"] = _targets()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        found["maps"] = sorted(line.split()[-1] for line in maps if ".safetensors" in line)
    found["Python's threads"] = sorted(
        one.name for one in threading.enumerate() if not one.name.startswith("Dummy-")
    )  # those are the engine's, which have called Python
    found["tasks"] = len(os.listdir("/proc/self/task"))
    if "memory" in load.calls:
        memory = load.calls["memory"]
        assert isinstance(memory, Allocations)
        found["blocks"], found["bytes mapped"] = memory.held()
    if load.driver is not None:
        live = load.driver.live()
        for name in ("contexts", "streams", "ranges", "blocks", "file_handles", "file_buffers"):
            found[f"driver's {name}"] = getattr(live, name)
        found["driver's operations"] = int(load.driver.lib.fake_pending())
        found["driver's events"] = max(0, live.events - EVENTS)
    return found


_THE_DRIVERS = ("driver's", "bytes mapped")


def _keeps(name: str, how: How) -> bool:
    """Whether the driver may keep what it was to take back, and host memory that it has pinned."""
    return how.count == LOST or NOT_TAKEN_BACK.search(name) is not None


def _our_own(held: dict[str, Any]) -> dict[str, Any]:
    """All but that."""
    return {name: value for name, value in held.items() if not name.startswith(_THE_DRIVERS)}


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: {before[name]} before, {after[name]} now"
        for name in before if before[name] != after[name]
    )  # fmt: skip


# ---------------------------------------------------------------- one load


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and its causes: where its text is stock's, word for word, a cause has more."""
    while error is not None:
        yield error
        error = error.__cause__


class Ran:
    """What happened to loads with faults.

    Attributes:
        outcomes: how many had stock's result, by each type of exception else.
        wrong: what may not happen, in words.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def attempt(self, load: Load, *, faulty: bool) -> None:
        """Load once, and judge what it gives."""
        device._forget()  # so that every load is the first to the device, whose bytes are read back
        load.before()
        if load.asked is not None:
            load.asked.alive.clear()
        try:
            result = load.call()
            load.settle()
        except Exception as error:
            self._judge(error, load, faulty)
            return
        try:
            load.check(result)
        except AssertionError as error:
            self.wrong.append(f"another result than stock's: {str(error)[:500]}")
        if load.asked is not None and set(load.asked.alive) - {0}:
            self.wrong.append(f"blocks that are alive when stock is asked: {load.asked.alive}")
        del result
        engine.shutdown()  # which may meet the fault, too
        self.outcomes["stock's result"] += 1

    def _judge(self, error: Exception, load: Load, faulty: bool) -> None:
        name = type(error).__name__
        if load.driver is not None and any(one in str(error) for one in NO_DEVICE):
            self.outcomes["left to stock, which has no device here"] += 1
            return
        self.outcomes[name] += 1
        text = "".join(traceback.format_exception(error))
        if not faulty:
            self.wrong.append(f"a load without a fault raised {text}")
        elif not isinstance(error, ALLOWED):
            self.wrong.append(f"an exception of no documented type: {text}")
        elif not any(load.file in str(one) for one in _with_causes(error)):
            self.wrong.append(f"an error that does not name the file: {text}")


def _clean(load: Load, ran: Ran) -> None:
    """End all faults, and all that is pending."""
    load.settle()
    until(lambda: engine.counters()["jobs"] == 0, HANG_S)
    if load.driver is not None:
        load.driver.lib.fake_drain()  # a copy that is late writes now, where its memory is watched
        ran.wrong += [f"a rule of the driver: {one}" for one in load.driver.violations()]
        load.driver.clear()
    for calls in load.calls.values():
        calls.disarm()


# ---------------------------------------------------------------- a path


class PathRun:
    """All faults of a path.

    Args:
        path: the path.
        place: for its load.
        thin: leave out calls in the middle.
        told: a file that progress is written to, in lines of JSON.
    """

    def __init__(self, path: LoadPath, place: Place, thin: bool, told: Any) -> None:
        self._path = path
        self._place = place
        self._thin = thin
        self._told = told

    def tell(self, **what: Any) -> None:
        print(json.dumps(what), file=self._told, flush=True)

    def run(self) -> None:
        """In a process that nothing else uses."""
        if self._path.run is not None:
            self._path.run(self._place, self._thin, self.tell)
            return
        if self._path.fresh:
            self._run_fresh()
            return
        with self._ready() as load:
            counts = self._count(load)
            self.tell(size=size_of(load.calls, counts))
            until(lambda: len(os.listdir("/proc/self/task")) <= MAIN_AND_WATCHDOG, 20)
            before = _held(load)
            for kind, name, how, n in self._cells(load, counts):
                calls = load.calls[kind]
                self.tell(cell=[kind, name, how.text, n])
                faulthandler.dump_traceback_later(HANG_S, exit=True)
                ran = Ran()
                calls.arm(name, how, n)
                ran.attempt(load, faulty=True)
                met = calls.seen(name) >= n
                _clean(load, ran)
                self._finish(load, ran, before, met, keeps=_keeps(name, how))
            self._sites(load)
            faulthandler.cancel_dump_traceback_later()

    def _ready(self) -> contextlib.AbstractContextManager[Load]:
        assert self._path.ready is not None
        return self._path.ready(self._place)

    def _finish(
        self, load: Load, ran: Ran, before: dict[str, Any], met: bool, *, keeps: bool
    ) -> None:
        after: dict[str, Any] = {}

        def same() -> bool:
            after.update(_held(load))
            if keeps:
                before.update({n: v for n, v in after.items() if n.startswith(_THE_DRIVERS)})
            return after == before

        if not until(same, 20):
            ran.wrong.append(f"something is left: {_difference(before, after)}")
            before.update(after)  # the next one is not to blame
        self.tell(done=ran.outcomes, met=met, wrong=ran.wrong)

    def _count(self, load: Load) -> dict[str, dict[str, int]]:
        """Calls that a load without faults makes: the most of some, since workers share them."""
        most: dict[str, dict[str, int]] = {kind: {} for kind in load.calls}
        faulthandler.dump_traceback_later(2 * HANG_S, exit=True)
        for again in range(4):
            for calls in load.calls.values():
                calls.count()
            ran = Ran()
            ran.attempt(load, faulty=False)
            for kind, calls in load.calls.items():
                for name in calls.ways() if again else ():  # the first opens more
                    most[kind][name] = max(most[kind].get(name, 0), calls.seen(name))
            _clean(load, ran)
            _held(load)
            if ran.wrong:
                self.tell(done={}, met=True, wrong=ran.wrong)
        self.tell(counts=most)
        return most

    def _cells(
        self, load: Load, counts: dict[str, dict[str, int]]
    ) -> Iterator[tuple[str, str, How, int]]:
        for kind, calls in load.calls.items():
            for name, ways in calls.ways().items():
                for how in ways:
                    key = f"{self._path.name} {name}"
                    for n in numbers_of(counts[kind][name], how, self._thin, key):
                        yield kind, name, how, n
                if ways and counts[kind][name]:
                    self._check(load)

    def _check(self, load: Load) -> None:
        """Load without a fault."""
        ran = Ran()
        ran.attempt(load, faulty=False)
        _clean(load, ran)
        if ran.wrong:
            self.tell(done={}, met=True, wrong=ran.wrong)

    def _sites(self, load: Load) -> None:
        memory = load.calls.get("memory")
        if isinstance(memory, Allocations):
            self.tell(sites=sorted(memory.sites()))

    # ---- each load in its own process ----

    def _run_fresh(self) -> None:
        """Fail the calls that only the first load makes, which are the earliest of their kind.

        What they open stays open, so it is compared with what another process has.
        """
        reference = self._forked(None)
        if reference is None:
            return
        counts, before = reference["counts"], reference["held"]
        self.tell(counts=counts)
        self.tell(sites=reference["sites"])
        with self._ready() as load:  # opens no device before it loads
            self.tell(size=size_of(load.calls, counts))
            cells = [
                (kind, name, how, n)
                for kind, calls in load.calls.items()
                for name, ways in calls.ways().items()
                for how in (ways[:1] if self._thin else ways)
                for n in numbers_of(counts[kind][name], how, self._thin, name)
            ]  # fmt: skip
        for cell in cells:
            self.tell(cell=[cell[0], cell[1], cell[2].text, cell[3]])
            found = self._forked(cell)
            if found is None:
                continue
            held = found["held"]
            keeps = _keeps(cell[1], cell[2])
            if (_our_own(held) != _our_own(before)) if keeps else (held != before):
                found["wrong"].append(f"something is left: {_difference(before, held)}")
            self.tell(done=found["done"], met=found["met"], wrong=found["wrong"])

    def _forked(self, cell: Any) -> dict[str, Any] | None:
        """A load with a fault, and one without, in a new process."""
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            status = 1
            try:
                faulthandler.dump_traceback_later(HANG_S, exit=True)
                with os.fdopen(write, "w") as out:
                    json.dump(self._first(cell), out)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(write)
        with os.fdopen(read) as answer:
            text = answer.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            found: dict[str, Any] = json.loads(text)
            return found
        self.tell(done={}, met=True, wrong=[f"its process ended with status {status}"])
        return None

    def _first(self, cell: Any) -> dict[str, Any]:
        with self._ready() as load:
            for calls in load.calls.values():
                calls.count()
            ran, met = Ran(), True
            if cell is not None:
                kind, name, how, n = cell
                load.calls[kind].arm(name, how, n)
            ran.attempt(load, faulty=cell is not None)
            counts = {
                kind: {name: calls.seen(name) for name in calls.ways()}
                for kind, calls in load.calls.items()
            }
            if cell is not None:
                met = counts[kind][name] >= n
            _clean(load, ran)
            for calls in load.calls.values():
                calls.count()
            again = Ran()
            again.attempt(load, faulty=False)
            for kind, calls in load.calls.items():
                for name in calls.ways():
                    counts[kind][name] = max(0, counts[kind][name] - calls.seen(name))
            _clean(load, again)
            engine.shutdown()
            until(lambda: len(os.listdir("/proc/self/task")) <= MAIN_AND_WATCHDOG, 20)
            held = _held(load)
            memory = load.calls.get("memory")
            sites = sorted(memory.sites()) if isinstance(memory, Allocations) else []
        return {
            "done": ran.outcomes, "counts": counts, "met": met, "wrong": ran.wrong + again.wrong,
            "held": held, "sites": sites,
        }  # fmt: skip


# ---------------------------------------------------------------- the whole


def _start(path: LoadPath, place: Place, folder: Path, thin: bool) -> int:
    """Fork the process of a path."""
    folder.mkdir()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        faulthandler.enable()
        with open(folder / "told.jsonl", "w", encoding="utf-8") as told:
            run = PathRun(path, place, thin, told)
            run.run()
            run.tell(end=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _run_all(paths: Sequence[LoadPath], folder: Path, thin: bool, jobs: int) -> Summary:
    driver = fake_device.Driver(folder / "libfake_cuda.so")
    driver.lib.fake_devices(4)
    torch.set_num_threads(1)
    summary = Summary()
    waiting = list(enumerate(paths))
    running: dict[int, tuple[LoadPath, Path]] = {}
    gc.collect()
    gc.freeze()  # else collections in the processes walk all that is imported
    while waiting or running:
        while waiting and len(running) < jobs:
            number, path = waiting.pop(0)
            own = folder / f"path{number}"
            own.mkdir()
            place = Place(own, driver, folder / "libfake_cuda.so")
            pid = _start(path, place, own / "run", thin)
            running[pid] = path, own
        pid, status, used = os.wait4(-1, 0)
        path, own = running.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        summary.add(path.name, own / "run", code, used.ru_utime + used.ru_stime)
        shutil.rmtree(own)
    return summary


def _preload(folder: Path) -> Path | None:
    """Build native/tests/preload_malloc.c; None where that cannot be."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    library = folder / "preload_malloc.so"
    if compiler is None or platform.libc_ver()[0] != "glibc":
        return None
    source = str(NATIVE_TESTS / "preload_malloc.c")
    flags = ["-std=c11", "-O1", "-fPIC", "-shared", "-D_GNU_SOURCE="]
    built = subprocess.run([compiler, *flags, source, "-ldl", "-o", str(library)], check=False)
    return library if built.returncode == 0 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--thin", action="store_true", help="leave out calls in the middle")
    parser.add_argument("--path", help="only paths whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the preloaded process
    given = parser.parse_args()
    if given.folder is None:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as made:
            folder = Path(made)
            if fake_device.build(folder) is None:
                parser.error("needs a C compiler, to build the fake device driver")
            environment = dict(os.environ, OMP_NUM_THREADS="1")
            library = _preload(folder)
            if library is not None:
                environment["LD_PRELOAD"] = str(library)
            command = [sys.executable, *sys.argv, "--folder", made]
            return subprocess.run(command, env=environment, check=False).returncode
    paths = [
        LoadPath("two ranks", run=cases_matrix.run),
        LoadPath("killed ranks", run=fault_kills.ranks),
        LoadPath("killed, remote and kept", run=fault_kills.kept),
        LoadPath("killed at any time", run=fault_kills.at_any_time),
        *load_paths(),
    ]
    if given.thin:
        paths = [path for path in paths if path.thin]
    if given.path:
        paths = [path for path in paths if given.path in path.name]
    summary = _run_all(paths, given.folder, given.thin, given.jobs)
    if given.json:
        given.json.write_text(json.dumps(summary.json()), encoding="utf-8")
    print(summary.text())
    return 1 if summary.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
