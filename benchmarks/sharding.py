"""Four ranks of one machine load their shards of a checkpoint: ours, stock, fastsafetensors.

    python benchmarks/sharding.py [--rounds 5] [--ranks 4] [--gb 1.51] [--cache cold warm]
                                  [--read-ahead KIB] [--loaders NAME ...] [-o NAME=VALUE]
                                  [--model] [--json FILE]

Every rank takes its part of every tensor, of rows and of columns by turns, in even sizes, and
reads every byte of it; over gloo, to the CPU. Each measurement is a group of fresh processes, the
loaders take turns, and the page cache is proven cold or warm when all ranks wait at the start.
The time is from the first rank's start to the last one's end; every rank's bytes are compared
with those of the first measurement. With --model it is ``from_pretrained(tp_plan="auto")`` of a
Llama of that size, patched and not, and its own choice of dimensions. --read-ahead sets the
disk's, which needs root, and restores it. fastsafetensors is left out where it cannot be imported
(``PYTHONPATH`` may name its folder).
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _models
import _scenario as scenario

from fastst_patch.bench import hardware, harness, settle
from fastst_patch.bench.checkpoint import TensorSpec, transformer_specs
from fastst_patch.bench.failures import BenchError, UsageError
from fastst_patch.bench.process import Child, Gate, ProcessFailedError, interpreter

LOADERS = ("fastst", "stock", "fastsafetensors")
CACHES = ("cold", "warm")
RANK = Path(__file__).resolve().with_name("_sharding_rank.py")
RANK_SECONDS = 600  # after which a rank hangs
STEP = 64  # hidden sizes that all of a model's sizes divide by, and the size of its heads
HEADS = 256  # of a Llama, with heads of 64 of which four share a key


# ---- the checkpoint -----------------------------------------------------


def hidden_size(nbytes: int, step: int) -> int:
    return max(step, isqrt(nbytes // 408) // step * step)


def checkpoint(folder: Path, files: int, nbytes: int, model: bool) -> list[str]:
    """Write a model of even sizes in some files of about as many bytes together.

    Unless transformers is to load it, their bytes differ at every offset: the noise that is
    written depends on the offset alone, so each file begins with a tensor of another size.
    """
    hidden = hidden_size(nbytes, HEADS if model else STEP)
    specs = transformer_specs(408 * hidden**2 + 66 * hidden)
    shards = [specs[number::files] for number in range(files)]
    if not model:
        shards = [[TensorSpec(f"first.{number}", (4096 * (number + 1),)), *shard]
                  for number, shard in enumerate(shards)]  # fmt: skip
    config = _models.llama_config(specs, head=STEP)
    return list(_models.write(folder / "model", config, shards).files)


# ---- one measurement ----------------------------------------------------


def run(job: Mapping[str, Any], gate: Gate) -> SimpleNamespace:
    """Start the ranks, let them through the gate, and put together what they say."""
    label, running = f"a rank of {job['loader']}", []
    with (
        tempfile.TemporaryDirectory(prefix="fastst-ranks-") as folder,
        contextlib.ExitStack() as stack,
    ):
        for number in range(job["ranks"]):
            message = {**job, "port": f"{folder}/port", "rank": number}
            start = interpreter([str(RANK)], os.environ, folder)
            running.append(stack.enter_context(Child(message, start)))
        try:
            running[0].wait_ready(RANK_SECONDS)
            with gate:
                answers = [SimpleNamespace(**child.go(RANK_SECONDS)) for child in running]
        except ProcessFailedError as failed:
            raise BenchError(f"{label}: {failed.detail}\n" + "\n".join(failed.told)) from None
    return SimpleNamespace(
        seconds=max(one.end for one in answers) - min(one.begin for one in answers),
        load_seconds=max(one.ready - one.begin for one in answers),  # of the slowest rank
        storage_bytes=sum(one.read_bytes for one in answers),
        peak_rss=sum(one.peak_rss for one in answers),
        bytes=sum(one.bytes for one in answers),
        digests=[one.digest for one in answers],
        path=", ".join(sorted({one.path for one in answers})),
        resident_before=answers[0].resident,
    )


# ---- the command --------------------------------------------------------


def parser() -> Any:
    made = scenario.arguments(__doc__, "--dir", "-o", rounds=5)
    made.add_argument("--ranks", type=int, default=4)
    made.add_argument("--gb", type=float, default=1.51)
    made.add_argument("--cache", nargs="+", choices=CACHES, default=list(CACHES))
    made.add_argument("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS))
    made.add_argument("--model", action="store_true", help="from_pretrained(tp_plan='auto')")
    made.add_argument("--read-ahead", type=int, metavar="KIB", help="of the disk; needs root")
    return made


def chosen_loaders(args: Any) -> Sequence[str]:
    rival = LOADERS[2]
    if args.model or (rival in args.loaders and not scenario.installed(rival)):
        return [name for name in args.loaders if name != rival]  # which has no such call
    return list(args.loaders)


def main() -> int:
    args = parser().parse_args()
    loaders = chosen_loaders(args)
    if args.ranks < 1 or STEP // 4 % args.ranks:
        raise UsageError(f"--ranks {args.ranks}: sizes must be even; use 1, 2, 4, 8 or 16")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scenario.folder(args.dir))
        files = checkpoint(folder, args.ranks, int(args.gb * 1e9), args.model)
        stack.enter_context(scenario.read_ahead(files[0], args.read_ahead))
        environment = hardware.environment(files[0])
        total = sum(Path(file).stat().st_size for file in files)
        table, first = _table(total), []
        reserve = stack.enter_context(settle.reserve_for(files))

        def run_one(cache: str, loader: str) -> SimpleNamespace:
            job = {"files": files, "loader": loader, "ranks": args.ranks, "model": args.model,
                   "options": dict(args.options) if loader == "fastst" else {}}  # fmt: skip
            found = scenario.in_cache(cache, files, lambda gate: run(job, gate), reserve)
            first.append(found.digests)
            if found.digests != first[0]:  # also those of another state of the cache
                raise BenchError(f"{loader}, {cache}: other tensors than those loaded first")
            print(f"{cache} {loader}: {found.seconds:.2f} s", file=sys.stderr)
            return found

        for cache in args.cache:
            runs = harness.race(
                loaders, args.rounds, lambda loader, cache=cache: run_one(cache, loader)
            )
            table.add(runs, cache=cache)
    title = f"{args.ranks} ranks, {len(files)} files; every rank's bytes equal in all measurements"
    return scenario.report(args, title, table, environment=environment, ranks=args.ranks,
                           model=args.model)  # fmt: skip


def _table(total: int) -> scenario.Table:
    seconds = scenario.answer("seconds")
    return scenario.Table(
        [scenario.Column("GB", scenario.answer("bytes"), 1e-9, 2),
         scenario.Column("time s", seconds, 1, 2),
         scenario.Column("load s", scenario.answer("load_seconds"), 1, 2),
         scenario.Column("storage/needed", scenario.answer("storage_bytes"), 1 / total, 2),
         scenario.Column("peak RSS GB", scenario.answer("peak_rss"), 1e-9, 2),
         scenario.ratio(seconds, "stock"), scenario.ratio(seconds, "fastsafetensors")],
        facts=["cache"], text={"path": lambda runs: runs[0].path},
    )  # fmt: skip


if __name__ == "__main__":
    scenario.script("sharding", main)
