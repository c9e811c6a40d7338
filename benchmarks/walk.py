"""A file read name by name through `safe_open`, as engines and scripts do; against stock.

    python benchmarks/walk.py [--order NAME,…] [--how tensor,slice] [--use copy,touch]
                              [--cache cold,warm] [--memory STATE,…] [--kb KIB …] [--gb 1.2]
                              [--rounds 9] [--access] [--json FILE]

A process opens the file, takes one tensor after another in some order, and copies each into memory
that it has allocated (`copy`), or reads every byte (`touch`). The file is written layer by layer,
so that sorted names jump in it; free memory is in a state of its own (`_memory.py`). Every tensor's
bytes are compared with those of the first run. The clock runs from before the file is opened until
the last byte was read. `--kb` sets the disk's read-ahead, which needs root, and puts it back.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import math
import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import _scenario as scenario
from _memory import STATES, reserve
from tqdm import tqdm

from fastst_patch.bench import hardware, harness
from fastst_patch.bench.checkpoint import TensorSpec, transformer_specs
from fastst_patch.bench.failures import UsageError
from fastst_patch.bench.runner import LOADERS

THREADS = 4
NOBODY = 65534
ACCESS: dict[str, dict[str, Any]] = {
    "own file": {},
    "another's": {"nobody": True},
    "no cachestat": {"blind": True},
    "another's, no cachestat": {"nobody": True, "blind": True},
}
"""With --access: who reads whose file, and what the kernel tells of the cache; the first is what
the others are compared with."""
ORDERS = ("sorted", "file", "reversed", "random", "layer", "tenth", "handles", "threads")


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


def child(job: dict[str, Any], gate: Callable[..., None]) -> dict[str, Any]:
    import safetensors
    import torch

    from fastst_patch import engine
    from fastst_patch.bench.child import clock, patch_with, require_stock
    from fastst_patch.bench.device_use import read_bytes, touch

    if job["loader"] == "patched":
        patch_with(job["options"])
    else:
        require_stock()
    safe_open, path = safetensors.safe_open, job["path"]
    names = names_in(job["order"], job["keys"], job["in_file"])
    copies = {name: torch.empty(job["shapes"][name], dtype=torch.bfloat16) for name in names}

    sums: dict[str, int] = {}

    def take(handle: Any, name: str) -> None:
        found = handle.get_slice(name)[:] if job["how"] == "slice" else handle.get_tensor(name)
        if job["use"] == "copy":
            copies[name].copy_(found)
        else:
            sums[name] = touch(found)

    def as_another(**told: object) -> None:
        gate(**told)
        with safe_open(job["tiny"], "pt") as handle:  # the other user may not be able to import
            handle.get_tensor("x")
            codecs.lookup("ascii")
        if job.get("nobody"):
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        if job.get("blind"):
            engine.set_fault("cachestat", errno=errno.ENOSYS)

    with clock(job["loader"], [path], "cpu", as_another) as timed:
        read_before = read_bytes()
        _walk(job["order"], safe_open, path, names, take)
        timed.lap("walk")
        read = read_bytes() - read_before
    return {
        "seconds": timed.seconds["walk"],
        "read_bytes": read,
        "resident_before": timed.resident,
        "path": ", ".join(dict.fromkeys(one.path for one in timed.reports)) or "stock",
        "sums": sums or {name: touch(copy) for name, copy in copies.items()},
    }


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


# ---- rounds -------------------------------------------------------------


def measure(
    args: argparse.Namespace, job: dict[str, Any], cache: str, lender: Any, bar: tqdm
) -> dict[str, list[Any]]:
    def run(name: str) -> Any:
        loader = "patched" if args.access else name
        options = {} if loader == "stock" else dict(args.options)
        message = job | {"loader": loader, "options": options} | ACCESS.get(name, {})
        answer = scenario.in_cache(
            cache, [job["path"]],
            lambda gate: scenario.fresh(__file__, message, f"{name} walk", gate), lender,
        )  # fmt: skip
        bar.update()
        return answer

    runs = harness.race(contenders(args), args.rounds, run, lambda one: one.sums)
    for one in (one for some in runs.values() for one in some):
        del one.sums
    return runs


def contenders(args: argparse.Namespace) -> Sequence[str]:
    return tuple(ACCESS) if args.access else LOADERS


def written(folder: Path, gb: float) -> dict[str, Any]:
    """The file to walk, and what a process has to know of it."""
    specs = transformer_specs(int(gb * 1e9))
    path = scenario.write(folder / "model.safetensors", specs, as_given=True)
    tiny = scenario.write(folder / "tiny.safetensors", [TensorSpec("x", (2,))])
    for place in (folder, Path(path), Path(tiny)):  # for another user
        place.chmod(0o755 if place.is_dir() else 0o644)
    return {
        "path": path,
        "tiny": tiny,
        "keys": sorted(spec.name for spec in specs),
        "in_file": [spec.name for spec in specs],
        "shapes": {spec.name: spec.shape for spec in specs},
    }


def some_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = list(allowed) if text == "all" else text.split(",")
        unknown = [one for one in chosen if one not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: not among {', '.join(allowed)}")
        return chosen

    return parse


def parser() -> argparse.ArgumentParser:
    made = scenario.arguments(__doc__, "--dir", "-o", rounds=9)
    for name, allowed, default in (
        ("order", ORDERS, ["sorted"]),
        ("how", ("tensor", "slice"), ["tensor"]),
        ("use", ("copy", "touch"), ["copy"]),
        ("cache", ("cold", "warm"), ["cold"]),
        ("memory", STATES, ["lent"]),
    ):
        made.add_argument(f"--{name}", type=some_of(allowed), default=default,
                          help=f"{', '.join(allowed)}, or all ({', '.join(default)})")  # fmt: skip
    made.add_argument("--kb", type=int, nargs="+", default=[0], help="read-ahead; 0: as it is")
    made.add_argument("--access", action="store_true", help="compare reading one's own file with "
                      "another owner's, and without cachestat (needs root)")  # fmt: skip
    made.add_argument("--gb", type=float, default=1.2, help="size of the file (%(default)g)")
    return made


def cases(args: argparse.Namespace, path: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Everything to compare in, with who lends memory there."""
    # Pages of the cache, and the copies.
    nbytes = 2 * Path(path).stat().st_size
    for memory in args.memory:
        with reserve(memory, nbytes) as lender:
            for cache, kb, order, how, use in product(
                args.cache, args.kb, args.order, args.how, args.use
            ):
                with scenario.read_ahead(path, kb):
                    yield {"order": order, "how": how, "use": use, "cache": cache,
                           "memory": memory, "KiB": kb}, lender  # fmt: skip


def main() -> int:
    args = parser().parse_args()
    if args.access and os.geteuid() != 0:
        raise UsageError("--access: takes root, to become another user")
    base, seconds = contenders(args)[0], scenario.answer("seconds")
    table = scenario.Table(
        [scenario.Column("s", seconds), scenario.ratio(seconds, base),
         scenario.Column("MB from storage", scenario.answer("read_bytes"), 1e-6, 0)],
        facts=["order", "how", "use", "cache", "memory", "KiB"],
        text={"path": lambda some: some[0].path},
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        known = written(stack.enter_context(scenario.folder(args.dir)), args.gb)
        environment = hardware.environment(known["path"])
        nbytes = Path(known["path"]).stat().st_size
        several = (args.order, args.how, args.use, args.cache, args.kb, args.memory)
        runs = args.rounds * len(contenders(args)) * math.prod(map(len, several))
        bar = stack.enter_context(tqdm(total=runs, unit="run", disable=None, leave=False))
        for case, lender in cases(args, known["path"]):
            bar.set_description(" ".join(map(str, case.values())))
            table.add(measure(args, known | case, case["cache"], lender, bar), **case)
    title = f"{nbytes / 1e9:.2f} GB, {len(known['keys'])} tensors"
    return scenario.report(args, title, table, environment=environment, bytes=nbytes)


if __name__ == "__main__":
    scenario.script("walk", main, child)
