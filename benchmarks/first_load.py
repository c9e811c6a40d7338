"""A first load and the reload in a new process, split into what takes the time.

    python benchmarks/first_load.py FILE [--device cuda] [--rounds 1] [-o NAME=VALUE] [--json FILE]

For stock and patched: the page cache is emptied, a process loads; another one loads again, with
the cache as the first left it. Context (torch's) and engine (driver library, streams) come
before the load; pinning is within it, summed over the workers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _harness as harness

from fastst_patch.bench import checkpoint_files, hardware, stats, write_json
from fastst_patch.bench.failures import BenchError
from fastst_patch.bench.job import Sample
from fastst_patch.bench.runner import LOADERS

TURNS = ("first", "reload")
PARTS = ("context", "engine", "pinning")


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
    parser = harness.arguments(__doc__, "--device", "-o", rounds=1)
    parser.set_defaults(device="cuda")
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    file, options = checkpoint_files.describe(args.file.absolute()), dict(args.options)

    def run(loader: str) -> list[Sample]:
        harness.prepared("cold", [file.path])
        how = {"touch": False, "split": True}
        both = [harness.load(loader, [file], args.device, options, **how) for _ in TURNS]
        if both[0].digests != both[1].digests:
            raise BenchError(f"{file.name}: {loader} gave other tensors when it loaded again")
        return both

    measured = harness.race(LOADERS, args.rounds, run, lambda both: both[0].digests)
    rows = [row(loader, turn, [both[number] for both in some])
            for loader, some in measured.items() for number, turn in enumerate(TURNS)]  # fmt: skip
    print(f"{file.tensor_bytes / 1e9:.2f} GB in {len(file.order)} tensors to {args.device}")
    for one in rows:
        cached = one["cached_before"]
        print(f"{one['loader']:8} {one['turn']:7} "
              + " ".join(f"{name} {one[name + '_s']:.3f}" for name in (*PARTS, "load"))
              + f" s; {'?' if cached is None else f'{cached:.0%}'} cached before; "
              f"device {one['device_used'] / 1e6:.0f}, pinned {one['pinned'] / 1e6:.0f}, host RSS "
              f"peak {one['peak_rss'] / 1e6:.0f} MB; path {one['path']}")  # fmt: skip
    if args.json:
        write_json(args.json, {"environment": hardware.environment(file.path), "rows": rows,
                               "rounds": args.rounds, "options": options})  # fmt: skip
    return 0


if __name__ == "__main__":
    harness.script("first_load", main)
