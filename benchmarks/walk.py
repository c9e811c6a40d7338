"""A file read name by name through `safe_open`, as engines and scripts do; against stock.

    python benchmarks/walk.py [--order NAME,…] [--how tensor,slice] [--use copy,touch]
                              [--cache cold,warm] [--memory STATE,…] [--kb KIB …]
                              [--layout natural|sorted] [--gb 1.2] [--rounds 9] [--access]
                              [--json FILE]

A process opens the file, takes one tensor after another in some order, and copies each into memory
that it has allocated (`copy`), or reads every byte (`touch`). Fresh processes, stock and patched
alternating, the page cache proven cold or warm before each, free memory in a state of its own
(`_memory.py`). Every tensor's bytes are compared with those of the first run. The clock runs from
before the file is opened until the last byte was read. `--kb` sets the disk's read-ahead, which
needs root, and puts it back.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import gc
import os
import random
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import _harness as harness
from _memory import STATES, reserve
from tqdm import tqdm

from fastst_patch.bench import hardware, residency, stats, write_json
from fastst_patch.bench.checkpoint import (
    TensorSpec,
    pick_directory,
    transformer_specs,
    write_checkpoint,
)
from fastst_patch.bench.failures import UsageError
from fastst_patch.bench.job import READY
from fastst_patch.bench.table import with_spread
from fastst_patch.cli.main import option
from fastst_patch.report_table import grid

THREADS = 4
NOBODY = 65534
VARIANTS: dict[str, dict[str, Any]] = {
    "stock": {"loader": "stock"},
    "patched": {"loader": "patched"},
}
ACCESS: dict[str, dict[str, Any]] = {
    "own file": {"loader": "patched"},
    "another's": {"loader": "patched", "nobody": True},
    "no cachestat": {"loader": "patched", "blind": True},
    "another's, no cachestat": {"loader": "patched", "nobody": True, "blind": True},
}
"""With --access: who reads whose file, and what the kernel tells of the cache; the first is what
the others are compared with."""
ORDERS = ("sorted", "file", "reversed", "random", "layer", "tenth", "handles", "threads")

_HEADINGS = ("what", "order", "how", "use", "cache", "memory", "KiB", "base s", "its s",
             "its/base", "storage", "path")  # fmt: skip


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


def child(job: dict[str, Any]) -> dict[str, Any]:
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
    with safe_open(job["tiny"], "pt") as handle:  # the other user may not be able to import
        handle.get_tensor("x")
        codecs.lookup("ascii")
    if job.get("nobody"):
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if job.get("blind"):
        engine.set_fault("cachestat", errno=errno.ENOSYS)
    gc.collect()
    gc.freeze()  # patching imports more: neither shall pay for traversing that
    resident = residency.resident_fraction([path])[0]
    read_before = read_bytes()
    with reports as profile:
        begin = time.perf_counter()
        _walk(job["order"], safe_open, path, names, take)
        seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "read_bytes": read_bytes() - read_before,
        "resident_before": resident,
        "path": "stock" if profile is None else ", ".join(
            dict.fromkeys(report.path for report in profile.reports)),
        "sums": sums or {
            name: engine.touch(copy.data_ptr(), copy.nbytes) for name, copy in copies.items()
        },
    }  # fmt: skip


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
    """What this process has had read from storage; also after it became another user."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512


# ---- rounds -------------------------------------------------------------


def measure(
    args: argparse.Namespace, job: dict[str, Any], cache: str, lender: Any, bar: tqdm
) -> dict[str, list[dict[str, Any]]]:
    variants = ACCESS if args.access else VARIANTS

    def run(name: str) -> dict[str, Any]:
        options = {} if name == "stock" else dict(args.options)
        message = job | variants[name] | {"options": options}
        answer, _ = harness.proven(
            cache, [job["path"]], lender,
            lambda gate: harness.fresh(__file__, message, f"{name} walk", gate),
            lambda one: one["resident_before"],
        )  # fmt: skip
        bar.update()
        return answer

    runs = harness.race([*variants], args.rounds, run, lambda answer: answer["sums"])
    for some in runs.values():
        for answer in some:
            del answer["sums"]
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
            "tiny": str(path.with_name("tiny.safetensors")),
            "keys": keys,
            "in_file": [spec.name for spec in specs] if layout == "natural" else keys,
            "shapes": {spec.name: spec.shape for spec in specs},
        }
        write_checkpoint(Path(known["tiny"]), [TensorSpec("x", (2,))], lambda _: None)
        yield path, known


def rows(case: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """One for each variant but the first, which it is compared with."""
    seconds = {name: [run["seconds"] for run in some] for name, some in runs.items()}
    read = {
        name: stats.summarize([run["read_bytes"] for run in some]).median
        for name, some in runs.items()
    }
    base, *others = runs
    for name in others:
        yield case | {
            "variant": name,
            "seconds": seconds[name],
            "base": base,
            "base_seconds": seconds[base],
            "read_bytes": read[name],
            "base_read_bytes": read[base],
            **harness.ratio(seconds[name], seconds[base], "ratio"),
            "path": runs[name][0]["path"],
        }


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    read = (found["read_bytes"], found["base_read_bytes"])
    return (
        found["variant"], found["order"], found["how"], found["use"], found["cache"],
        found["memory"], str(found["kb"] or "as is"),
        *(harness.shown(found[key]) for key in ("base_seconds", "seconds")),
        with_spread(stats.Summary(found["ratio"], found["ratio_spread"]), 2),
        " / ".join(f"{nbytes / 1e6:.0f}" for nbytes in read) + " MB",
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
    made.add_argument("--access", action="store_true", help="compare reading one's own file with "
                      "another owner's, and without cachestat (needs root)")  # fmt: skip
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
        if args.access and os.geteuid() != 0:
            raise UsageError("--access: takes root, to become another user")
        for place in (path, path.parent):  # for another user
            place.chmod(0o755 if place.is_dir() else 0o644)
        environment = hardware.environment(path)
        nbytes = path.stat().st_size
        cases = list(product(args.cache, args.kb, args.order, args.how, args.use))
        bar = stack.enter_context(tqdm(total=len(cases) * len(args.memory) * args.rounds
                                       * len(ACCESS if args.access else VARIANTS),
                                       unit="run", disable=None, leave=False))  # fmt: skip
        for memory in args.memory:
            # Pages of the cache, and the copies.
            with reserve(memory, 2 * nbytes) as lender:
                for cache, kb, order, how, use in cases:
                    case = {"order": order, "how": how, "use": use, "cache": cache,
                            "memory": memory, "kb": kb}  # fmt: skip
                    bar.set_description(" ".join(map(str, case.values())))
                    with harness.read_ahead(path, kb):
                        runs = measure(args, known | case, cache, lender, bar)
                    for found in rows(case, runs):
                        results.append(found)
                        bar.write("  ".join(cells(found)))
    print(f"{nbytes / 1e9:.2f} GB, {len(known['keys'])} tensors; medians of {args.rounds} "
          f"alternating rounds in fresh processes, ± {stats.SPREAD}")  # fmt: skip
    print(f"base: {results[0]['base']}; storage: bytes read by it / by the base")
    left = {"what", "order", "how", "use", "path"}
    print("\n".join(grid([_HEADINGS, *map(cells, results)], left)))
    if args.json:
        write_json(args.json, {"environment": environment, "bytes": nbytes,
                               "layout": args.layout, "options": dict(args.options),
                               "results": results})  # fmt: skip
    return 0


if __name__ == "__main__":
    harness.script("walk", main, child)
