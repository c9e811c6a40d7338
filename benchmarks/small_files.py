"""Time of opening tiny files: what a drop-in may not add to programs with many of them.

    python benchmarks/small_files.py [--rounds 7] [--calls 300] [--json FILE]

A file of three tensors and about 1 KB, warm; `load_file`, and `safe_open` plus `keys()`. A process
reports the median of its calls.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import _scenario as scenario

from fastst_patch.bench import hardware, harness
from fastst_patch.bench.checkpoint import TensorSpec
from fastst_patch.bench.runner import LOADERS

SPECS = [TensorSpec(name, (8, 8)) for name in ("weight", "bias", "scale")]


def child(job: dict[str, Any], _gate: object) -> dict[str, float]:
    import safetensors
    import safetensors.torch

    if job["loader"] == "patched":
        import fastst_patch

        fastst_patch.patch()

    def open_and_list() -> None:
        with safetensors.safe_open(job["path"], framework="pt") as handle:
            handle.keys()

    calls = {"load_file": lambda: safetensors.torch.load_file(job["path"]),
             "safe_open + keys": open_and_list}  # fmt: skip
    return {name: scenario.median_of_calls(call, job["calls"]) for name, call in calls.items()}


def main() -> int:
    parser = scenario.arguments(__doc__)
    parser.add_argument("--calls", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = scenario.write(Path(folder) / "small.safetensors", SPECS)
        file_bytes, environment = Path(path).stat().st_size, hardware.environment(path)

        def run(loader: str) -> Any:
            job = {"loader": loader, "path": path, "calls": args.calls}
            return scenario.fresh(__file__, job, f"{loader} loader")

        runs = harness.race(LOADERS, args.rounds, run)
    columns = []
    for call in ("load_file", "safe_open + keys"):
        of = scenario.answer(call)
        columns += [scenario.Column(f"{call} µs", of, 1e6), scenario.ratio(of, "stock", name=call)]
    table = scenario.Table(columns)
    table.add(runs)
    title = f"{file_bytes} bytes, {len(SPECS)} tensors, warm"
    return scenario.report(args, title, table, environment=environment, file_bytes=file_bytes)


if __name__ == "__main__":
    scenario.script("small_files", main, child)
