"""What a machine can give at most, per path: reads, memory, and copies to a device.

    python benchmarks/ceilings.py [--file FILE] [--device cpu|cuda] [--rounds 5] [--json FILE]

Needs no root. Files are read raw and into small reused buffers; reads take FILE, or a checkpoint
written for the purpose and removed. Memory and copies to a device are measured in processes of
their own. The first round tries every number of threads, depth or streams, the others the best of
them. The race measures the same in its rounds; `gpu_ceilings.py` adds what only a device has.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # Behind what is installed, and without this folder, whose files are no modules of others.
    sys.path[:] = [one for one in sys.path if one not in ("", str(Path(__file__).parent))]
    sys.path.append(str(ROOT))

from benchmarks.race import process  # noqa: E402
from benchmarks.race.entrants import scrub  # noqa: E402
from fastst_patch.bench import guarded, hardware, settle, synthetic_checkpoint, write_json  # noqa: E402
from fastst_patch.bench.ceilings import (  # noqa: E402
    COLD_BUFFERED,
    DIRECT,
    PAGE_CACHE,
    Ceiling,
    Variant,
)
from fastst_patch.bench.copies import in_threads  # noqa: E402
from fastst_patch.bench.failures import BenchError, UsageError  # noqa: E402
from fastst_patch.bench.process import ProcessFailedError  # noqa: E402
from fastst_patch.report_table import grid  # noqa: E402

TOUCH = "memory read, one core"
MEMCPY = "memcpy"
PINNED = "copies from pinned memory"
PAGEABLE = "copies from pageable memory"

MIB = 1 << 20
DEPTHS = (4, 8, 16, 32)
SMALL_DEPTHS = (8, 16)  # of 1 MiB
THREADS = (1, 4, 8, 16)  # of cold buffered reads
READERS = (1, 2, 4, 8, 16)  # of the page cache
COPY_BYTES = 1 << 30
BLOCK = 64 * MIB  # of memory that is read or copied
BLOCK_ROUNDS = 4
SECTIONS_S = 600.0


@dataclass
class Measured:
    """Numbers that processes of their own give; several names from one answer."""

    names: tuple[str, ...]
    message: dict[str, Any]
    rounds: dict[str, list[tuple[str, float]]] = field(default_factory=dict)  # (variant, GB/s)
    tried: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    unavailable: str | None = None
    verified = True  # no file takes part

    @property
    def name(self) -> str:
        """All of the names."""
        return " and ".join(self.names)

    def measure(self, _files: Sequence[str], reserve: settle.Reserve) -> None:
        """Add one measurement."""
        if self.unavailable:
            return
        try:
            with reserve.lend():
                answer = process.ask(self.message)
        except ProcessFailedError as failed:
            self.unavailable = scrub(str(failed))
            return
        for name, speeds in _speeds(answer).items():
            for variant, speed in speeds.items():
                self.tried.setdefault(name, {}).setdefault(variant, []).append(speed)
            best = max(speeds, key=speeds.__getitem__)
            self.rounds.setdefault(name, []).append((best, speeds[best]))


def _speeds(answer: dict[str, Any]) -> dict[str, dict[str, float]]:
    if "copy" in answer:  # of memory_speeds, else of gpu_ceilings.copies
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

    def steps(self, cache: str, first: bool) -> list[Ceiling | Measured]:
        """What is measured beside a cell; what needs no file, beside the first cell of a round."""
        return [*self.reads.get(cache, []), *(self.others if first else [])]

    def to_json(self, workload: str) -> list[dict[str, Any]]:
        """One entry a ceiling, with what every round gave."""
        found = [
            _entry(one, one.name, cache, [one.bytes / seconds / 1e9 for seconds in one.seconds],
                   variant=one.chosen, tried=one.tried)
            for cache, group in self.reads.items() for one in group
        ]  # fmt: skip
        for other in self.others:
            for name in other.names:
                rounds = other.rounds.get(name, [])
                best = rounds[-1][0] if rounds else ""
                speeds, tried = [speed for _, speed in rounds], other.tried.get(name, {})
                found.append(_entry(other, name, None, speeds, variant=best, tried=tried))
        return [{"workload": workload} | one for one in found]


def _entry(
    step: Ceiling | Measured, name: str, cache: str | None, speeds: list[float], *, variant: str,
    tried: dict[str, list[float]],
) -> dict[str, Any]:  # fmt: skip
    return {
        "name": name,
        "cache": cache,
        "variant": variant,
        "gb_per_s": statistics.median(speeds) if speeds else None,
        "rounds": speeds,
        "tried": {label: max(values) for label, values in tried.items()},
        "verified": step.verified,
        "unavailable": step.unavailable,
    }


def board(device: str, caches: Sequence[str], files: Sequence[str], *, few: bool = False) -> Board:
    """What can bind a load of these files to this device; ``few``: by the likeliest variants."""
    cpus = hardware.cpu_count()
    depths, threads, readers = ((8, 16), (8,), (8, 16)) if few else (DEPTHS, THREADS, READERS)
    reads: dict[str, list[Ceiling]] = {}
    if "cold" in caches:
        direct = [Variant(True, depth, 4 * MIB) for depth in depths]
        buffered = [Variant(False, count, 4 * MIB) for count in threads]
        if not few:
            direct += [Variant(True, depth, MIB) for depth in SMALL_DEPTHS]
            buffered.append(Variant(False, 8, MIB))
        reads["cold"] = [
            Ceiling(DIRECT, "cold", direct),
            Ceiling(COLD_BUFFERED, "cold", buffered),
        ]
    if "warm" in caches:
        fitting = [count for count in readers if count <= max(2, cpus)] or [cpus]
        reads["warm"] = [
            Ceiling(PAGE_CACHE, "warm", [Variant(False, count, MIB >> 1) for count in fitting])
        ]
    cores = sorted({1, min(2, cpus), min(4, cpus), min(8, cpus), min(16, cpus)})
    others = [Measured((TOUCH, MEMCPY), {"kind": "memory", "threads": cores})]
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


# ---- memory, in a process of its own ------------------------------------


def memory_speeds(threads: list[int]) -> dict[str, Any]:
    """GB/s of memcpy by so many threads, and of the routine that touches bytes, on one core."""
    from fastst_patch import engine

    blocks = [ctypes.create_string_buffer(BLOCK) for _ in range(2 * max(threads))]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    engine.touch(ctypes.addressof(blocks[0]), BLOCK)
    begin = time.perf_counter()
    for _ in range(BLOCK_ROUNDS):
        for block in blocks[:2]:
            engine.touch(ctypes.addressof(block), BLOCK)
    touched = 2 * BLOCK_ROUNDS * BLOCK / (time.perf_counter() - begin) / 1e9
    return {"touch": touched, "copy": {str(count): _memcpy(blocks, count) for count in threads}}


def _memcpy(blocks: list[Any], count: int) -> float:
    def work(number: int) -> None:
        for _ in range(BLOCK_ROUNDS):  # ctypes lets go of the GIL
            ctypes.memmove(blocks[2 * number], blocks[2 * number + 1], BLOCK)

    begin = time.perf_counter()
    in_threads(count, work)
    return count * BLOCK_ROUNDS * BLOCK / (time.perf_counter() - begin) / 1e9


# ---- the command --------------------------------------------------------

_LEFT = {"ceiling", "best", "all tried"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", help="on the disk of interest; else one is written")
    parser.add_argument("--dir", help="where to write it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--quick", action="store_true", help="one round, of the likeliest variants")
    parser.add_argument("--json", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    rounds = 1 if args.quick else args.rounds
    if rounds < 1:
        raise UsageError("--rounds: at least 1")
    device = device_facts(args.device)
    with contextlib.ExitStack() as stack:
        if args.file:
            path = Path(args.file).absolute()
            if not path.is_file():
                raise UsageError(f"{path}: no such file")
        else:
            path = stack.enter_context(synthetic_checkpoint(args.dir))
        environment = hardware.environment(path)
        caches = ("warm",) if hardware.filesystem(path).in_memory else ("cold", "warm")
        measured = board(args.device, caches, [str(path)], few=args.quick)
        reserve = stack.enter_context(settle.reserve_for([str(path)]))
        for _ in range(rounds):
            for number, cache in enumerate(caches):
                for step in measured.steps(cache, number == 0):
                    step.measure(measured.files, reserve)
        entries = measured.to_json(path.name)
        sections = {}
        if args.device != "cpu":
            message = {"kind": "sections", "path": str(path), "repeats": min(rounds, 3)}
            sections = process.ask(message, SECTIONS_S)
    require_some(entries)
    print(f"{environment['cpu']}, {environment['cpus']} CPUs; {environment['kernel']}; "
          f"{environment['fs']} on {environment['block_device']}, "
          f"read-ahead {environment['read_ahead_kb']} KiB\n")  # fmt: skip
    print("\n".join(grid([("ceiling", "GB/s", "best", "all tried"), *map(cells, entries)], _LEFT)))
    for name, value in sections.items():
        for row in value if isinstance(value, list) else [value]:
            print(f"{name:16} {figures(row)}")
    if args.json:
        environment |= {name: value for name, value in device.items() if name != "uuid"}
        write_json(args.json, {"environment": environment, "ceilings": entries} | sections)
    return int(any("failed" in value for value in sections.values()))


def device_facts(kind: str) -> dict[str, Any]:
    """The device's facts, where one is meant.

    Raises:
        UsageError: torch cannot use it.
    """
    if kind == "cpu":
        return {}
    try:
        facts = process.ask({"kind": "device"})
    except ProcessFailedError as failed:
        raise UsageError(f"--device {kind}: asking torch: {scrub(str(failed))}") from None
    if facts["gpu"] is None:
        raise UsageError(f"--device {kind}: {facts['reason']}")
    return facts


def figures(row: dict[str, Any]) -> str:
    """The numbers of one row of a section, each with its name."""
    cells = {name: one for name, one in row.items() if one is not None}
    return ", ".join(f"{name} {one:.3g}" if isinstance(one, float) else f"{name} {one}"
                     for name, one in cells.items())  # fmt: skip


def cells(one: dict[str, Any]) -> tuple[str, str, str, str]:
    """Name, GB/s, the best variant, and all that were tried, as text."""
    if one["gb_per_s"] is None:
        return one["name"], "-", f"not available: {one['unavailable']}", ""
    mark = "" if one["verified"] else " (state of the cache not proven)"
    tried = ", ".join(f"{name}: {speed:.1f}" for name, speed in one["tried"].items())
    return one["name"] + mark, f"{one['gb_per_s']:.2f}", one["variant"], tried


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(arguments)
    return guarded("ceilings", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
