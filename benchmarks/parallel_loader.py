"""Speed of ``ParallelLoader.iterate_weights`` beside the engine's plain speed.

    python benchmarks/parallel_loader.py [--files 4] [--rounds 7] [--cache warm|cold]
                                         [--device cuda] [-o NAME=VALUE] [--json FILE]

Plain is `fastst_patch.load_file` of one file after another. On the CPU both read every byte of
each tensor as it comes, by the same C function: tensors of a map cost nothing until they are
read. Beside fastsafetensors' ParallelLoader where it can be imported. Each round starts one
fresh process per way, in alternating order, and every process first compares what it reads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastst_patch.bench import guarded, machine, residency, stats, write_json
from fastst_patch.bench.checkpoint import pick_directory, transformer_specs, write_checkpoint
from fastst_patch.bench.job import run_json
from fastst_patch.bench.table import with_spread
from fastst_patch.cli import option

PLAIN, OURS, RIVAL = "load_file", "ParallelLoader", "fastsafetensors"


def tensors_of(way: str, paths: list[str], device: str) -> Iterator[tuple[str, Any]]:
    """Names and tensors, one after another."""
    if way == PLAIN:
        from fastst_patch import load_file

        for path in paths:
            yield from load_file(path, device=device).items()
    elif way == OURS:
        from fastst_patch import ParallelLoader

        loader = ParallelLoader(None, paths, use_tqdm_on_load=False, device=device)
        yield from loader.iterate_weights()
    else:
        from fastsafetensors import ParallelLoader as Theirs

        theirs = Theirs(None, paths, use_tqdm_on_load=False, device=device, nogds=True)
        yield from theirs.iterate_weights()
        theirs.close()


def child() -> None:
    job = json.load(sys.stdin)
    import torch

    import fastst_patch
    from fastst_patch import engine

    cpu = job["device"] == "cpu"

    def settled() -> None:
        if not cpu:
            torch.cuda.synchronize(job["device"])

    def look(tensor: Any) -> int:
        return engine.touch(tensor.data_ptr(), tensor.nbytes) if cpu else 0

    with fastst_patch.config_context(**job["options"]):
        warm_up: Callable[[], object] = lambda: [  # noqa: E731 - engine, device, workers
            tensor.nbytes for _, tensor in tensors_of(job["way"], job["small"], job["device"])
        ]
        warm_up()
        settled()
        nbytes = checksum = 0
        begin = time.perf_counter()
        for _, tensor in tensors_of(job["way"], job["paths"], job["device"]):
            checksum ^= look(tensor)
            nbytes += tensor.nbytes
        settled()
        seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "bytes": nbytes, "checksum": checksum}))


def measure(args: argparse.Namespace, ways: Sequence[str], paths: list[str], small: list[str]
            ) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    me = str(Path(__file__).absolute())
    measured: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(args.rounds):
        for way in ways if number % 2 == 0 else ways[::-1]:
            residency.prepare(args.cache, paths)
            job = {"way": way, "paths": paths, "small": small, "device": args.device,
                   "options": dict(args.options)}  # fmt: skip
            measured[way].append(run_json([me, "--child"], job, way))
    sums = {(one["checksum"], one["bytes"]) for some in measured.values() for one in some}
    assert len(sums) == 1, f"the ways gave different bytes: {sums}"
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--file-bytes", type=int, default=400_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    parser.add_argument("--dir", help="where to write the files")
    parser.add_argument("-o", "--option", type=option, action="append", default=[], dest="options")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child()
        return 0
    ways = [PLAIN, OURS] + ([RIVAL] if importlib.util.find_spec(RIVAL) is not None else [])
    with tempfile.TemporaryDirectory(dir=pick_directory(args.dir)) as folder:
        paths = [Path(folder) / f"model-{k:05}.safetensors" for k in range(args.files)]
        small = Path(folder) / "small.safetensors"
        for path in paths:
            write_checkpoint(path, transformer_specs(args.file_bytes), progress=lambda _: None)
        write_checkpoint(small, transformer_specs(8_000_000), progress=lambda _: None)
        environment = machine.environment(paths[0])
        measured = measure(args, ways, [str(path) for path in paths], [str(small)])
    nbytes = measured[PLAIN][0]["bytes"]
    seconds = {way: [one["seconds"] for one in measured[way]] for way in ways}
    print(f"{args.files} files, {nbytes / 1e9:.2f} GB, to {args.device}, {args.cache}, every byte "
          f"read; GB/s, ± {stats.SPREAD}")  # fmt: skip
    results = []
    for way in ways:
        rate = stats.summarize([nbytes / s / 1e9 for s in seconds[way]])
        speed = stats.paired_ratio(seconds[PLAIN], seconds[way])
        print(f"{way:16} {with_spread(rate, 2)}   of plain speed {with_spread(speed, 2)}")
        results.append({"way": way, "seconds": seconds[way], "of_plain_speed": speed.median,
                        "of_plain_speed_spread": speed.spread})  # fmt: skip
    if args.json:
        write_json(args.json, {"environment": environment, "files": args.files, "bytes": nbytes,
                               "device": args.device, "cache": args.cache,
                               "options": dict(args.options), "results": results})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(guarded("parallel_loader", main))
