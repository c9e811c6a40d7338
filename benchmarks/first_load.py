"""A first load and the reload in a new process, split into what takes the time.

    python benchmarks/first_load.py FILE [--device cuda] [--rounds 1] [-o NAME=VALUE] [--json FILE]

For stock and patched: the page cache is emptied, a process loads; another one loads again, with
the cache as the first left it. Context (torch's) and engine (driver library, streams) come
before the load; pinning is within it, summed over the workers.
"""

from __future__ import annotations

from pathlib import Path

import _scenario as scenario

from fastst_patch.bench import checkpoint_files, hardware, harness
from fastst_patch.bench.failures import BenchError
from fastst_patch.bench.job import Sample
from fastst_patch.bench.runner import LOADERS

TURNS = ("first", "reload")


def columns() -> list[scenario.Column]:
    parts = [scenario.Column(f"{name} s", lambda one, name=name: one.parts.get(name, 0.0), 1, 3)
             for name in ("context", "engine", "pinning")]  # fmt: skip
    return [
        *parts,
        scenario.Column("load s", scenario.answer("load_s")),
        scenario.Column("cached %", lambda one: 100 * (one.resident_before or 0.0), 1, 0),
        scenario.Column("device MB", lambda one: one.memory.get("device_used", 0)
                        - one.memory_before.get("device_used", 0), 1e-6, 0),
        scenario.Column("pinned MB", lambda one: one.memory.get("pinned", 0), 1e-6, 0),
        scenario.Column("RSS peak MB", lambda one: one.memory.get("peak_rss", 0), 1e-6, 0),
    ]  # fmt: skip


def main() -> int:
    parser = scenario.arguments(__doc__, "--device", "-o", rounds=1)
    parser.set_defaults(device="cuda")
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    file, options = checkpoint_files.describe(args.file.absolute()), dict(args.options)

    def run(loader: str) -> list[Sample]:
        how = {"touch": False, "split": True}
        first = scenario.in_cache("cold", [file.path], lambda gate: scenario.load(
            loader, [file], args.device, options, gate, **how))  # fmt: skip
        reload = scenario.load(loader, [file], args.device, options, **how)
        if first.digests != reload.digests:
            raise BenchError(f"{file.name}: {loader} gave other tensors when it loaded again")
        return [first, reload]

    raced = harness.race(LOADERS, args.rounds, run, lambda both: both[0].digests)
    table = scenario.Table(columns(), facts=["turn"],
                           text={"path": lambda samples: samples[-1].path})  # fmt: skip
    for number, turn in enumerate(TURNS):
        table.add({loader: [both[number] for both in some] for loader, some in raced.items()},
                  turn=turn)  # fmt: skip
    title = f"{file.tensor_bytes / 1e9:.2f} GB in {len(file.order)} tensors to {args.device}"
    return scenario.report(args, title, table, environment=hardware.environment(file.path))


if __name__ == "__main__":
    scenario.script("first_load", main)
