"""Time per tensor: a mixture-of-experts file of 18,867 small tensors, warm, load only.

    python benchmarks/many_tensors.py [--tensors N] [--rounds 7] [--device cuda] [-o NAME=VALUE]
                                      [--json FILE]

To the CPU nothing is read but the header: what is timed is parsing it and making the tensors.
To a device the bytes are copied too.
"""

from __future__ import annotations

import _harness as harness

from fastst_patch.bench import checkpoint_files, hardware, stats, write_json
from fastst_patch.bench.checkpoint import moe_specs, pick_directory, temporary_checkpoint
from fastst_patch.bench.job import Sample
from fastst_patch.bench.runner import LOADERS


def main() -> int:
    parser = harness.arguments(__doc__, "--device", "--dir", "-o")
    parser.add_argument("--tensors", type=int, default=18_867)
    args = parser.parse_args()
    options = dict(args.options)
    specs = moe_specs(args.tensors)
    with temporary_checkpoint(pick_directory(args.dir), specs) as path:
        environment, file = hardware.environment(path), checkpoint_files.describe(path)

        def run(loader: str) -> Sample:
            harness.prepared("warm", [file.path])
            return harness.load(loader, [file], args.device, options, touch=False)

        measured = harness.race(LOADERS, args.rounds, run, lambda one: one.digests)
    seconds = {loader: [one.load_s for one in measured[loader]] for loader in LOADERS}
    print(f"{args.tensors} tensors, {file.file_bytes / 1e6:.0f} MB, to {args.device}, warm, load "
          f"only; ± {stats.SPREAD}")  # fmt: skip
    for loader in LOADERS:
        each = harness.shown(seconds[loader], 1e6 / args.tensors, 2)
        print(f"{loader:8} {harness.shown(seconds[loader])} s   {each} µs a tensor   "
              f"path {measured[loader][0].path}")  # fmt: skip
    pair = seconds["patched"], seconds["stock"]
    print(f"patched/stock {harness.shown_ratio(*pair, decimals=3)}")
    if args.json:
        write_json(args.json, {"environment": environment, "tensors": args.tensors,
                               "device": args.device, "options": options,
                               "file_bytes": file.file_bytes, "seconds": seconds,
                               "path": measured["patched"][0].path,
                               **harness.ratio(*pair, "ratio_to_stock")})  # fmt: skip
    return 0


if __name__ == "__main__":
    harness.script("many_tensors", main)
