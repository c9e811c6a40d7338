"""What this machine can give at most, per path, measured in the rounds of the race or alone.

Files are read by `fastst_patch.bench.ceilings`, raw and into small reused buffers; memory and
copies to a device are measured in processes of their own. In the first round every variant is
tried (threads, depth, streams), afterwards the best.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastst_patch.bench import hardware, settle
from fastst_patch.bench.ceilings import COLD_BUFFERED, DIRECT, PAGE_CACHE, Ceiling, Variant
from fastst_patch.bench.failures import BenchError

from . import process

TOUCH = "memory read, one core"
MEMCPY = "memcpy"
PINNED = "copies from pinned memory"
PAGEABLE = "copies from pageable memory"

MIB = 1 << 20
DEPTHS = (4, 8, 16, 32)
SMALL_DEPTHS = (8, 16)  # of 1 MiB
READERS = (1, 2, 4, 8, 16)
COPY_BYTES = 1 << 30


@dataclass
class Measured:
    """Numbers that processes of their own give; several names from one answer."""

    names: tuple[str, ...]
    message: dict[str, Any]
    rounds: dict[str, list[tuple[str, float]]] = field(default_factory=dict)  # (variant, GB/s)
    tried: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    unavailable: str | None = None

    def measure(self, _files: Sequence[str], reserve: settle.Reserve) -> None:
        """Add one measurement."""
        if self.unavailable:
            return
        try:
            with reserve.lend():
                answer = process.ask(self.message)
        except process.ProcessFailedError as failed:
            self.unavailable = str(failed)
            return
        for name, speeds in _speeds(answer).items():
            for variant, speed in speeds.items():
                self.tried.setdefault(name, {}).setdefault(variant, []).append(speed)
            best = max(speeds, key=speeds.__getitem__)
            self.rounds.setdefault(name, []).append((best, speeds[best]))


def _speeds(answer: dict[str, Any]) -> dict[str, dict[str, float]]:
    if "copy" in answer:
        threads = {_threads(int(count)): speed for count, speed in answer["copy"].items()}
        return {TOUCH: {"1 thread": answer["touch"]}, MEMCPY: threads}
    return {PINNED: answer["pinned"], PAGEABLE: answer["pageable"]}


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


@dataclass
class Board:
    """All ceilings of one device, and the files they are read from."""

    files: tuple[str, ...]
    reads: dict[str, list[Ceiling]]  # by the state of the page cache beside which they are measured
    others: list[Measured]

    def steps(self, cache: str, first: bool) -> list[Any]:
        """What is measured beside a cell; what needs no file, beside the first cell of a round."""
        return [*self.reads.get(cache, []), *(self.others if first else [])]

    def measure(self, step: Any, reserve: settle.Reserve) -> None:
        """Measure one of `steps`."""
        step.measure(self.files, reserve)

    def to_json(self, workload: str) -> list[dict[str, Any]]:
        """One entry a ceiling, with what every round gave."""
        found: list[dict[str, Any]] = []
        for cache, group in self.reads.items():
            for one in group:
                speeds = [one.bytes / seconds / 1e9 for seconds in one.seconds]
                known = {"verified": one.verified, "unavailable": one.unavailable}
                entry = _entry(one.name, cache, speeds, variant=one.chosen, tried=one.tried)
                found.append(entry | known)
        for other in self.others:
            for name in other.names:
                rounds = other.rounds.get(name, [])
                variant = rounds[-1][0] if rounds else ""
                speeds = [speed for _, speed in rounds]
                known = {"verified": True, "unavailable": other.unavailable}
                tried = other.tried.get(name, {})
                found.append(_entry(name, None, speeds, variant=variant, tried=tried) | known)
        return [{"workload": workload} | one for one in found]


def _entry(
    name: str,
    cache: str | None,
    speeds: list[float],
    *,
    variant: str,
    tried: dict[str, list[float]],
) -> dict[str, Any]:
    return {
        "name": name,
        "cache": cache,
        "variant": variant,
        "gb_per_s": statistics.median(speeds) if speeds else None,
        "rounds": speeds,
        "tried": {label: max(values) for label, values in tried.items()},
    }


def board(device: str, caches: Sequence[str], files: Sequence[str]) -> Board:
    """What can bind a load of these files to this device."""
    cpus = hardware.cpu_count()
    reads: dict[str, list[Ceiling]] = {}
    if "cold" in caches:
        reads["cold"] = [
            Ceiling(
                DIRECT, "cold",
                [Variant(True, depth, 4 * MIB) for depth in DEPTHS]
                + [Variant(True, depth, MIB) for depth in SMALL_DEPTHS],
            ),
            Ceiling(
                COLD_BUFFERED, "cold",
                [Variant(False, threads, 4 * MIB) for threads in (1, 4, 8, 16)]
                + [Variant(False, 8, MIB)],
            ),
        ]  # fmt: skip
    if "warm" in caches:
        readers = [count for count in READERS if count <= max(2, cpus)]
        reads["warm"] = [
            Ceiling(PAGE_CACHE, "warm", [Variant(False, count, MIB >> 1) for count in readers])
        ]
    threads = sorted({1, min(2, cpus), min(4, cpus), min(8, cpus), min(16, cpus)})
    others = [Measured((TOUCH, MEMCPY), {"kind": "memory", "threads": threads})]
    if device != "cpu":
        others.append(Measured((PINNED, PAGEABLE), {"kind": "copies", "total": COPY_BYTES}))
    return Board(tuple(map(os.fspath, files)), reads, others)


def binding(cache: str, device: str, speeds: dict[str, float]) -> str | None:
    """The lowest of the ceilings that hold for every loader; None if they were not measured.

    Nobody can bring bytes from the disk faster than its faster way to be read, nor over the bus
    faster than its faster kind of copy. On the CPU everybody's bytes are read once by one core
    under the clock, and a warm file can be mapped instead of copied, so nothing else binds there.
    """
    ways = [(DIRECT, COLD_BUFFERED)] if cache == "cold" else []
    if device == "cpu":
        ways.append((TOUCH,))
    else:
        ways.append((PINNED, PAGEABLE))
        if cache == "warm":
            ways.append((PAGE_CACHE,))
    limits = []
    for alternatives in ways:
        known = [name for name in alternatives if name in speeds]
        if not known:
            return None
        limits.append(max(known, key=speeds.__getitem__))
    return min(limits, key=speeds.__getitem__)


def speeds_of(entries: Sequence[dict[str, Any]], workload: str) -> dict[str, float]:
    """Median GB/s by name, of those that have one: of this workload's files, else of the first.

    Files that are read within milliseconds have none of their own.
    """
    names = [one["workload"] for one in entries]
    chosen = workload if workload in names else next(iter(names), None)
    here = [one for one in entries if one["workload"] == chosen]
    return {one["name"]: one["gb_per_s"] for one in here if one["gb_per_s"]}


def require_some(entries: Sequence[dict[str, Any]]) -> None:
    """Raise where nothing at all could be measured.

    Raises:
        BenchError: with the reasons.
    """
    if not any(one["gb_per_s"] for one in entries):
        reasons = sorted({one["unavailable"] or "no measurement" for one in entries})
        raise BenchError("no ceiling could be measured: " + "; ".join(reasons))
