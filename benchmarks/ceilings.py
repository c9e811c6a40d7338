"""What this machine can give at most, per path: reads, memory, and copies to a device.

    python benchmarks/ceilings.py [--file FILE] [--device cpu|cuda] [--rounds 5] [--json FILE]

Stands alone; needs no root. Reads take FILE, or a checkpoint written for the purpose and removed.
The first round tries every number of threads, depth or streams, the others the best of them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # Behind what is installed, and without this folder, whose files are no modules of others.
    sys.path[:] = [one for one in sys.path if one not in ("", str(Path(__file__).parent))]
    sys.path.append(str(ROOT))

from benchmarks.race import ceilings as measured  # noqa: E402
from fastst_patch.bench import guarded, hardware, settle, synthetic_checkpoint, write_json  # noqa: E402
from fastst_patch.bench.failures import UsageError  # noqa: E402
from fastst_patch.report_table import grid  # noqa: E402

_LEFT = {"ceiling", "best", "all tried"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", help="on the disk of interest; else one is written")
    parser.add_argument("--dir", help="where to write it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--json", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise UsageError("--rounds: at least 1")
    with contextlib.ExitStack() as stack:
        if args.file:
            path = Path(args.file).absolute()
            if not path.is_file():
                raise UsageError(f"{path}: no such file")
        else:
            path = stack.enter_context(synthetic_checkpoint(args.dir))
        environment = hardware.environment(path)
        caches = ("warm",) if hardware.filesystem(path).in_memory else ("cold", "warm")
        board = measured.board(args.device, caches, [str(path)])
        reserve = stack.enter_context(settle.reserve_for([str(path)]))
        for _ in range(args.rounds):
            for number, cache in enumerate(caches):
                for step in board.steps(cache, number == 0):
                    board.measure(step, reserve)
    entries = board.to_json(path.name)
    measured.require_some(entries)
    print(f"{environment['cpu']}, {environment['cpus']} CPUs; {environment['kernel']}; "
          f"{environment['fs']} on {environment['block_device']}, "
          f"read-ahead {environment['read_ahead_kb']} KiB\n")  # fmt: skip
    print("\n".join(grid([("ceiling", "GB/s", "best", "all tried"), *map(_cells, entries)], _LEFT)))
    if args.json:
        write_json(args.json, {"environment": environment, "ceilings": entries})
    return 0


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    if one["gb_per_s"] is None:
        return (one["name"], "-", "not available", str(one["unavailable"]))
    tried = ", ".join(f"{name}: {speed:.2f}" for name, speed in one["tried"].items())
    return (one["name"], f"{one['gb_per_s']:.2f}", one["variant"], tried)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args()
    return guarded("ceilings", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
