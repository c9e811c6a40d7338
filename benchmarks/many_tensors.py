"""Time per tensor: a mixture-of-experts file of 18,867 small tensors, warm, load only.

    python benchmarks/many_tensors.py [--tensors N] [--rounds 7] [--device cuda] [-o NAME=VALUE]
                                      [--json FILE]

To the CPU nothing is read but the header: what is timed is parsing it and making the tensors.
To a device the bytes are copied too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastst_patch.bench import files, guarded, machine, residency, stats, write_json
from fastst_patch.bench.checkpoint import moe_specs, pick_directory, temporary_checkpoint
from fastst_patch.bench.errors import BenchError
from fastst_patch.bench.job import LoadJob, Sample, run_load
from fastst_patch.bench.runner import LOADERS
from fastst_patch.bench.table import with_spread
from fastst_patch.cli import option


def measure(
    path: Path, rounds: int, device: str, options: dict[str, str]
) -> dict[str, list[Sample]]:
    file = files.describe(path)
    measured: dict[str, list[Sample]] = {loader: [] for loader in LOADERS}
    for number in range(rounds):
        for loader in LOADERS if number % 2 == 0 else LOADERS[::-1]:
            if residency.prepare("warm", [file.path]).verified is False:
                raise BenchError(f"{file.path}: does not stay in the page cache; too little memory")
            chosen = options if loader == "patched" else {}
            job = LoadJob(loader, device, (file.path,), (file.order,), chosen, touch=False)
            measured[loader].append(run_load(job))
    digests = {sample.digests for samples in measured.values() for sample in samples}
    if len(digests) != 1:
        raise BenchError(f"{file.path}: the loaders gave different tensors")
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=18_867)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    parser.add_argument("--dir", help="where to write the file")
    parser.add_argument("-o", "--option", type=option, action="append", default=[], dest="options")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    specs = moe_specs(args.tensors)
    with temporary_checkpoint(pick_directory(args.dir), specs) as path:
        environment = machine.environment(path)
        file_bytes = path.stat().st_size
        measured = measure(path, args.rounds, args.device, dict(args.options))
    seconds = {loader: [one.load_s for one in measured[loader]] for loader in LOADERS}
    ratio = stats.paired_ratio(seconds["patched"], seconds["stock"])
    print(f"{args.tensors} tensors, {file_bytes / 1e6:.0f} MB, to {args.device}, warm, load only; "
          f"± {stats.SPREAD}")  # fmt: skip
    for loader in LOADERS:
        summary = stats.summarize(seconds[loader])
        each = stats.summarize([1e6 * one / args.tensors for one in seconds[loader]])
        print(f"{loader:8} {with_spread(summary)} s   {with_spread(each, 2)} µs a tensor   "
              f"path {measured[loader][0].path}")  # fmt: skip
    print(f"patched/stock {with_spread(ratio, 3)}")
    if args.json:
        write_json(args.json, {"environment": environment, "tensors": args.tensors,
                               "device": args.device, "options": dict(args.options),
                               "file_bytes": file_bytes, "seconds": seconds,
                               "path": measured["patched"][0].path,
                               "ratio_to_stock": ratio.median,
                               "ratio_to_stock_spread": ratio.spread})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(guarded("many_tensors", main))
