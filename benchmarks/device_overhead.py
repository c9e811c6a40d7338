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
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _scenario as scenario

from fastst_patch import engine
from fastst_patch.bench import checkpoint_files, hardware, harness, residency
from fastst_patch.bench.checkpoint import (
    TensorSpec,
    moe_specs,
    pick_directory,
    temporary_checkpoint,
    transformer_specs,
    write_checkpoint,
)
from fastst_patch.bench.failures import BenchError

TENSORS = 18_867

MODES = ("dlpack", "owned")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    file: str  # key of the files
    tensors: str
    threads: int  # 0: as the package chooses
    remote: bool = False  # whether nginx serves the file


def cases() -> list[Case]:
    tiny = [Case(f"{file}, {mode}", file, mode, 0) for file in ("200 B", "256 B") for mode in MODES]
    threads = {"1 thread": 1, "default threads": 0}
    big = [Case(f"dense, {how}, {mode}", "dense", mode, count)
           for how, count in threads.items() for mode in MODES]  # fmt: skip
    return [*tiny, *big, Case("dense over HTTP, dlpack", "dense", "dlpack", 0, remote=True)]


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


def child(message: dict[str, Any], _gate: object) -> dict[str, Any]:
    """Time one load, in a process that has loaded a small file before."""
    import torch

    import fastst_patch
    from fastst_patch import device

    fake_device = scenario.from_tests("fake_device")
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
            "violations": driver.violations(),
            "bytes": message["bytes"],
            "count": message["count"],
        }
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


def measure(
    args: argparse.Namespace,
    library: Path,
    made: dict[str, checkpoint_files.CheckpointFile],
    address: str | None,
) -> dict[str, list[Any]]:
    by_name = {case.name: case for case in cases() if address or not case.remote}

    def run_case(name: str) -> Any:
        case = by_name[name]
        file = made[case.file]
        if residency.prepare("warm", [file.path]).verified is False:
            raise BenchError(f"{file.path}: does not stay in the page cache")
        message = {
            "library": str(library),
            "small": made["small"].path,
            "path": f"{address}/{Path(file.path).name}" if case.remote else file.path,
            "count": len(file.order),
            "bytes": file.tensor_bytes,
            "tensors": case.tensors,
            "threads": case.threads,
        }
        answer = scenario.fresh(__file__, message, name)
        if answer.violations:
            raise BenchError(f"{name}: the fake driver objects: {answer.violations[0]}")
        return answer

    return harness.race([*by_name], args.rounds, run_case)


def served(folder: Path, own: Path) -> contextlib.AbstractContextManager[str | None]:
    """The address of nginx over a folder; None where nginx is missing."""
    servers = scenario.from_tests("servers")
    if servers.nginx_binary() is None:
        print("nginx is missing: the row over HTTP is left out", file=sys.stderr)
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[str] = servers.nginx(folder, own)
    return found


def microseconds_a_tensor(one: Any) -> float:
    """Without the stand-in for torch's allocator."""
    return float(1e6 * (one.seconds - one.allocator_seconds) / one.count)


def table() -> scenario.Table:
    return scenario.Table([
        scenario.Column("ms", scenario.answer("seconds"), 1e3),
        scenario.Column("CPU ms", scenario.answer("cpu_seconds"), 1e3),
        scenario.Column("µs a tensor", microseconds_a_tensor),
        scenario.Column("of the allocator", lambda one: 1e6 * one.allocator_seconds / one.count),
        scenario.Column("GB/s", lambda one: one.bytes / one.seconds / 1e9),
        scenario.Column("GB/s a core", lambda one: one.bytes / one.cpu_seconds / 1e9),
        scenario.Column("copies", scenario.answer("copies"), 1, 0),
        scenario.Column("calls", scenario.answer("calls"), 1, 0),
    ])  # fmt: skip


def main() -> int:
    parser = scenario.arguments(__doc__, "--dir", rounds=5)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the dense file")
    args = parser.parse_args()
    place = pick_directory(args.dir)
    with tempfile.TemporaryDirectory() as folder, written(place, int(args.gb * 1e9)) as made:
        library = scenario.from_tests("fake_device").build(Path(folder))
        if library is None:
            raise BenchError("needs a C compiler, to build the fake device driver")
        environment, dense = hardware.environment(made["dense"].path), made["dense"]
        with served(Path(dense.path).parent, Path(folder)) as address:
            runs = measure(args, library, made, address)
    shown = table()
    shown.add(runs)
    title = (f"{TENSORS} tensors of 200 and of 256 bytes, and {dense.tensor_bytes / 1e9:.2f} GB in "
             f"{len(dense.order)}; warm, over the fake driver with free copies")  # fmt: skip
    return scenario.report(args, title, shown, environment=environment)


if __name__ == "__main__":
    scenario.script("device_overhead", main, child)
