"""Memory of a cold load plus reading every byte: stock, patched, patched with O_DIRECT.

    python benchmarks/peak_memory.py [PATH ...] [--rounds 3] [--json FILE]

Fresh processes; without PATH a synthetic checkpoint is used. File-mapped memory can be
dropped by the kernel and is shared between processes; anonymous memory cannot and is not.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import _harness as harness

from fastst_patch.bench import (
    checkpoint_files,
    hardware,
    residency,
    synthetic_checkpoint,
    write_json,
)
from fastst_patch.bench.job import Sample

CONTENDERS: dict[str, dict[str, object]] = {  # options for patch()
    "stock": {},
    "patched": {},
    "patched, io=direct": {"io": "direct"},
}
COLUMNS = {  # key in Sample.memory: heading
    "peak_rss": "peak RSS",
    "rss": "RSS",
    "pss": "PSS",
    "pss_anonymous": "anonymous",
    "pss_file": "file-mapped",
}


def medians(samples: Sequence[Sample]) -> dict[str, float]:
    """Of each kind of memory: what the load added to a process that had imported torch."""
    return {
        key: statistics.median(one.memory[key] - one.memory_before[key] for one in samples)
        for key in COLUMNS
    }


def main() -> int:
    parser = harness.arguments(__doc__, "--dir", rounds=3)
    parser.add_argument("paths", nargs="*", metavar="PATH")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        paths: list[str] = args.paths
        if not paths:
            paths = [str(stack.enter_context(synthetic_checkpoint(args.dir)))]
        measured_files = checkpoint_files.expand(paths)
        environment = hardware.environment(Path(measured_files[0].path))

        def run(name: str) -> Sample:
            state = residency.prepare("cold", [file.path for file in measured_files])
            if state.verified is False:
                print(f"{name}: the files were {state.fraction:.0%} cached", file=sys.stderr)
            return harness.load(name, measured_files, options=CONTENDERS[name])

        measured = harness.race([*CONTENDERS], args.rounds, run, lambda one: one.digests)
    total = sum(file.tensor_bytes for file in measured_files)
    added = {name: medians(samples) for name, samples in measured.items()}
    taken = {name: samples[0].path for name, samples in measured.items()}
    print(f"{total / 1e9:.2f} GB of tensors; GB added by loading and reading them, medians of "
          f"{args.rounds} rounds")  # fmt: skip
    print(f"{'loader':20}" + "".join(f"{heading:>13}" for heading in COLUMNS.values()) + "  path")
    for name, row in added.items():
        print(f"{name:20}{''.join(f'{row[key] / 1e9:13.2f}' for key in COLUMNS)}  {taken[name]}")
    if args.json:
        results = {name: {**added[name], "path": taken[name]} for name in added}
        write_json(args.json, {"environment": environment, "bytes": total, "results": results})
    return 0


if __name__ == "__main__":
    harness.script("peak_memory", main)
