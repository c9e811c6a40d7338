"""Time per tensor: a mixture-of-experts file of 18,867 small tensors, warm, load only.

    python benchmarks/many_tensors.py [--tensors N] [--rounds 7] [--device cuda] [-o NAME=VALUE]
                                      [--json FILE]

To the CPU nothing is read but the header: what is timed is parsing it and making the tensors.
To a device the bytes are copied too.
"""

from __future__ import annotations

import _scenario as scenario

from fastst_patch.bench import checkpoint_files, hardware, harness
from fastst_patch.bench.checkpoint import moe_specs, pick_directory, temporary_checkpoint
from fastst_patch.bench.job import Sample
from fastst_patch.bench.runner import LOADERS


def main() -> int:
    parser = scenario.arguments(__doc__, "--device", "--dir", "-o")
    parser.add_argument("--tensors", type=int, default=18_867)
    args = parser.parse_args()
    specs = moe_specs(args.tensors)
    with temporary_checkpoint(pick_directory(args.dir), specs) as path:
        environment, file = hardware.environment(path), checkpoint_files.describe(path)

        def run(loader: str) -> Sample:
            return scenario.in_cache("warm", [file.path], lambda gate: scenario.load(
                loader, [file], args.device, dict(args.options), gate, touch=False))  # fmt: skip

        runs = harness.race(LOADERS, args.rounds, run, lambda one: one.digests)
    seconds = scenario.answer("load_s")
    table = scenario.Table(
        [scenario.Column("s", seconds), scenario.Column("µs a tensor", seconds, 1e6 / args.tensors),
         scenario.ratio(seconds, "stock", 3)],
        text={"path": lambda samples: samples[0].path},
    )  # fmt: skip
    table.add(runs)
    title = (f"{args.tensors} tensors, {file.file_bytes / 1e6:.0f} MB, to {args.device}, warm, "
             "load only")  # fmt: skip
    return scenario.report(args, title, table, environment=environment, tensors=args.tensors,
                           device=args.device, file_bytes=file.file_bytes)  # fmt: skip


if __name__ == "__main__":
    scenario.script("many_tensors", main)
