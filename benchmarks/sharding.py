"""Four ranks of one machine load their shards of a checkpoint: ours, stock, fastsafetensors.

    python benchmarks/sharding.py [--rounds 5] [--ranks 4] [--gb 1.51] [--cache cold warm]
                                  [--read-ahead KIB] [--loaders NAME ...] [-o NAME=VALUE]
                                  [--model] [--fastsafetensors FOLDER] [--json FILE]

Every rank takes its part of every tensor, of rows and of columns by turns, in even sizes, and
reads every byte of it; over gloo, to the CPU. Each measurement is a group of fresh processes, the
loaders take turns, and the page cache is proven cold or warm when all ranks wait at the start.
The time is from the first rank's start to the last one's end; every rank's bytes are compared
with those of the first measurement. With --model it is ``from_pretrained(tp_plan="auto")`` of a
Llama of that size, patched and not, and its own choice of dimensions. --read-ahead sets the
disk's, which needs root, and restores it. fastsafetensors is left out if it is not installed, nor
in the folder that is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import util
from math import isqrt
from pathlib import Path
from typing import Any

import _harness as harness

from fastst_patch.bench import hardware, settle, stats, write_json
from fastst_patch.bench.checkpoint import (
    TensorSpec,
    pick_directory,
    transformer_specs,
    write_checkpoint,
)
from fastst_patch.bench.failures import BenchError, UsageError
from fastst_patch.bench.table import with_spread
from fastst_patch.report_table import grid

LOADERS = ("fastst", "stock", "fastsafetensors")
CACHES = ("cold", "warm")
RANK = Path(__file__).resolve().with_name("_sharding_rank.py")
RANK_SECONDS = 600  # after which a rank hangs
TRIES = 3  # of a measurement that did not find the cache as it should be
STEP = 64  # hidden sizes that all of a model's sizes divide by
HEADS = 256  # of a Llama, with heads of 64 of which four share a key

_HEADINGS = (
    "cache", "loader", "GB", "time s", "load s", "storage/needed", "peak RSS GB", "of stock",
    "of fastsafetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One group of ranks."""

    seconds: float  # from the first start to the last end
    load_seconds: float  # of the slowest rank, before it reads its tensors
    storage_bytes: int  # read by all ranks together, as the kernel counts them
    peak_rss: int  # of all ranks together
    bytes: int  # handed out by all
    digests: tuple[str, ...]  # by rank
    path: str
    resident_before: float | None
    verified: bool | None


@dataclass
class Plan:
    """What is measured."""

    files: list[str]
    ranks: int
    options: dict[str, str]
    folder: str | None  # of fastsafetensors
    model: bool = False  # whether from_pretrained is called
    done: dict[tuple[str, str], list[Measurement]] = field(default_factory=dict)


# ---- the checkpoint -----------------------------------------------------


def hidden_size(nbytes: int, step: int) -> int:
    return max(step, isqrt(nbytes // 408) // step * step)


def specs_of(files: int, hidden: int) -> list[list[TensorSpec]]:
    """Plan a model of even sizes in some files, whose bytes differ at every offset."""
    model = transformer_specs(408 * hidden**2 + 66 * hidden)
    parts = [model[number::files] for number in range(files)]
    # The noise that is written depends on the offset alone.
    return [
        [TensorSpec(f"first.{number}", (4096 * (number + 1),)), *part]
        for number, part in enumerate(parts)
    ]


@contextlib.contextmanager
def checkpoint(directory: Path, files: int, nbytes: int, model: bool) -> Iterator[list[str]]:
    """Write files of about as many bytes together; ``model``: with what transformers needs."""
    hidden = hidden_size(nbytes, HEADS if model else STEP)
    with tempfile.TemporaryDirectory(prefix="fastst-sharding-", dir=directory) as folder:
        written, places = [], {}
        for number, specs in enumerate(specs_of(files, hidden)):
            path = Path(folder) / f"model-{number + 1:05}-of-{files:05}.safetensors"
            write_checkpoint(path, specs[1:] if model else specs, lambda _: None)
            written.append(str(path))
            places |= {spec.name: path.name for spec in specs[1:]}
        if model:
            index = {"metadata": {}, "weight_map": places}
            write_json(f"{folder}/model.safetensors.index.json", index)
            write_json(f"{folder}/config.json", llama(hidden))
        yield written


def llama(hidden: int) -> dict[str, Any]:
    """The configuration of `transformer_specs`' model."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "vocab_size": hidden * 16,
        "num_hidden_layers": 16, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // HEADS, "tie_word_embeddings": False,
    }  # fmt: skip


# ---- one measurement ----------------------------------------------------


def run(plan: Plan, loader: str, cache: str, reserve: settle.Reserve) -> Measurement:
    """Start the ranks, wait for them, and put together what they say.

    The memory of the reserve is theirs from the start of the clock on.
    """
    with tempfile.TemporaryDirectory(prefix="fastst-ranks-") as folder:
        job = {
            "files": plan.files, "loader": loader, "cache": cache, "ranks": plan.ranks,
            "port": f"{folder}/port", "folder": plan.folder, "model": plan.model,
            "options": plan.options if loader == "fastst" else {},
        }  # fmt: skip
        running = [
            subprocess.Popen(
                [sys.executable, str(RANK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )
            for _ in range(plan.ranks)
        ]  # fmt: skip
        try:
            for number, process in enumerate(running):
                assert process.stdin is not None
                process.stdin.write(json.dumps({**job, "rank": number}) + "\n")
                process.stdin.flush()
            assert running[0].stdout is not None
            running[0].stdout.readline()  # "ready", or nothing: it failed, and says so below
            with reserve.lend():
                answers = [_answer(process, loader) for process in running]
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                process.wait()
    return Measurement(
        seconds=max(one["end"] for one in answers) - min(one["begin"] for one in answers),
        load_seconds=max(one["ready"] - one["begin"] for one in answers),
        storage_bytes=sum(one["read_bytes"] for one in answers),
        peak_rss=sum(one["peak_rss"] for one in answers),
        bytes=sum(one["bytes"] for one in answers),
        digests=tuple(one["digest"] for one in answers),
        path=", ".join(sorted({one["path"] for one in answers})),
        resident_before=answers[0]["resident"],
        verified=answers[0]["verified"],
    )


def _answer(process: subprocess.Popen[str], loader: str) -> dict[str, Any]:
    try:
        out, err = process.communicate("go\n", timeout=RANK_SECONDS)
    except subprocess.TimeoutExpired:
        raise BenchError(f"a rank of {loader} hangs") from None
    if process.returncode != 0:
        raise BenchError(f"a rank of {loader} failed:\n{err}")
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def measure(plan: Plan, loader: str, cache: str, reserve: settle.Reserve) -> Measurement:
    """A measurement that found the page cache as it should be, with the right bytes."""
    for _ in range(TRIES):
        found = run(plan, loader, cache, reserve)
        if found.verified is not False:
            break
    else:
        raise BenchError(f"the files do not become {cache}: {found.resident_before}")
    first = next(iter(plan.done.values()), [found])[0]
    if found.digests != first.digests:
        raise BenchError(f"{loader}, {cache}: other tensors than those of the first measurement")
    return found


def race(
    plan: Plan,
    loaders: Sequence[str],
    caches: Sequence[str],
    rounds: int,
    reserve: settle.Reserve,
) -> None:
    for cache in caches:

        def run_one(loader: str, cache: str = cache) -> Measurement:
            found = measure(plan, loader, cache, reserve)
            done = plan.done.setdefault((cache, loader), [])
            done.append(found)
            print(f"{cache} {len(done)}/{rounds} {loader}: {found.seconds:.2f} s", file=sys.stderr)
            return found

        harness.race(loaders, rounds, run_one)


# ---- the table ----------------------------------------------------------


def _seconds(plan: Plan, cache: str, loader: str) -> list[float]:
    return [one.seconds for one in plan.done.get((cache, loader), [])]


def _ratio(plan: Plan, cache: str, loader: str, to: str) -> stats.Summary | None:
    baseline = _seconds(plan, cache, to)
    return stats.paired_ratio(_seconds(plan, cache, loader), baseline) if baseline else None


def rows(plan: Plan) -> list[dict[str, Any]]:
    """Medians and spreads by cache and loader."""
    total = sum(Path(file).stat().st_size for file in plan.files)
    found = []
    for (cache, loader), runs in plan.done.items():
        row: dict[str, Any] = {
            "cache": cache, "loader": loader, "rounds": len(runs), "path": runs[0].path,
            "bytes": runs[0].bytes,
        }  # fmt: skip
        summaries = {
            "seconds": stats.summarize([one.seconds for one in runs]),
            "load_seconds": stats.summarize([one.load_seconds for one in runs]),
            "storage_ratio": stats.summarize([one.storage_bytes / total for one in runs]),
            "peak_rss": stats.summarize([float(one.peak_rss) for one in runs]),
            "of_stock": _ratio(plan, cache, loader, "stock"),
            "of_fastsafetensors": _ratio(plan, cache, loader, "fastsafetensors"),
        }
        row |= {name: None if one is None else asdict(one) for name, one in summaries.items()}
        found.append(row)
    return found


def _cell(value: dict[str, Any] | None, digits: int = 2, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    spread = None if value["spread"] is None else value["spread"] / scale
    return with_spread(stats.Summary(value["median"] / scale, spread), digits)


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        (row["cache"], row["loader"], f"{row['bytes'] / 1e9:.2f}", _cell(row["seconds"]),
         _cell(row["load_seconds"]), _cell(row["storage_ratio"]),
         _cell(row["peak_rss"], scale=1e9), _cell(row["of_stock"]),
         _cell(row["of_fastsafetensors"]))
        for row in found
    ]  # fmt: skip
    return "\n".join(grid([_HEADINGS, *lines], {"cache", "loader"}))


# ---- the command --------------------------------------------------------


def _loaders(args: argparse.Namespace) -> tuple[str, ...]:
    wanted = tuple(args.loaders)
    if args.model:
        return tuple(name for name in wanted if name != "fastsafetensors")  # has no such call
    if "fastsafetensors" not in wanted or args.fastsafetensors:
        return wanted
    if util.find_spec("fastsafetensors") is not None:
        return wanted
    print("fastsafetensors is not installed: left out (see --fastsafetensors)", file=sys.stderr)
    return tuple(name for name in wanted if name != "fastsafetensors")


def _arguments() -> argparse.Namespace:
    parser = harness.arguments(__doc__, "--dir", "-o", rounds=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--gb", type=float, default=1.51)
    parser.add_argument("--cache", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS))
    parser.add_argument("--model", action="store_true", help="from_pretrained(tp_plan='auto')")
    parser.add_argument("--read-ahead", type=int, metavar="KIB", help="of the disk; needs root")
    parser.add_argument("--fastsafetensors", metavar="FOLDER", help="where the package lies")
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    loaders = _loaders(args)
    directory = pick_directory(args.dir)
    if args.ranks < 1 or STEP // 4 % args.ranks:
        raise UsageError(f"--ranks {args.ranks}: sizes must be even; use 1, 2, 4, 8 or 16")
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(checkpoint(directory, args.ranks, int(args.gb * 1e9),
                                               args.model))  # fmt: skip
        stack.enter_context(harness.read_ahead(files[0], args.read_ahead))
        environment = hardware.environment(Path(files[0]))
        plan = Plan(files, args.ranks, dict(args.options), args.fastsafetensors, args.model)
        with settle.reserve_for(files) as reserve:
            race(plan, loaders, args.cache, args.rounds, reserve)
        found = rows(plan)
    print(f"{args.ranks} ranks, {len(files)} files; medians of {args.rounds} rounds, "
          f"± {stats.SPREAD}; every rank's bytes equal in all measurements")  # fmt: skip
    print(table(found))
    if args.json:
        runs = {f"{cache} {loader}": [asdict(one) for one in some]
                for (cache, loader), some in plan.done.items()}  # fmt: skip
        write_json(args.json, {"environment": environment, "ranks": args.ranks,
                               "model": args.model, "options": dict(args.options), "rows": found,
                               "runs": runs})  # fmt: skip
    return 0


if __name__ == "__main__":
    harness.script("sharding", main)
