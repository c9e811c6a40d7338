"""Time of opening tiny files: what a drop-in may not add to programs with many of them.

    python benchmarks/small_files.py [--rounds 7] [--calls 300] [--json FILE]

A file of three tensors and about 1 KB, warm; `load_file`, and `safe_open` plus `keys()`.
Each round starts one fresh process per loader, in alternating order; a process reports the
median of its calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fastst_patch.bench import guarded, machine, stats, write_json
from fastst_patch.bench.checkpoint import TensorSpec, write_checkpoint
from fastst_patch.bench.job import run_json
from fastst_patch.bench.runner import LOADERS
from fastst_patch.bench.table import with_spread

SPECS = [TensorSpec(name, (8, 8)) for name in ("weight", "bias", "scale")]
CALLS = ("load_file", "safe_open + keys")


def child() -> None:
    job = json.load(sys.stdin)
    import safetensors
    import safetensors.torch

    if job["loader"] == "patched":
        import fastst_patch

        fastst_patch.patch()

    def open_and_list() -> None:
        with safetensors.safe_open(job["path"], framework="pt") as handle:
            handle.keys()

    calls: dict[str, Callable[[], object]] = {
        CALLS[0]: lambda: safetensors.torch.load_file(job["path"]),
        CALLS[1]: open_and_list,
    }
    print(json.dumps({name: median_s(call, job["calls"]) for name, call in calls.items()}))


def median_s(call: Callable[[], object], count: int) -> float:
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def measure(path: Path, rounds: int, calls: int) -> dict[str, list[dict[str, float]]]:
    me = str(Path(__file__).absolute())
    measured: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
    for number in range(rounds):
        for loader in LOADERS if number % 2 == 0 else LOADERS[::-1]:
            job = {"loader": loader, "path": str(path), "calls": calls}
            measured[loader].append(run_json([me, "--child"], job, f"{loader} loader"))
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        write_checkpoint(path, SPECS, progress=lambda _: None)
        file_bytes = path.stat().st_size
        environment = machine.environment(path)
        measured = measure(path, args.rounds, args.calls)
    results = []
    print(f"{file_bytes} bytes, {len(SPECS)} tensors, warm; microseconds, ± {stats.SPREAD}")
    for call in CALLS:
        seconds = {loader: [one[call] for one in measured[loader]] for loader in LOADERS}
        stock, patched = (stats.summarize([1e6 * s for s in seconds[name]]) for name in LOADERS)
        ratio = stats.paired_ratio(seconds["patched"], seconds["stock"])
        print(f"{call:17} stock {with_spread(stock)}  patched {with_spread(patched)}  "
              f"patched/stock {with_spread(ratio, 2)}")  # fmt: skip
        results.append({"call": call, "seconds": seconds, "ratio_to_stock": ratio.median,
                        "ratio_to_stock_spread": ratio.spread})  # fmt: skip
    if args.json:
        write_json(args.json, {"environment": environment, "file_bytes": file_bytes,
                               "results": results})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(guarded("small_files", main))
