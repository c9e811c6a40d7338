"""`fastst-patch bench` under two read-ahead settings of the disk, default and O_DIRECT.

    sudo python benchmarks/readahead.py [PATH] [--kb 128 8192] [--repeat 5] --json FILE

Cold loads by mmap depend on the read-ahead more than on the disk: 128 KiB is the kernel's
default, some distributions and clouds set megabytes. Writes the setting, which needs root,
and restores it whatever happens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import _scenario as scenario

from fastst_patch.bench import guarded, synthetic_checkpoint, write_json
from fastst_patch.bench.failures import EXIT_INTERRUPTED
from fastst_patch.cli.main import main as run_command

MODES = ("auto", "direct")


def bench(path: Path, mode: str, repeat: int, max_seconds: float) -> tuple[int, dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        status = run_command([
            "bench", str(path), "--cache", "cold", "--io", mode, "--json", str(report),
            "--repeat", str(repeat), "--max-seconds", str(max_seconds),
        ])  # fmt: skip
        if status == EXIT_INTERRUPTED:  # the bench has said so; nor is there a next one
            raise KeyboardInterrupt
        return status, json.loads(report.read_text()) if report.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", metavar="PATH", help="a file; else a synthetic one")
    parser.add_argument("--kb", type=int, nargs="+", default=[128, 8192], help="settings to try")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--max-seconds", type=float, default=240.0, help="for each of the runs")
    parser.add_argument("--dir", help="where to write the synthetic checkpoint")
    parser.add_argument("--json", metavar="FILE", required=True)
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        path = Path(args.path) if args.path else stack.enter_context(synthetic_checkpoint(args.dir))
        for kb in args.kb:
            with scenario.read_ahead(path, kb):
                for mode in MODES:
                    print(f"\n=== read-ahead {kb} KiB, io={mode}", flush=True)
                    status, report = bench(path, mode, args.repeat, args.max_seconds)
                    runs.append({"read_ahead_kb": kb, "io": mode, "exit": status, **report})
    write_json(args.json, {"runs": runs})
    return max(int(run["exit"]) for run in runs)


if __name__ == "__main__":
    sys.exit(guarded("readahead", main))
