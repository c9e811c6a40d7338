"""The fault matrix over ranks: one rank meets the faults, and all load or all raise its error.

`run` is a path of fault_matrix.py; `matrix` is its case in every rank.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import sharded
from cases_faults import _held
from cases_forms import FORMS, Me, full_of, way_of
from fault_calls import (
    Allocations,
    Calls,
    DriverCalls,
    How,
    PythonCalls,
    SystemCalls,
    numbers_of,
    size_of,
)
from fault_loads import NO_DEVICE, SMALL, Place
from ranks import Case, Nursery
from sharded import assert_tensors, load_sharded
from waiting import until

from fastst_patch import RankError, device, engine
from fastst_patch.sharding import shared_buffer

HANG_S = 120
WAYS: dict[str, dict[str, Any]] = {
    "mmap": {}, "exchange": {"io": "buffered"}, "exchange+direct": {"io": "direct"},
    "exchange to a device": {"device": "cuda", "io": "buffered"},
}  # fmt: skip
WORLD = 2

Cell = tuple[str, str, How, int]


class _Matrix:
    """The matrix of one way, in one rank."""

    def __init__(self, rank: Any, files: list[str], bad: int, options: dict[str, Any]) -> None:
        self._rank = rank
        self._files = files
        self._bad = bad
        self._options = options
        self._full = full_of(files)
        self._plan, self._expect = FORMS["last"](self._full, Me(rank.rank, rank.world))
        self.calls: dict[str, Calls] = {"system": SystemCalls()}
        if rank.rank == bad:
            sharing = PythonCalls((shared_buffer,), errno.ENOMEM)
            self.calls["python"] = sharing
        if Allocations.preloaded():
            self.calls["memory"] = Allocations()
        if rank.runtime is not None:
            self.calls["driver"] = DriverCalls(rank.runtime.driver, "cuda")
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.cells = 0

    def load(self, cell: Cell | None) -> None:
        """Load once on all ranks, and judge it."""
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        device._forget()
        error: Exception | None = None
        met = self._rank.rank == self._bad and cell is not None
        if met and cell is not None:
            kind, name, how, n = cell
            self.calls[kind].arm(name, how, n)
        try:
            result = load_sharded(self._files, None, self._plan, **self._options)
            assert_tensors(result, self._full, self._expect)
            del result
            outcome = "stock's result"
        except AssertionError as differs:
            outcome = "wrong"
            self.wrong.append(f"{cell}: another result than stock's: {differs}")
        except Exception as raised:
            outcome, error = type(raised).__name__, raised
        self._clean()
        if error is not None:
            self._judge(cell, error)
        del error
        found = self._rank.everyone(outcome)
        if len({one == "stock's result" for one in found}) > 1:
            self.wrong.append(f"{cell}: the ranks differ: {found}")
        if cell is not None:
            self.outcomes[outcome] += 1
            self.cells += 1

    def _judge(self, cell: Cell | None, error: Exception) -> None:
        if self._rank.runtime is not None and any(one in str(error) for one in NO_DEVICE):
            return
        if cell is None:
            self.wrong.append(f"a load without a fault raised {error!r}")
        elif not isinstance(error, RankError) or error.rank != self._bad:
            self.wrong.append(f"{cell}: not the error of rank {self._bad}: {error!r}")
        elif "part-" not in str(error):
            self.wrong.append(f"{cell}: an error that does not name the file: {error}")

    def _clean(self) -> None:
        until(lambda: engine.counters()["jobs"] == 0, HANG_S)
        runtime = self._rank.runtime
        if runtime is not None:
            runtime.driver.lib.fake_drain()
            self.wrong += [f"a rule of the driver: {one}" for one in runtime.driver.violations()]
            runtime.driver.clear()
        for calls in self.calls.values():
            calls.disarm()

    def counts(self) -> dict[str, dict[str, int]]:
        """Calls of a load without faults."""
        most: dict[str, dict[str, int]] = {kind: {} for kind in self.calls}
        for again in range(4):
            for calls in self.calls.values():
                calls.count()
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            assert_tensors(
                load_sharded(self._files, None, self._plan, **self._options),
                self._full, self._expect,
            )  # fmt: skip
            for kind, calls in self.calls.items():
                for name in calls.ways() if again else ():
                    most[kind][name] = max(most[kind].get(name, 0), calls.seen(name))
            self._clean()
            _held(self._rank)
            self._rank.meet()
        return most

    def cells_of(self, counts: dict[str, dict[str, int]], thin: bool) -> Iterator[Cell]:
        for kind, calls in self.calls.items():
            for name, ways in calls.ways().items():
                for how in ways:
                    if thin and how.count != 1:
                        continue
                    for n in numbers_of(counts[kind][name], how, thin, name):
                        yield kind, name, how, n

    def sites(self) -> list[int]:
        memory = self.calls.get("memory")
        return sorted(memory.sites()) if isinstance(memory, Allocations) else []


def matrix(rank: Any, files: list[str], bad: int, thin: bool, **way: Any) -> dict[str, Any]:
    """All faults on one rank, in a way of loading."""
    with way_of(rank, way) as options:
        made = _Matrix(rank, files, bad, options)
        counts = rank.everyone(made.counts())[bad]
        cells = rank.everyone(list(made.cells_of(counts, thin)))[bad]
        before = _kept(rank)
        for cell in cells:
            kind, name, how, n = cell
            made.load((kind, name, How(*how), n))
            after = _kept(rank)
            rank.meet()  # the node's ranks share files of shared memory
            if after != before:
                left = [f"{k}: {before[k]}, {after[k]}" for k in before if before[k] != after[k]]
                made.wrong.append(f"{cell}: something is left: {left}")
                before = after
        made.load(None)
        faulthandler.cancel_dump_traceback_later()
    return {
        "counts": counts, "size": size_of(made.calls, counts), "cells": made.cells,
        "outcomes": made.outcomes, "wrong": made.wrong[:50], "sites": made.sites(),
    }  # fmt: skip


def _kept(rank: Any) -> dict[str, Any]:
    held = _held(rank)
    held["shm"] = []  # gloo's, of other ranks, too
    held["python threads"] = [name for name in held["python threads"] if "Dummy" not in name]
    return held


def once(rank: Any, files: list[str], **way: Any) -> None:
    """A load without a fault."""
    plan, expect = FORMS["last"](full_of(files), Me(rank.rank, rank.world))
    assert_tensors(load_sharded(files, None, plan, **SMALL, **way), full_of(files), expect)


def killed(rank: Any, files: list[str], bad: int, after: float, **way: Any) -> str:
    """Load again and again until one rank is killed; the other's exception."""
    once(rank, files, **way)
    if rank.rank == bad:
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        while True:
            once(rank, files, **way)
    except Exception as error:
        return type(error).__name__


def ranks_files(place: Place) -> list[str]:
    """Two files for ranks to load."""
    files = []
    for number in range(2):
        path = place.folder / f"part-{number}.safetensors"
        tensors = [(f"{number}.w{k}", "BF16", (257 + k, 301)) for k in range(3)]
        sharded.write_file(path, tensors, pad=number)
        files.append(str(path))
    return files


def run(place: Place, thin: bool, tell: Callable[..., None]) -> None:
    """Run the matrix of each way, with each rank as the bad one."""
    files = ranks_files(place)
    nursery = Nursery(place.folder, place.library)
    cases = [
        Case("cases_matrix.matrix",
             {"files": files, "bad": bad, "thin": thin, **SMALL, **way}, name=f"{name}, rank {bad}")
        for i, (name, way) in enumerate(WAYS.items()) for bad in range(WORLD)
        if not thin or (bad + i) % 2 == 0
    ]  # fmt: skip
    try:
        ran = nursery.run(cases, WORLD, timeout=100, limit=1500)
        for case in cases:
            for value in ran.values(case)[:1]:
                tell(counts=value["counts"])
                tell(size=value["size"])
                tell(sites=value["sites"])
            wrong = [one for value in ran.values(case) for one in value["wrong"]]
            first = ran.values(case)[0]
            tell(cell=case.name)
            tell(done=first["outcomes"], met=True, wrong=wrong, cells=first["cells"])
    finally:
        nursery.close()
