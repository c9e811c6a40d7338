"""A first load and the reload in a new process, split into what takes the time.

    python benchmarks/first_load.py FILE [--device cuda] [--rounds 1] [-o NAME=VALUE] [--json FILE]

For stock and patched: the page cache is emptied, a process loads; another one loads again, with
the cache as the first left it. Context (torch's) and engine (driver library, streams) come
before the load; pinning is within it, summed over the workers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastst_patch.bench import files, guarded, machine, residency, stats, write_json
from fastst_patch.bench.errors import BenchError
from fastst_patch.bench.job import LoadJob, Sample, run_load
from fastst_patch.bench.runner import LOADERS
from fastst_patch.cli import option

TURNS = ("first", "reload")
PARTS = ("context", "engine", "pinning")


def measure(
    file: files.CheckpointFile, device: str, rounds: int, options: dict[str, str]
) -> dict[tuple[str, str], list[Sample]]:
    found: dict[tuple[str, str], list[Sample]] = {}
    for number in range(rounds):
        for loader in LOADERS if number % 2 == 0 else LOADERS[::-1]:
            if residency.prepare("cold", [file.path]).verified is False:
                raise BenchError(f"{file.name}: does not leave the page cache")
            job = LoadJob(
                loader, device, (file.path,), (file.order,),
                options if loader == "patched" else {}, touch=False, split=True,
            )  # fmt: skip
            for turn in TURNS:
                found.setdefault((loader, turn), []).append(run_load(job))
    if len({sample.digests for samples in found.values() for sample in samples}) != 1:
        raise BenchError(f"{file.name}: the loaders gave different tensors")
    return found


def row(loader: str, turn: str, samples: list[Sample]) -> dict[str, Any]:
    last = samples[-1]
    parts = {
        name: stats.summarize([one.parts.get(name, 0.0) for one in samples]).median
        for name in PARTS
    }
    used = last.memory.get("device_used", 0) - last.memory_before.get("device_used", 0)
    return {
        "loader": loader,
        "turn": turn,
        **{f"{name}_s": seconds for name, seconds in parts.items()},
        "load_s": stats.summarize([one.load_s for one in samples]).median,
        "cached_before": last.resident_before,
        "device_used": used,
        "pinned": last.memory.get("pinned", 0),
        "peak_rss": last.memory.get("peak_rss", 0),
        "rss": last.memory.get("rss", 0),
        "path": last.path,
        "fallbacks": list(last.fallbacks),
        "bytes": last.bytes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda", help="cuda[:N], or cpu")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("-o", "--option", type=option, action="append", default=[], dest="options")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    file = files.describe(args.file.absolute())
    measured = measure(file, args.device, args.rounds, dict(args.options))
    rows = [row(*key, samples) for key, samples in measured.items()]
    print(f"{file.tensor_bytes / 1e9:.2f} GB in {len(file.order)} tensors to {args.device}")
    for one in rows:
        cached = one["cached_before"]
        print(f"{one['loader']:8} {one['turn']:7} "
              + " ".join(f"{name} {one[name + '_s']:.3f}" for name in (*PARTS, "load"))
              + f" s; {'?' if cached is None else f'{cached:.0%}'} cached before; "
              f"device {one['device_used'] / 1e6:.0f}, pinned {one['pinned'] / 1e6:.0f}, host RSS "
              f"peak {one['peak_rss'] / 1e6:.0f} MB; path {one['path']}")  # fmt: skip
    if args.json:
        write_json(args.json, {"environment": machine.environment(file.path), "rows": rows,
                               "rounds": args.rounds, "options": dict(args.options)})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(guarded("first_load", main))
