"""A file of F32 loaded for NumPy, JAX, TensorFlow or Paddle; against stock.

    python benchmarks/frameworks.py [--framework np,jax,tf,paddle] [--cache warm,cold] [--kb KIB …]
                                    [--file dense,many,tiny] [--how all,each] [--gb 1.7]
                                    [--rounds 5] [--json FILE]

A fresh process imports the library, then opens the file, takes all tensors by `get_tensors()`, as
`load_file` does, or each by `get_tensor`, and reads every byte of them. `many` are 18,867 tensors,
of which only the load is timed; `tiny` are three in 1 KB, of which a process reports the median of
300 loads. Every tensor's bytes are compared with those of the first run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from itertools import product
from pathlib import Path
from typing import Any

import _scenario as scenario

from fastst_patch.bench import hardware, harness, settle
from fastst_patch.bench.checkpoint import TensorSpec, moe_specs, transformer_specs
from fastst_patch.bench.runner import LOADERS

LIBRARIES = {"np": "numpy", "jax": "jax", "tf": "tensorflow", "paddle": "paddle"}
CALLS = 300


def child(job: dict[str, Any], gate: Any) -> dict[str, Any]:
    import numpy as np
    import safetensors

    from fastst_patch import engine
    from fastst_patch.bench.child import clock, patch_with, require_stock

    if job["loader"] == "patched":
        patch_with({})
    else:
        require_stock()
    framework, file = job["framework"], job["file"]
    library = importlib.import_module(LIBRARIES[framework])
    if framework == "jax":
        library.numpy.array(np.ones(4)).block_until_ready()
    elif framework == "tf":
        library.convert_to_tensor(np.ones(4))

    def load() -> Any:
        with safetensors.safe_open(job["path"], framework) as handle:
            if job["how"] == "each":
                return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return handle.get_tensors()

    def touched(tensor: Any) -> int:
        if framework == "paddle":
            return engine.touch(tensor.data_ptr(), tensor.size * tensor.element_size())
        array = np.asarray(tensor)
        return engine.touch(array.__array_interface__["data"][0], array.nbytes)

    with clock(job["loader"], [job["path"]], "cpu", gate) as timed:
        if file == "tiny":
            seconds = scenario.median_of_calls(load, CALLS)
        found = load()
        if framework == "jax":
            library.block_until_ready(list(found.values()))
        timed.lap("load")
        sums = {name: touched(one) for name, one in found.items()}
        timed.lap("touch")
    if file == "dense":
        seconds = timed.seconds["load"] + timed.seconds["touch"]
    elif file == "many":
        seconds = timed.seconds["load"]
    return {
        "seconds": seconds,
        "resident_before": timed.resident,
        "path": ", ".join(dict.fromkeys(one.path for one in timed.reports)) or "stock",
        "sums": sums,
    }


def written(folder: Path, file: str, gb: float) -> str:
    if file == "tiny":
        specs = [TensorSpec(name, (8, 8)) for name in ("weight", "bias", "scale")]
    else:
        specs = moe_specs(18_867) if file == "many" else transformer_specs(int(gb * 5e8))
    wide = [dataclasses.replace(spec, dtype="F32") for spec in specs]
    return scenario.write(folder / f"{file}.safetensors", wide)


def measure(job: dict[str, Any], cache: str, rounds: int, lender: Any) -> Any:
    def run(loader: str) -> Any:
        message = {**job, "loader": loader}
        return scenario.in_cache(
            cache, [job["path"]],
            lambda gate: scenario.fresh(__file__, message, f"{loader} load", gate), lender,
        )  # fmt: skip

    return harness.race(LOADERS, rounds, run, lambda one: one.sums)


def main() -> int:
    made = scenario.arguments(__doc__, "--dir", rounds=5)
    listed = {"framework": "np", "cache": "warm", "file": "dense", "how": "all"}
    for name, default in listed.items():
        made.add_argument(f"--{name}", type=lambda text: text.split(","), default=[default])
    made.add_argument("--kb", type=int, nargs="+", default=[0], help="read-ahead; 0: as it is")
    made.add_argument("--gb", type=float, default=1.7, help="size of `dense` (%(default)g)")
    args: argparse.Namespace = made.parse_args()
    seconds = scenario.answer("seconds")
    table = scenario.Table(
        [scenario.Column("ms", seconds, 1e3), scenario.ratio(seconds, "stock")],
        facts=["file", "how", "framework", "cache", "KiB"],
        text={"path": lambda some: some[0].path},
    )
    missing = set(LIBRARIES.values()) - set(scenario.installed(*LIBRARIES.values()))
    with scenario.folder(args.dir) as folder:
        environment = hardware.environment(str(folder))
        for file in args.file:
            path = written(folder, file, args.gb)
            with settle.reserve_for([path, path]) as lender:
                for framework, cache, kb, how in product(
                    args.framework, args.cache, args.kb, args.how
                ):
                    if LIBRARIES[framework] in missing:
                        continue
                    job = {"path": path, "file": file, "framework": framework, "how": how}
                    with scenario.read_ahead(path, kb):
                        runs = measure(job, cache, args.rounds, lender)
                    table.add(runs, file=file, how=how, framework=framework, cache=cache, KiB=kb)
            Path(path).unlink()
    return scenario.report(args, "loads for other frameworks", table, environment=environment)


if __name__ == "__main__":
    scenario.script("frameworks", main, child)
