"""Speed of ``ParallelLoader.iterate_weights`` beside the engine's plain speed.

    python benchmarks/parallel_loader.py [--files 4] [--rounds 7] [--cache warm|cold]
                                         [--device cuda] [-o NAME=VALUE] [--json FILE]

Plain is `fastst_patch.load_file` of one file after another. On the CPU both read every byte of
each tensor as it comes, by the same C function: tensors of a map cost nothing until they are
read. Beside fastsafetensors' ParallelLoader where it can be imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import _scenario as scenario

from fastst_patch.bench import hardware, harness
from fastst_patch.bench.checkpoint import transformer_specs

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


def child(job: dict[str, Any], gate: Any) -> dict[str, Any]:
    import fastst_patch
    from fastst_patch.bench.child import clock
    from fastst_patch.bench.device_use import synchronize, touch

    cpu = job["device"] == "cpu"
    nbytes = checksum = 0

    def load(paths: list[str]) -> None:
        nonlocal nbytes, checksum
        for _, tensor in tensors_of(job["way"], paths, job["device"]):
            checksum ^= touch(tensor) if cpu else 0
            nbytes += tensor.nbytes
        synchronize(job["device"])

    with fastst_patch.config_context(**job["options"]):
        load(job["small"])  # engine, device and workers start
        nbytes = checksum = 0
        with clock("", job["paths"], job["device"], gate) as timed:
            load(job["paths"])
            timed.lap("load")
    return {"seconds": timed.seconds["load"], "bytes": nbytes, "checksum": checksum,
            "resident_before": timed.resident}  # fmt: skip


def main() -> int:
    parser = scenario.arguments(__doc__, "--device", "--dir", "-o")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--file-bytes", type=int, default=400_000_000)
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    args = parser.parse_args()
    ways = [PLAIN, OURS, *scenario.installed(RIVAL)]
    with scenario.folder(args.dir) as folder:
        specs = transformer_specs(args.file_bytes)
        paths = [scenario.write(folder / f"model-{k:05}.safetensors", specs)
                 for k in range(args.files)]  # fmt: skip
        small = scenario.write(folder / "small.safetensors", transformer_specs(8_000_000))
        environment = hardware.environment(paths[0])
        job = {"paths": paths, "small": [small], "device": args.device,
               "options": dict(args.options)}  # fmt: skip

        def run(way: str) -> Any:
            return scenario.in_cache(args.cache, paths, lambda gate: scenario.fresh(
                __file__, job | {"way": way}, way, gate))  # fmt: skip

        runs = harness.race(ways, args.rounds, run, lambda one: (one.checksum, one.bytes))
    nbytes = runs[PLAIN][0].bytes

    def speed(one: Any) -> float:
        return float(nbytes / one.seconds)

    table = scenario.Table([scenario.Column("GB/s", speed, 1e-9, 2), scenario.ratio(speed, PLAIN)])
    table.add(runs)
    title = (f"{args.files} files, {nbytes / 1e9:.2f} GB, to {args.device}, {args.cache}, every "
             "byte read")  # fmt: skip
    return scenario.report(args, title, table, environment=environment, files=args.files,
                           bytes=nbytes, device=args.device, cache=args.cache)  # fmt: skip


if __name__ == "__main__":
    scenario.script("parallel_loader", main, child)
