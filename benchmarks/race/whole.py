"""End-to-end rows: `benchmarks/end_to_end.py` in a process of its own, and its JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import process
from .entrants import scrub

SCRIPT = process.ROOT / "benchmarks" / "end_to_end.py"

ROWS = {
    "cpu": ("cpu-cold", "diffusers-cold", "cpu-warm", "diffusers-warm", "moe-cpu",
            "sentence-transformers"),
    "cuda": ("cuda-device-map", "cuda-to", "cuda-moe", "cuda-pipeline"),
}  # fmt: skip
QUICK_ROWS = {"cpu": ROWS["cpu"][:2], "cuda": ROWS["cuda"][:1]}
QUICK_GB = {"cpu": 0.5, "cuda": 1.7}
RESERVED_S = {
    ("quick", "cpu"): 180.0,
    ("quick", "cuda"): 100.0,
    ("full", "cpu"): 1800.0,
    ("full", "cuda"): 1800.0,
}


def measure(
    device: str, suite: str, place: Path, rounds: int, seconds: float | None
) -> dict[str, Any]:
    """Run the rows of a device; what went wrong is in the answer, under "errors"."""
    quick = suite == "quick"
    rows = (QUICK_ROWS if quick else ROWS)[device]
    report = place / f"end-to-end-{os.getpid()}.json"
    command = [sys.executable, str(SCRIPT), "--rows", ",".join(rows), "--repeat", str(rounds),
               "--offers", "--dir", str(place), "--json", str(report)]  # fmt: skip
    if quick:
        command += ["--gb", str(QUICK_GB[device])]
    if seconds is not None:
        command += ["--max-seconds", f"{seconds / len(rows):.0f}"]
    try:
        # Its bar goes to the terminal; its table is printed with the others, from the JSON.
        variables = process.environment_variables()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, env=variables, cwd=place,
                              check=False)  # fmt: skip
        if not report.exists():
            return _nothing(f"end_to_end.py ended with exit status {done.returncode}")
        found = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return _nothing(f"end_to_end.py: {error}")
    finally:
        report.unlink(missing_ok=True)
    found["errors"] = {name: scrub(text) for name, text in found["errors"].items()}
    return dict(found)


def _nothing(why: str) -> dict[str, Any]:
    return {"results": [], "skipped": {}, "errors": {"all rows": scrub(why)}}
