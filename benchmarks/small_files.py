"""Time of opening tiny files: what a drop-in may not add to programs with many of them.

    python benchmarks/small_files.py [--rounds 7] [--calls 300] [--json FILE]

A file of three tensors and about 1 KB, warm; `load_file`, and `safe_open` plus `keys()`.
Each round starts one fresh process per loader, in alternating order; a process reports the
median of its calls.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import _harness as harness

from fastst_patch.bench import hardware, stats, write_json
from fastst_patch.bench.checkpoint import TensorSpec, write_checkpoint
from fastst_patch.bench.runner import LOADERS

SPECS = [TensorSpec(name, (8, 8)) for name in ("weight", "bias", "scale")]
CALLS = ("load_file", "safe_open + keys")


def child(job: dict[str, Any]) -> dict[str, float]:
    import safetensors
    import safetensors.torch

    if job["loader"] == "patched":
        import fastst_patch

        fastst_patch.patch()

    def open_and_list() -> None:
        with safetensors.safe_open(job["path"], framework="pt") as handle:
            handle.keys()

    calls = (lambda: safetensors.torch.load_file(job["path"]), open_and_list)
    return {
        name: harness.median_of_calls(call, job["calls"])
        for name, call in zip(CALLS, calls, strict=True)
    }


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--calls", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        write_checkpoint(path, SPECS, progress=lambda _: None)
        file_bytes, environment = path.stat().st_size, hardware.environment(path)

        def run(loader: str) -> dict[str, float]:
            job = {"loader": loader, "path": str(path), "calls": args.calls}
            return harness.fresh(__file__, job, f"{loader} loader")

        measured = harness.race(LOADERS, args.rounds, run)
    results = []
    print(f"{file_bytes} bytes, {len(SPECS)} tensors, warm; microseconds, ± {stats.SPREAD}")
    for call in CALLS:
        seconds = {loader: [one[call] for one in measured[loader]] for loader in LOADERS}
        stock, patched = (harness.shown(seconds[name], 1e6) for name in LOADERS)
        pair = seconds["patched"], seconds["stock"]
        print(f"{call:17} stock {stock}  patched {patched}  "
              f"patched/stock {harness.shown_ratio(*pair)}")  # fmt: skip
        results.append({"call": call, "seconds": seconds,
                        **harness.ratio(*pair, "ratio_to_stock")})  # fmt: skip
    if args.json:
        write_json(args.json, {"environment": environment, "file_bytes": file_bytes,
                               "results": results})  # fmt: skip
    return 0


if __name__ == "__main__":
    harness.script("small_files", main, child)
