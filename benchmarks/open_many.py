"""Time of opening many files by the explicit loader: headers only, names listed.

    python benchmarks/open_many.py [--files 40] [--tensors 500] [--rounds 7] [--json FILE]

Warm. Beside fastsafetensors where it can be imported (``PYTHONPATH`` may name its folder), and
plain safetensors: a handle and its ``keys()`` for each file. Each round starts one fresh process
per loader, in alternating order; a process opens all files several times and reports the first
time, when everything is new to it, and the median of the later ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastst_patch.bench import guarded, machine, stats, write_json
from fastst_patch.bench.checkpoint import TensorSpec, pick_directory, write_checkpoint
from fastst_patch.bench.job import run_json
from fastst_patch.bench.table import with_spread

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


def child() -> None:
    job = json.load(sys.stdin)
    open_all = opener(job["loader"], job["paths"])
    seconds = []
    for _ in range(1 + job["calls"]):
        begin = time.perf_counter()
        names = open_all()
        seconds.append(time.perf_counter() - begin)
        assert names == job["names"], f"{names} names, not {job['names']}"
    print(json.dumps({"first": seconds[0], "later": statistics.median(seconds[1:])}))


def measure(
    paths: list[str], names: int, loaders: Sequence[str], rounds: int, calls: int
) -> dict[str, list[dict[str, float]]]:
    me = str(Path(__file__).absolute())
    measured: dict[str, list[dict[str, float]]] = {loader: [] for loader in loaders}
    for number in range(rounds):
        for loader in loaders if number % 2 == 0 else loaders[::-1]:
            job = {"loader": loader, "paths": paths, "names": names, "calls": calls}
            measured[loader].append(run_json([me, "--child"], job, f"{loader} loader"))
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--tensors", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--dir", help="where to write the files")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child()
        return 0
    loaders = [OURS, STOCK]
    if importlib.util.find_spec(RIVAL) is not None:
        loaders.append(RIVAL)
    with tempfile.TemporaryDirectory(dir=pick_directory(args.dir)) as folder:
        paths = [str(Path(folder) / f"model-{k:05}.safetensors") for k in range(args.files)]
        for k, path in enumerate(paths):
            specs = [TensorSpec(f"model.layers.{k}.experts.{i}.w", (8, 8))
                     for i in range(args.tensors)]  # fmt: skip
            write_checkpoint(Path(path), specs, progress=lambda _: None)
        environment = machine.environment(paths[0])
        measured = measure(paths, args.files * args.tensors, loaders, args.rounds, args.calls)
    print(f"{args.files} files of {args.tensors} tensors, warm, headers only; "
          f"milliseconds, ± {stats.SPREAD}")  # fmt: skip
    results = []
    for kind in KINDS:
        seconds = {loader: [one[kind] for one in measured[loader]] for loader in loaders}
        for loader in loaders:
            summary = stats.summarize([1e3 * s for s in seconds[loader]])
            ratio = stats.paired_ratio(seconds[OURS], seconds[loader])
            print(f"{kind:6} {loader:16} {with_spread(summary)}   "
                  f"ours/{loader} {with_spread(ratio, 3)}")  # fmt: skip
            results.append({"kind": kind, "loader": loader, "seconds": seconds[loader],
                            "ratio_of_ours": ratio.median,
                            "ratio_of_ours_spread": ratio.spread})  # fmt: skip
    if RIVAL not in loaders:
        print(f"{RIVAL} cannot be imported here, and was not timed")
    if args.json:
        write_json(args.json, {"environment": environment, "files": args.files,
                               "tensors": args.tensors, "results": results})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(guarded("open_many", main))
