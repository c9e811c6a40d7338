"""Time of opening many files by the explicit loader: headers only, names listed.

    python benchmarks/open_many.py [--files 40] [--tensors 500] [--rounds 7] [--json FILE]

Warm. Beside fastsafetensors where it can be imported (``PYTHONPATH`` may name its folder), and
plain safetensors: a handle and its ``keys()`` for each file. Each round starts one fresh process
per loader, in alternating order; a process opens all files several times and reports the first
time, when everything is new to it, and the median of the later ones.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _harness as harness

from fastst_patch.bench import hardware, stats, write_json
from fastst_patch.bench.checkpoint import TensorSpec, pick_directory, write_checkpoint

OURS, RIVAL, STOCK = "fastst_patch", "fastsafetensors", "safetensors"
KINDS = ("first", "later")


def opener(loader: str, paths: list[str]) -> Callable[[], int]:
    """What is timed; its result is the number of names."""
    import torch  # noqa: F401 - every loader needs it, and its import is not timed

    if loader == STOCK:
        from safetensors import safe_open

        return lambda: sum(len(safe_open(path, "pt").keys()) for path in paths)
    package = importlib.import_module(loader)
    make, group = package.SafeTensorsFileLoader, package.SingleGroup  # ours are imported here

    def open_all() -> int:
        # Their nogds=True: the default looks for cuFile first.
        opened = make(group(), "cpu", nogds=True)
        opened.add_filenames({0: paths})
        found = len(opened.get_keys())
        opened.close()
        return found

    return open_all


def child(job: dict[str, Any]) -> dict[str, float]:
    open_all = opener(job["loader"], job["paths"])

    def opened() -> None:
        names = open_all()
        assert names == job["names"], f"{names} names, not {job['names']}"

    return {"first": harness.timed(opened), "later": harness.median_of_calls(opened, job["calls"])}


def main() -> int:
    parser = harness.arguments(__doc__, "--dir")
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--tensors", type=int, default=500)
    parser.add_argument("--calls", type=int, default=5)
    args = parser.parse_args()
    loaders = [OURS, STOCK]
    if importlib.util.find_spec(RIVAL) is not None:
        loaders.append(RIVAL)
    with tempfile.TemporaryDirectory(dir=pick_directory(args.dir)) as folder:
        paths = [str(Path(folder) / f"model-{k:05}.safetensors") for k in range(args.files)]
        for k, path in enumerate(paths):
            specs = [TensorSpec(f"model.layers.{k}.experts.{i}.w", (8, 8))
                     for i in range(args.tensors)]  # fmt: skip
            write_checkpoint(Path(path), specs, progress=lambda _: None)
        environment = hardware.environment(paths[0])

        def run(loader: str) -> dict[str, float]:
            job = {"loader": loader, "paths": paths, "names": args.files * args.tensors,
                   "calls": args.calls}  # fmt: skip
            return harness.fresh(__file__, job, f"{loader} loader")

        measured = harness.race(loaders, args.rounds, run)
    print(f"{args.files} files of {args.tensors} tensors, warm, headers only; "
          f"milliseconds, ± {stats.SPREAD}")  # fmt: skip
    results = []
    for kind in KINDS:
        seconds = {loader: [one[kind] for one in measured[loader]] for loader in loaders}
        for loader in loaders:
            pair = seconds[OURS], seconds[loader]
            print(f"{kind:6} {loader:16} {harness.shown(seconds[loader], 1e3)}   "
                  f"ours/{loader} {harness.shown_ratio(*pair, decimals=3)}")  # fmt: skip
            results.append({"kind": kind, "loader": loader, "seconds": seconds[loader],
                            **harness.ratio(*pair, "ratio_of_ours")})  # fmt: skip
    if RIVAL not in loaders:
        print(f"{RIVAL} cannot be imported here, and was not timed")
    if args.json:
        write_json(args.json, {"environment": environment, "files": args.files,
                               "tensors": args.tensors, "results": results})  # fmt: skip
    return 0


if __name__ == "__main__":
    harness.script("open_many", main, child)
