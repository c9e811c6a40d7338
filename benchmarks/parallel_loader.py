"""Speed of ``ParallelLoader.iterate_weights`` beside the engine's plain speed.

    python benchmarks/parallel_loader.py [--files 4] [--rounds 7] [--cache warm|cold]
                                         [--device cuda] [-o NAME=VALUE] [--json FILE]

Plain is `fastst_patch.load_file` of one file after another. On the CPU both read every byte of
each tensor as it comes, by the same C function: tensors of a map cost nothing until they are
read. Beside fastsafetensors' ParallelLoader where it can be imported. Each round starts one
fresh process per way, in alternating order, and every process first compares what it reads.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _harness as harness

from fastst_patch.bench import hardware, residency, stats, write_json
from fastst_patch.bench.checkpoint import pick_directory, transformer_specs, write_checkpoint

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


def child(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    import fastst_patch
    from fastst_patch import engine

    cpu = job["device"] == "cpu"
    nbytes = checksum = 0

    def load(paths: list[str]) -> None:
        nonlocal nbytes, checksum
        for _, tensor in tensors_of(job["way"], paths, job["device"]):
            checksum ^= engine.touch(tensor.data_ptr(), tensor.nbytes) if cpu else 0
            nbytes += tensor.nbytes
        if not cpu:
            torch.cuda.synchronize(job["device"])

    with fastst_patch.config_context(**job["options"]):
        load(job["small"])  # engine, device and workers start
        nbytes = checksum = 0
        seconds = harness.timed(lambda: load(job["paths"]))
    return {"seconds": seconds, "bytes": nbytes, "checksum": checksum}


def main() -> int:
    parser = harness.arguments(__doc__, "--device", "--dir", "-o")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--file-bytes", type=int, default=400_000_000)
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    args = parser.parse_args()
    ways = [PLAIN, OURS] + ([RIVAL] if importlib.util.find_spec(RIVAL) is not None else [])
    with tempfile.TemporaryDirectory(dir=pick_directory(args.dir)) as folder:
        paths = [Path(folder) / f"model-{k:05}.safetensors" for k in range(args.files)]
        small = Path(folder) / "small.safetensors"
        for path in paths:
            write_checkpoint(path, transformer_specs(args.file_bytes), progress=lambda _: None)
        write_checkpoint(small, transformer_specs(8_000_000), progress=lambda _: None)
        environment = hardware.environment(paths[0])
        job = {"paths": [str(path) for path in paths], "small": [str(small)],
               "device": args.device, "options": dict(args.options)}  # fmt: skip

        def run(way: str) -> dict[str, Any]:
            residency.prepare(args.cache, job["paths"])
            return harness.fresh(__file__, job | {"way": way}, way)

        measured = harness.race(ways, args.rounds, run,
                                lambda one: (one["checksum"], one["bytes"]))  # fmt: skip
    nbytes = measured[PLAIN][0]["bytes"]
    seconds = {way: [one["seconds"] for one in measured[way]] for way in ways}
    print(f"{args.files} files, {nbytes / 1e9:.2f} GB, to {args.device}, {args.cache}, every byte "
          f"read; GB/s, ± {stats.SPREAD}")  # fmt: skip
    results = []
    for way in ways:
        pair = seconds[PLAIN], seconds[way]
        rate = harness.shown([nbytes / s for s in seconds[way]], 1e-9, 2)
        print(f"{way:16} {rate}   of plain speed {harness.shown_ratio(*pair)}")
        results.append({"way": way, "seconds": seconds[way],
                        **harness.ratio(*pair, "of_plain_speed")})  # fmt: skip
    if args.json:
        write_json(args.json, {"environment": environment, "files": args.files, "bytes": nbytes,
                               "device": args.device, "cache": args.cache,
                               "options": dict(args.options), "results": results})  # fmt: skip
    return 0


if __name__ == "__main__":
    harness.script("parallel_loader", main, child)
