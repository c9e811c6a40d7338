"""One process of the soak: its threads, what strikes them, and what it holds before and after."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import gc
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_device
import memory_source
import torch
import torch.distributed as dist
from _soak_files import Contents
from _soak_operations import OPERATIONS, Worker
from sharded import chunk

import fastst_patch
from fastst_patch import device, engine
from fastst_patch.config import _layers
from fastst_patch.dropin import eligibility
from fastst_patch.files import remote
from fastst_patch.layout import LayoutCache
from fastst_patch.sources.base import RemoteCancelledError, RemoteError

READY, ENDED = 1, (1 << 64) - 1
"""Beats: of a process that takes signals, and of a thread that is not waited for."""

COMMON: dict[str, tuple[Any, ...]] = {
    "threads": (0, 1, 3, 8),
    "chunk_bytes": ("64KiB", "256KiB", "4MiB"),
    "pinned_bytes": (None, 0, "256KiB", "16MiB"),
    "device_memory_budget": (None, 0, "256KiB"),
    "host_memory_budget": (None, 0, "1MiB"),
}
# Which options exclude each other is known: no process takes the pairs. One kind of process maps no
# file, so that files can be truncated under its reads.
KINDS: tuple[dict[str, tuple[Any, ...]], ...] = (
    {"io": ("auto", "mmap", "buffered", "direct")},
    {"io": ("buffered", "direct"), "tensors": ("auto", "owned"), "page_cache": ("keep", "drop")},
    {"io": ("auto", "buffered", "direct"), "tensors": ("auto", "owned"),
     "page_cache": ("auto", "drop")},
)  # fmt: skip
NEVER_MAPS = 1


class Struck(BaseException):
    """Thrown into a thread, anywhere."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The run, as all processes know it.

    Attributes:
        folder: with the files that all of them use.
        library: the fake driver.
        seconds: of the part that is judged; ``warm_s`` go before it.
        threads: of a process, beside its main thread.
        ranks: how many processes load shards together; 0: none.
    """

    folder: Path
    library: Path
    seed: int
    seconds: float
    warm_s: float
    threads: int
    processes: int
    ranks: int

    @property
    def slots(self) -> int:
        """Beats of a process: itself, its main thread, its threads, its handler and its rank."""
        return self.threads + 4


class Remote(memory_source.Store):
    """Remote files without a lock, which an exception could leave held: it is not under test."""

    def __init__(self, files: dict[str, bytes], injected: str) -> None:
        super().__init__(files)
        self.reads = deque(maxlen=1)  # type: ignore[assignment]
        self.opened = deque(maxlen=1)  # type: ignore[assignment]
        self.injected = injected

    def enter(self, source: memory_source.MemorySource) -> None:
        if source.cancelled:
            raise RemoteCancelledError("here", source.name, "cancelled")
        if random.random() < 0.01:
            raise RemoteError("here", source.name, self.injected)


class Process:
    """What operations find: see `_soak_operations`."""

    INJECTED = "injected by the soak"

    def __init__(self, number: int, plan: Plan, contents: Contents, beats: memoryview) -> None:
        self.number = number
        self.plan = plan
        self.contents = contents
        self.folder = plan.folder
        self.files = sorted(plan.folder.glob("slot-*.safetensors"))
        self.still_files = sorted(plan.folder.glob("still-*.safetensors"))
        self.options = COMMON | KINDS[number % len(KINDS)]
        self.never_maps = number % len(KINDS) == NEVER_MAPS
        self.shared: list[Any] = [None] * 6
        self.failures: list[str] = []
        self._versions = itertools.count((number + 1) * 10**9)
        self._beats = beats
        self._until = 0.0
        self._inside = False  # of the signal's handler
        self._unraisable: Counter[str] = Counter()
        # As many as it has threads, then that of the signal's handler.
        self._workers = [
            Worker(index, f"{plan.seed}/{number}") for index in range(plan.threads + 2)
        ]
        self._rank = Worker(plan.threads + 2, f"{plan.seed}/{number}")
        self._steps = itertools.count()
        operations = {
            name: one for name, one in OPERATIONS.items() if self.never_maps or name != "truncate"
        }
        self._names = list(operations)
        self._weights = [one.weight for one in operations.values()]

    # ---- what operations ask for ----

    def new_version(self) -> int:
        return next(self._versions)

    def some_file(self, me: Worker, device: str = "cpu") -> str:
        """A file; to a device one that nobody replaces, where stock may load it.

        Stock opens a path twice: for the header, and for the bytes.
        """
        by_stock = device != "cpu" and "mmap" in self.options["io"]
        return str(me.numbers.choice(self.still_files if by_stock else self.files))

    def some_url(self, me: Worker) -> str:
        return me.numbers.choice(self._urls)

    # ---- the run ----

    def run(self) -> dict[str, Any]:
        """Warm up, look at what is held, go on, and look again."""
        sys.unraisablehook = self._on_unraisable
        signal.signal(signal.SIGUSR1, self._on_load)
        signal.signal(signal.SIGINT, self._on_interrupt)
        LayoutCache.BYTES = 1 << 18  # it is full before the warm-up ends
        if self.number % 2:  # else stock makes small arrays
            eligibility.SMALL_FOR_ARRAYS = 0
        with contextlib.ExitStack() as stack:
            if self.never_maps:
                stack.enter_context(fastst_patch.config_context(io="buffered"))
            self._fake_device(stack)
            self._remote_files()
            if self.number < self.plan.ranks:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{self.folder}/store",
                    rank=self.number,
                    world_size=self.plan.ranks,
                )
            for name in self._names:  # what is made once is made, and each of them has run
                self._one(self._workers[0], name)
                self._workers[0].done[name] += 1
            self._beats[0] = READY
            self._phase(self.plan.warm_s)
            before = self._held()
            done = self._done()
            began = time.monotonic()
            self._phase(self.plan.seconds)
            seconds = time.monotonic() - began
            self._beats[0] = 0
            after = self._held()
            violations = self._driver.violations()
        return {
            "failures": self.failures,
            "before": before,
            "after": after,
            "done": self._done(),
            "judged": {name: n - done.get(name, 0) for name, n in self._done().items()},
            "bytes": sum(one.nbytes for one in [*self._workers, self._rank]),
            "seconds": seconds,
            "violations": violations,
            "dropped": dict(self._unraisable),
        }

    def _fake_device(self, stack: contextlib.ExitStack) -> None:
        self._driver = fake_device.Driver(self.plan.library)
        self._driver.lib.fake_devices(4)
        self._driver.lib.fake_quarantine(1 << 20)  # each call of the driver walks it
        runtime = fake_device.FakeRuntime(self._driver)
        runtime.settled = deque(maxlen=1)  # type: ignore[assignment]
        stack.enter_context(device.replaced(runtime))
        by_stock = fake_device.StockOnCpu(SimpleNamespace(setattr=setattr), self._driver)  # type: ignore[arg-type]
        by_stock.asked = by_stock.alive = deque(maxlen=1)  # type: ignore[assignment]

    def _remote_files(self) -> None:
        files = {
            f"memory://soak/{number}.safetensors": self.contents.encode(number)
            for number in range(100, 108)
        }
        store = Remote(files, self.INJECTED)
        self._urls = sorted(files)
        # Mocks would remember every call.
        remote.open_source = store.open_source  # type: ignore[assignment]
        remote.local_path = lambda *_, **__: None

    def _phase(self, seconds: float) -> None:
        """Run all threads for so long."""
        self._until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._work, args=(one,)) for one in self._workers[1:-1]
        ] + [threading.Thread(target=self._strike)]
        if self.number < self.plan.ranks:
            threads.append(threading.Thread(target=self._load_shards))
        for thread in threads:
            thread.start()
        self._work(self._workers[0])
        for thread in threads:
            thread.join()
        self.shared[:] = [None] * len(self.shared)
        for one in self._workers:
            one.kept.clear()

    def _over(self) -> bool:
        return bool(self.failures) or time.monotonic() > self._until

    def _one(self, me: Worker, name: str) -> None:
        operation = OPERATIONS[name]
        if operation.struck:
            with me.lock:
                me.armed = True
        try:
            operation.call(self, me)
        finally:
            with me.lock:
                me.armed = False

    def _next(self, me: Worker) -> None:
        (name,) = me.numbers.choices(self._names, self._weights)
        self._one(me, name)
        me.done[name] += 1
        self._beats[1 + me.number] += 1

    def _work(self, me: Worker) -> None:
        """What a thread does. Exceptions are thrown into it one by one: it arms itself again."""
        me.ident = threading.get_ident()
        self._beats[1 + me.number] = 0
        while not self._over():
            try:
                while not self._over():
                    self._next(me)
            except (Struck, KeyboardInterrupt):
                me.done["Ctrl-C" if me.number == 0 else "thrown into a thread"] += 1
            except BaseException:
                self._fail(me)
        me.ident = None
        self._beats[1 + me.number] = ENDED

    def _fail(self, me: Worker) -> None:
        self.failures.append(f"thread {me.number}: {traceback.format_exc()}")

    # ---- what strikes ----

    def _strike(self) -> None:
        """Throw into threads that are in an operation, anywhere."""
        numbers = random.Random(self.plan.seed)
        throw = ctypes.pythonapi.PyThreadState_SetAsyncExc
        throw.argtypes = [ctypes.c_ulong, ctypes.py_object]
        while not self._over():
            time.sleep(numbers.uniform(0.01, 0.05))
            one = numbers.choice(self._workers[1:-1])
            with one.lock:
                if one.armed and one.ident is not None:
                    one.armed = False
                    throw(one.ident, numbers.choice((Struck, KeyboardInterrupt)))

    def _on_interrupt(self, number: int, frame: object) -> None:
        me = self._workers[0]
        if me.armed:
            me.armed = False
            raise KeyboardInterrupt

    def _on_load(self, number: int, frame: object) -> None:
        """A signal's handler that loads, in the middle of whatever the main thread does."""
        if self._inside or self._workers[0].ident is None:
            return
        self._inside = True
        try:
            me = self._workers[-1]
            self._one(me, me.numbers.choice(("load_file", "safe_open", "numpy")))
            me.done["load in a signal's handler"] += 1
        except Exception:
            self._fail(self._workers[-1])
        finally:
            self._inside = False

    def _on_unraisable(self, report: Any) -> None:
        """An exception in a ``__del__``: what was thrown may end there, nothing else."""
        kind = report.exc_type
        self._unraisable[kind.__name__] += 1
        if not issubclass(kind, (Struck, KeyboardInterrupt)):
            text = "".join(traceback.format_exception(kind, report.exc_value, report.exc_traceback))
            self.failures.append(f"unraisable, in {report.object}: {text}")

    # ---- ranks ----

    def _load_shards(self) -> None:
        """Loads by a group of processes, in step until the first of them ends."""
        me = self._rank
        self._beats[1 + me.number] = 0
        try:
            go = torch.ones(1)
            while True:
                go[0] = float(not self._over())
                dist.all_reduce(go, dist.ReduceOp.MIN)
                if not go:
                    break
                self._load_one_shard(me)
                me.done["load_sharded"] += 1
                self._beats[1 + me.number] += 1
        except BaseException:
            self._fail(me)
        self._beats[1 + me.number] = ENDED

    def _load_one_shard(self, me: Worker) -> None:
        numbers = random.Random(f"{self.plan.seed}/{next(self._steps)}")  # of all ranks
        paths = numbers.sample(self.still_files, 2)
        dim = numbers.choice((0, 1, None))
        found = fastst_patch.load_sharded(paths, None, lambda name, shape, dtype: dim)
        names = {
            name for path in paths for name in self.contents.pieces(int(path.stem.split("-")[1]))
        }
        if set(found) != names:
            raise AssertionError(f"names {sorted(found)}, not {sorted(names)}")
        for name, tensor in found.items():
            rows = None if dim is None else self._rows(name, dim)
            me.check(self, name, tensor, () if rows is None else rows)

    def _rows(self, name: str, dim: int) -> Any:
        """The index of this rank's shard."""
        count = self.contents.piece(name).shape[dim]
        places = chunk(torch.arange(count), 0, self.number, self.plan.ranks)
        begin = int(places[0]) if len(places) else 0
        part = slice(begin, begin + len(places))
        return part if dim == 0 else (slice(None), part)

    # ---- what is held ----

    def _done(self) -> dict[str, int]:
        return dict(sum((one.done for one in [*self._workers, self._rank]), Counter()))

    def _held(self) -> dict[str, int]:
        """What the process holds while nothing runs in it."""
        gc.collect()
        engine.shutdown()
        gc.collect()
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        counters = engine.counters()
        names = ("threads", "jobs", "arenas", "arena_bytes", "files", "fed_files", "pinned_bytes")
        held = {f"engine: {name}": counters[name] for name in names}
        live = self._driver.live()
        for name in ("ranges", "blocks", "block_bytes", "events", "file_handles", "file_buffers"):
            held[f"fake driver: {name}"] = int(getattr(live, name))
        held["descriptors"] = len(os.listdir("/proc/self/fd"))
        held["threads"] = len(os.listdir("/proc/self/task"))
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        held["maps of files"] = sum(".safetensors" in line for line in maps)
        held["layers of options"] = len(_layers)
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        sizes = dict(line.split(":", 1) for line in status)
        held["anonymous KiB"] = int(sizes["RssAnon"].split()[0])
        return held


def run(number: int, plan: Plan, contents: Contents, beats: memoryview) -> None:
    """Be a process of the soak; ends the process."""
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)  # of forked children
    code = 1
    try:
        result = Process(number, plan, contents, beats).run()
        path = plan.folder / f"result-{number}.json"
        path.write_text(json.dumps(result), encoding="utf-8")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # the fake device's and gloo's threads are not taken apart
