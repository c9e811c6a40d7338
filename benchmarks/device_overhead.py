"""Host overhead of loads to a device: the whole device path over the fake driver, copies free.

    python benchmarks/device_overhead.py [--rounds 5] [--gb 1.0] [--dir DIR] [--json FILE]

What is timed is all that the processor does for a load but the copies themselves: opening,
parsing, planning, allocating, reading the page cache into slots, asking for copies, making
tensors, waiting. No GPU takes part, and it needs the checkout: the driver is built from
native/tests. Calls of a real driver cost more than the fake's (1 to 3 µs for a copy); how many
there were stands in the table.

Every measurement is a process of its own with a small load behind it, so that the driver is
open, the workers run and the first chunk has been proved. Slots are pinned in the timed load.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _harness as harness

from fastst_patch import engine
from fastst_patch.bench import checkpoint_files, hardware, stats, write_json
from fastst_patch.bench.checkpoint import (
    TensorSpec,
    moe_specs,
    pick_directory,
    temporary_checkpoint,
    transformer_specs,
    write_checkpoint,
)
from fastst_patch.bench.failures import BenchError
from fastst_patch.bench.table import with_spread

TESTS = Path(__file__).resolve().parent.parent / "tests" / "support"
TENSORS = 18_867

TARGET_MICROSECONDS = 5.0
TARGET_GB_PER_S = 8.0

MODES = ("dlpack", "owned")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    file: str  # key of the files
    tensors: str
    threads: int  # 0: as the package chooses


def cases() -> list[Case]:
    tiny = [Case(f"{file}", file, mode, 0) for file in ("200 B", "256 B") for mode in MODES]
    big = [
        Case(f"dense, {'1 thread' if threads else 'default threads'}", "dense", mode, threads)
        for threads in (1, 0)
        for mode in MODES
    ]
    return tiny + big


# ---- the process that is timed ------------------------------------------


class BumpRuntime:
    """What `empty` costs beside torch's caching allocator: one view of a block taken before.

    The fake's own blocks would do, but each of them is a malloc and a search.
    """

    def __init__(self, runtime: Any, block: Any) -> None:
        self.storage = block.untyped_storage()
        self.at = 0
        self.calls = 0
        runtime.empty = self.empty

    def empty(self, shape: list[int], dtype: Any, _ordinal: int) -> Any:
        import torch

        made = torch.empty(0, dtype=dtype)
        made.set_(self.storage, self.at // dtype.itemsize, shape)
        self.at += -(-made.nbytes // 512) * 512
        self.calls += 1
        return made


def child(message: dict[str, Any]) -> dict[str, Any]:
    """Time one load, in a process that has loaded a small file before."""
    import torch

    import fastst_patch
    from fastst_patch import device

    fake_device = _fake_device()
    driver = fake_device.Driver(Path(message["library"]))
    runtime = fake_device.FakeRuntime(driver)
    options = {"tensors": message["tensors"], "threads": message["threads"], "fallback": "error"}
    driver.clear()
    with device.replaced(runtime), fastst_patch.config_context(**options):
        del options
        fastst_patch.load_file(message["small"], device="cuda")
        driver.clear()
        driver.lib.fake_device_bytes(1 << 40)
        driver.lib.fake_free_copies(1)
        bump = None
        if message["tensors"] == "owned":
            room = message["bytes"] + 512 * message["count"]
            bump = BumpRuntime(runtime, runtime.empty([room], torch.uint8, 0))
        if message["warm_slots"]:  # the slots stay, pinned
            fastst_patch.load_file(message["path"], device="cuda")
            if bump is not None:
                bump.at = bump.calls = 0
        gc.collect()
        gc.freeze()
        calls = {name: driver.calls(name) for name in _CALLS}
        cpu, begin = time.process_time(), time.perf_counter()
        loaded = fastst_patch.load_file(message["path"], device="cuda")
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        assert len(loaded) == message["count"]
        calls = {name: driver.calls(name) - before for name, before in calls.items()}
        answer = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "copies": calls["cuMemcpyHtoDAsync_v2"],
            "calls": sum(calls.values()),
            "allocator_seconds": _allocator_seconds(bump),
            "pinned_bytes": engine.counters()["pinned_bytes"],
            "violations": driver.violations(),
        }
        if message["profile"]:
            _profile(
                lambda: fastst_patch.load_file(message["path"], device="cuda"),
                bump,
                Path(message["profile"]),
            )
        del loaded, bump
        gc.collect()
        engine.shutdown()
    return answer


_CALLS = (
    "cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventQuery", "cuEventSynchronize",
    "cuStreamWaitEvent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuEventCreate",
    "cuMemHostRegister_v2",
)  # fmt: skip


def _allocator_seconds(bump: BumpRuntime | None) -> float:
    """What the stand-in for torch's allocator took of the time."""
    import torch

    if bump is None:
        return 0.0
    count, bump.at = bump.calls, 0
    begin = time.perf_counter()
    kept = [bump.empty([1, 100], torch.bfloat16, 0) for _ in range(count)]
    taken = time.perf_counter() - begin
    del kept
    return taken


def _profile(load: Any, bump: BumpRuntime | None, file: Path) -> None:
    import cProfile
    import pstats

    if bump is not None:
        bump.at = 0
    profile = cProfile.Profile()
    profile.runcall(load)
    with file.open("w", encoding="utf-8") as stream:
        pstats.Stats(profile, stream=stream).sort_stats("tottime").print_stats(25)


def _profile_file(args: argparse.Namespace, case: Case) -> Path:
    name = f"{case.name}-{case.tensors}.txt".replace(" ", "-").replace(",", "")
    return Path(args.profile).absolute() / name


def _fake_device() -> Any:
    sys.path.insert(0, str(TESTS))
    try:
        return importlib.import_module("fake_device")
    except ImportError as error:
        raise BenchError(f"needs the checkout with its tests ({error})") from error
    finally:
        sys.path.remove(str(TESTS))


# ---- the runner ---------------------------------------------------------


@contextlib.contextmanager
def written(directory: Path, nbytes: int) -> Iterator[dict[str, checkpoint_files.CheckpointFile]]:
    """The files to load, and a small one."""
    specs = {
        "200 B": moe_specs(TENSORS, 1, 100),
        "256 B": moe_specs(TENSORS, 1, 128),
        "dense": transformer_specs(nbytes),
        # A whole chunk to be read back and compared: copies that are free would not pass that.
        "small": [TensorSpec("one", (2048, 2048))],
    }
    with temporary_checkpoint(directory, specs["small"]) as small:
        found = {"small": checkpoint_files.describe(small)}
        for name in ("200 B", "256 B", "dense"):
            path = small.parent / f"{name.replace(' ', '')}.safetensors"
            write_checkpoint(path, specs[name], lambda _: None)
            found[name] = checkpoint_files.describe(path)
        yield found


def measure(args: argparse.Namespace, library: Path, made: dict[str, Any]) -> dict[str, Any]:
    dense, by_name = made["dense"], {f"{case.name}, {case.tensors}": case for case in cases()}
    profiled: set[Case] = set()
    reads: dict[int, list[float]] = {1: [], 0: []}
    turn = itertools.count(1)

    def read() -> None:
        for threads, seconds in reads.items():
            count = threads or hardware.cpu_count()
            nbytes, taken = engine.read_ceiling(
                dense.path, direct=False, threads=count, chunk_bytes=4 << 20
            )
            seconds.append(nbytes / taken / 1e9)

    def run_case(name: str) -> dict[str, Any]:
        case = by_name[name]
        file = made[case.file]
        harness.prepared("warm", [file.path])
        profile = bool(args.profile) and case not in profiled
        profiled.add(case)
        message = {
            "library": str(library),
            "small": made["small"].path,
            "path": file.path,
            "count": len(file.order),
            "bytes": file.tensor_bytes,
            "tensors": case.tensors,
            "threads": case.threads,
            "warm_slots": args.warm_slots,
            "profile": str(_profile_file(args, case)) if profile else "",
        }
        answer = harness.fresh(__file__, message, name)
        if answer["violations"]:
            raise BenchError(f"{name}: the fake driver objects: {answer['violations'][0]}")
        if next(turn) % len(by_name) == 0:  # in every round, as the loads
            read()
        return answer

    runs = harness.race([*by_name], args.rounds, run_case)
    return {"runs": {by_name[name]: some for name, some in runs.items()}, "reads": reads}


def report(measured: dict[str, Any], made: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Print the table; return its numbers."""
    print(
        f"{TENSORS} tensors of 200 and of 256 bytes, and {made['dense'].tensor_bytes / 1e9:.2f} GB "
        f"in {len(made['dense'].order)}; warm, over the fake driver with free copies;\n"
        f"medians of {rounds} rounds in fresh processes, ± {stats.SPREAD}; "
        f"load average {os.getloadavg()[0]:.1f} on {hardware.cpu_count()} CPUs"
    )
    print(f"{'file':22} {'tensors':8} {'ms':>14} {'CPU ms':>14} {'µs a tensor':>14} "
          f"{'GB/s':>13} {'GB/s a core':>13} {'copies':>7} {'calls':>7}")  # fmt: skip
    rows = [_row(case, runs, made[case.file]) for case, runs in measured["runs"].items()]
    read = {threads: stats.summarize(rates) for threads, rates in measured["reads"].items()}
    print(f"raw page-cache read into one reused buffer a thread: {with_spread(read[1])} GB/s with "
          f"1 thread, {with_spread(read[0])} with {hardware.cpu_count()}")  # fmt: skip
    print("µs a tensor: without the stand-in for torch's allocator, which took "
          f"{max(row['allocator_microseconds'] for row in rows):.2f} µs a tensor where each is "
          "owned.\nGB/s a core: bytes over the processor time of the whole process.")  # fmt: skip
    worst = max(row["microseconds_a_tensor"] for row in rows if row["file"] != "dense")
    single = min(row["gb_per_s_a_core"] for row in rows if row["threads"] == 1)
    print(f"targets: at most {TARGET_MICROSECONDS:g} µs a tensor: "
          f"{'met' if worst <= TARGET_MICROSECONDS else 'MISSED'} ({worst:.2f}); at least "
          f"{TARGET_GB_PER_S:g} GB/s a core from the page cache: "
          f"{'met' if single >= TARGET_GB_PER_S else 'MISSED'} ({single:.2f})")  # fmt: skip
    return {
        "rows": rows,
        "page_cache_read_gb_per_s": {str(k): v.median for k, v in read.items()},
        "targets": {"microseconds_a_tensor": TARGET_MICROSECONDS, "gb_per_s": TARGET_GB_PER_S},
    }


def _row(
    case: Case, runs: list[dict[str, Any]], file: checkpoint_files.CheckpointFile
) -> dict[str, Any]:
    gb, count, tiny = file.tensor_bytes / 1e9, len(file.order), case.file != "dense"
    found = {
        "ms": [1e3 * one["seconds"] for one in runs],
        "cpu_ms": [1e3 * one["cpu_seconds"] for one in runs],
        "microseconds_a_tensor": [
            1e6 * (one["seconds"] - one["allocator_seconds"]) / count for one in runs
        ],
        "gb_per_s": [gb / one["seconds"] for one in runs],
        "gb_per_s_a_core": [gb / one["cpu_seconds"] for one in runs],
    }
    summaries = {name: stats.summarize(values) for name, values in found.items()}
    shown = {name: with_spread(summary) for name, summary in summaries.items()}
    for name in ("gb_per_s", "gb_per_s_a_core") if tiny else ("microseconds_a_tensor",):
        shown[name] = "-"
    print(
        f"{case.name:22} {case.tensors:8} {shown['ms']:>14} {shown['cpu_ms']:>14} "
        f"{shown['microseconds_a_tensor']:>14} {shown['gb_per_s']:>13} "
        f"{shown['gb_per_s_a_core']:>13} {runs[0]['copies']:>7} {runs[0]['calls']:>7}"
    )
    allocator = stats.summarize([1e6 * one["allocator_seconds"] / count for one in runs]).median
    return (
        asdict(case)
        | {name: summary.median for name, summary in summaries.items()}
        | {f"{name}_spread": summary.spread for name, summary in summaries.items()}
        | {"allocator_microseconds": allocator, "count": count, "bytes": file.tensor_bytes}
        | {"runs": runs}
    )


def run(args: argparse.Namespace) -> int:
    place = pick_directory(args.dir)
    with tempfile.TemporaryDirectory() as folder, written(place, int(args.gb * 1e9)) as made:
        library = _fake_device().build(Path(folder))
        if library is None:
            raise BenchError("needs a C compiler, to build the fake device driver")
        environment = hardware.environment(made["dense"].path)
        found = report(measure(args, library, made), made, args.rounds)
    if args.json:
        write_json(args.json, {"environment": environment, "rounds": args.rounds} | found)
    return 0


def main() -> int:
    parser = harness.arguments(__doc__, "--dir", rounds=5)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the dense file")
    parser.add_argument("--warm-slots", action="store_true",
                        help="load the same file once before the clock starts")  # fmt: skip
    parser.add_argument("--profile", metavar="FOLDER", help="write a cProfile of each row there")
    return run(parser.parse_args())


if __name__ == "__main__":
    harness.script("device_overhead", main, child)
