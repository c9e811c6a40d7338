"""Writes a checkpoint to measure with: a dense model, or very many tensors of 32 KiB.

    python benchmarks/write_checkpoint.py FILE [--gb 5 | --many 18867]

--gb auto takes 16 GB, or a quarter of the free memory or disk if that is less.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from fastst_patch.bench import guarded, hardware
from fastst_patch.bench.checkpoint import moe_specs, transformer_specs, write_checkpoint
from fastst_patch.bench.failures import BenchError

LARGEST_GB = 16.0


def size(wanted: str, folder: Path) -> int:
    fair = min(hardware.memory_available(), shutil.disk_usage(folder).free) // 4
    return min(int((LARGEST_GB if wanted == "auto" else float(wanted)) * 1e9), fair)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--gb", default="auto", help="size of a dense model, at most")
    parser.add_argument("--many", type=int, metavar="N", help="tensors, each 128 x 128 of bf16")
    args = parser.parse_args()
    folder = args.file.absolute().parent
    specs = moe_specs(args.many) if args.many else transformer_specs(size(args.gb, folder))
    try:
        args.file.unlink(missing_ok=True)
        write_checkpoint(args.file, specs, lambda _: None)
    except OSError as error:
        raise BenchError(f"{args.file}: {error.strerror}") from error
    total = sum(spec.nbytes for spec in specs)
    print(f"{args.file.name}: {total / 1e9:.2f} GB in {len(specs)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(guarded("write_checkpoint", main))
