"""A file read name by name through `safe_open`, as engines and scripts do; against stock.

    python benchmarks/walk.py [--order NAME,…] [--how tensor,slice] [--use copy,touch]
                              [--cache cold,warm] [--memory STATE,…] [--kb KIB …]
                              [--layout natural|sorted] [--gb 1.2] [--rounds 9] [--json FILE]

A process opens the file, takes one tensor after another in some order, and copies each into memory
that it has allocated (`copy`), or reads every byte (`touch`). Fresh processes, stock and patched
alternating, the page cache proven cold or warm before each, free memory in a state of its own
(`_memory.py`). Every tensor's bytes are compared with those of the first run. The clock runs from
before the file is opened until the last byte was read. `--kb` sets the disk's read-ahead, which
needs root, and puts it back.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from _memory import STATES, reserve
from readahead import read_ahead
from tqdm import tqdm

from fastst_patch.bench import guarded, machine, residency, stats, write_json
from fastst_patch.bench.checkpoint import pick_directory, transformer_specs, write_checkpoint
from fastst_patch.bench.errors import BenchError, UsageError
from fastst_patch.bench.job import READY, run_json
from fastst_patch.bench.runner import LOADERS, TRIES, Gate
from fastst_patch.bench.table import with_spread
from fastst_patch.cli import option
from fastst_patch.summary import grid

THREADS = 4
ORDERS = ("sorted", "file", "reversed", "random", "layer", "tenth", "handles", "threads")

_HEADINGS = ("order", "how", "use", "cache", "memory", "KiB", "stock s", "patched s",
             "patched/stock", "from storage", "path")  # fmt: skip


# ---- the process that is timed ------------------------------------------


def natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def names_in(order: str, keys: list[str], in_file: list[str]) -> list[str]:
    """Names in the order in which they are asked for."""
    if order == "file":
        return in_file
    if order == "reversed":
        return keys[::-1]
    if order == "random":
        return random.Random(7).sample(keys, len(keys))
    if order == "layer":
        return sorted(keys, key=natural)
    if order == "tenth":
        return keys[::10]
    return keys


def child() -> None:
    job = json.loads(sys.stdin.readline())
    import safetensors
    import torch

    from fastst_patch import engine  # in both: stock's bytes are compared, too

    reports: Any = contextlib.nullcontext()
    if job["loader"] == "patched":
        import fastst_patch

        fastst_patch.patch(**job["options"])
        reports = fastst_patch.profile()
    safe_open, path = safetensors.safe_open, job["path"]
    names = names_in(job["order"], job["keys"], job["in_file"])
    copies = {name: torch.empty(job["shapes"][name], dtype=torch.bfloat16) for name in names}
    sums: dict[str, int] = {}

    def use(name: str, tensor: torch.Tensor) -> None:
        if job["use"] == "copy":
            copies[name].copy_(tensor)
        else:
            sums[name] = engine.touch(tensor.data_ptr(), tensor.nbytes)

    def take(handle: Any, name: str) -> None:
        found = handle.get_slice(name)[:] if job["how"] == "slice" else handle.get_tensor(name)
        use(name, found)

    print(READY, flush=True)
    sys.stdin.readline()
    gc.collect()
    gc.freeze()  # patching imports more: neither shall pay for traversing that
    resident = residency.resident_fraction([path])[0]
    read_before = read_bytes()
    with reports as profile:
        begin = time.perf_counter()
        _walk(job["order"], safe_open, path, names, take)
        seconds = time.perf_counter() - begin
    answer = {
        "seconds": seconds,
        "read_bytes": read_bytes() - read_before,
        "resident_before": resident,
        "path": "stock" if profile is None else ", ".join(
            dict.fromkeys(report.path for report in profile.reports)),
        "sums": sums or {
            name: engine.touch(copy.data_ptr(), copy.nbytes) for name, copy in copies.items()
        },
    }  # fmt: skip
    print(json.dumps(answer))


def _walk(
    order: str, safe_open: Any, path: str, names: list[str], take: Callable[[Any, str], None]
) -> None:
    if order == "handles":
        with safe_open(path, "pt") as even, safe_open(path, "pt") as odd:
            for number, name in enumerate(names):
                take(odd if number % 2 else even, name)
    elif order == "threads":
        left = iter(names)
        lock = threading.Lock()
        with safe_open(path, "pt") as handle:

            def work() -> None:
                while True:
                    with lock:
                        name = next(left, None)
                    if name is None:
                        return
                    take(handle, name)

            threads = [threading.Thread(target=work) for _ in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    else:
        with safe_open(path, "pt") as handle:
            handle.keys()
            for name in names:
                take(handle, name)


def read_bytes() -> int:
    """What this process has had read from storage."""
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(text.split("\nread_bytes: ")[1].split()[0])


# ---- rounds -------------------------------------------------------------


def run_proven(job: dict[str, Any], cache: str, lender: Any) -> dict[str, Any]:
    """Run once, again where something else took the cache out of its state meanwhile."""
    for _ in range(TRIES):
        gate = Gate(cache, [job["path"]], lender)
        answer = run_json([str(Path(__file__).absolute()), "--child"], job,
                          f"{job['loader']} loader", gate)  # fmt: skip
        resident = answer["resident_before"]
        if resident is None or residency.satisfies(cache, resident):
            return answer
    raise BenchError(f"{job['path']}: not {cache} in the page cache, but {resident:.1%} cached")


def measure(
    args: argparse.Namespace, job: dict[str, Any], cache: str, lender: Any, bar: tqdm
) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {loader: [] for loader in LOADERS}
    for number in range(args.rounds):
        for loader in LOADERS if number % 2 == 0 else LOADERS[::-1]:
            options = dict(args.options) if loader == "patched" else {}
            answer = run_proven(job | {"loader": loader, "options": options}, cache, lender)
            runs[loader].append(answer)
            if answer["sums"] != next(iter(runs["stock"] + runs["patched"]))["sums"]:
                raise BenchError(f"the {loader} walk gave other bytes than the first: a bug")
            bar.update()
    return runs


@contextlib.contextmanager
def file_of(directory: Path, gb: float, layout: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The file to walk, and what a process has to know of it."""
    import tempfile

    specs = transformer_specs(int(gb * 1e9))
    with tempfile.TemporaryDirectory(prefix="fastst-bench-", dir=directory) as folder:
        path = Path(folder) / "model.safetensors"
        write_checkpoint(path, specs, lambda _: None, as_given=layout == "natural")
        keys = sorted(spec.name for spec in specs)
        known = {
            "path": str(path),
            "keys": keys,
            "in_file": [spec.name for spec in specs] if layout == "natural" else keys,
            "shapes": {spec.name: spec.shape for spec in specs},
        }
        yield path, known


def row(case: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seconds = {loader: [run["seconds"] for run in runs[loader]] for loader in LOADERS}
    ratio = stats.paired_ratio(seconds["patched"], seconds["stock"])
    read = {
        loader: stats.summarize([run["read_bytes"] for run in runs[loader]]).median
        for loader in LOADERS
    }
    return case | {
        "seconds": seconds,
        "read_bytes": read,
        "ratio": ratio.median,
        "ratio_spread": ratio.spread,
        "path": runs["patched"][0]["path"],
    }


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    seconds, read = found["seconds"], found["read_bytes"]
    return (
        found["order"], found["how"], found["use"], found["cache"], found["memory"],
        str(found["kb"] or "as is"),
        *(with_spread(stats.summarize(seconds[loader])) for loader in LOADERS),
        with_spread(stats.Summary(found["ratio"], found["ratio_spread"]), 2),
        f"{read['patched'] / 1e6:.0f} / {read['stock'] / 1e6:.0f} MB",
        found["path"],
    )  # fmt: skip


def _some(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = list(allowed) if text == "all" else text.split(",")
        unknown = [one for one in chosen if one not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: not among {', '.join(allowed)}")
        return chosen

    return parse


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, allowed, default in (
        ("order", ORDERS, ["sorted"]),
        ("how", ("tensor", "slice"), ["tensor"]),
        ("use", ("copy", "touch"), ["copy"]),
        ("cache", ("cold", "warm"), ["cold"]),
        ("memory", STATES, ["lent"]),
    ):
        made.add_argument(f"--{name}", type=_some(allowed), default=default,
                          help=f"{', '.join(allowed)}, or all ({', '.join(default)})")  # fmt: skip
    made.add_argument("--kb", type=int, nargs="+", default=[0], help="read-ahead; 0: as it is")
    made.add_argument("--layout", choices=("natural", "sorted"), default="natural",
                      help="of the file: by layers, or sorted by name (%(default)s)")  # fmt: skip
    made.add_argument("--gb", type=float, default=1.2, help="size of the file (%(default)g)")
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--dir", help="where to write the file")
    made.add_argument("-o", "--option", type=option, action="append", default=[], dest="options",
                      metavar="NAME=VALUE", help="an option for patch(); repeatable")  # fmt: skip
    made.add_argument("--json", metavar="FILE")
    return made


def main() -> int:
    args = parser().parse_args()
    results = []
    with contextlib.ExitStack() as stack:
        directory = pick_directory(args.dir)
        path, known = stack.enter_context(file_of(directory, args.gb, args.layout))
        setting = machine.read_ahead_file(path)
        if any(args.kb) and setting is None:
            raise UsageError(f"{path}: its file system has no read-ahead setting")
        environment = machine.environment(path)
        nbytes = path.stat().st_size
        cases = list(product(args.cache, args.kb, args.order, args.how, args.use))
        bar = stack.enter_context(tqdm(total=len(cases) * len(args.memory) * args.rounds * 2,
                                       unit="run", disable=None, leave=False))  # fmt: skip
        for memory in args.memory:
            # Pages of the cache, and the copies.
            with reserve(memory, 2 * nbytes) as lender:
                for cache, kb, order, how, use in cases:
                    case = {"order": order, "how": how, "use": use, "cache": cache,
                            "memory": memory, "kb": kb}  # fmt: skip
                    bar.set_description(" ".join(map(str, case.values())))
                    with read_ahead(setting, kb) if kb and setting else contextlib.nullcontext():
                        runs = measure(args, known | case, cache, lender, bar)
                    results.append(row(case, runs))
                    bar.write("  ".join(cells(results[-1])))
    print(f"{nbytes / 1e9:.2f} GB, {len(known['keys'])} tensors; medians of {args.rounds} "
          f"alternating rounds in fresh processes, ± {stats.SPREAD}")  # fmt: skip
    print("\n".join(grid([_HEADINGS, *map(cells, results)], {"order", "how", "use", "path"})))
    if args.json:
        write_json(args.json, {"environment": environment, "bytes": nbytes,
                               "layout": args.layout, "options": dict(args.options),
                               "results": results})  # fmt: skip
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        child()
        sys.exit(0)
    sys.exit(guarded("walk", main))
