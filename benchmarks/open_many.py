"""Time of opening many files by the explicit loader: headers only, names listed.

    python benchmarks/open_many.py [--files 40] [--tensors 500] [--rounds 7] [--json FILE]

Warm. Beside fastsafetensors where it can be imported (``PYTHONPATH`` may name its folder), and
plain safetensors: a handle and its ``keys()`` for each file. A process opens all files several
times and reports the first time, when everything is new to it, and the median of the later ones.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import _scenario as scenario

from fastst_patch.bench import hardware, harness
from fastst_patch.bench.checkpoint import TensorSpec

OURS, RIVAL, STOCK = "fastst_patch", "fastsafetensors", "safetensors"
LATER_CALLS = 5


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


def child(job: dict[str, Any], _gate: object) -> dict[str, float]:
    open_all = opener(job["loader"], job["paths"])

    def opened() -> None:
        names = open_all()
        assert names == job["names"], f"{names} names, not {job['names']}"

    first = scenario.timed(opened)
    return {"first": first, "later": scenario.median_of_calls(opened, LATER_CALLS)}


def main() -> int:
    parser = scenario.arguments(__doc__, "--dir")
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--tensors", type=int, default=500)
    args = parser.parse_args()
    loaders = [OURS, STOCK, *scenario.installed(RIVAL)]
    with scenario.folder(args.dir) as folder:
        paths = []
        for k in range(args.files):
            specs = [TensorSpec(f"model.layers.{k}.experts.{i}.w", (8, 8))
                     for i in range(args.tensors)]  # fmt: skip
            paths.append(scenario.write(folder / f"model-{k:05}.safetensors", specs))
        environment = hardware.environment(paths[0])

        def run(loader: str) -> Any:
            job = {"loader": loader, "paths": paths, "names": args.files * args.tensors}
            return scenario.fresh(__file__, job, f"{loader} loader")

        runs = harness.race(loaders, args.rounds, run)
    columns = []
    for kind in ("first", "later"):
        of = scenario.answer(kind)
        columns += [scenario.Column(f"{kind} ms", of, 1e3), scenario.ratio(of, OURS, 3, kind)]
    table = scenario.Table(columns)
    table.add(runs)
    title = f"{args.files} files of {args.tensors} tensors, warm, headers only"
    return scenario.report(args, title, table, environment=environment, files=args.files,
                           tensors=args.tensors)  # fmt: skip


if __name__ == "__main__":
    scenario.script("open_many", main, child)
