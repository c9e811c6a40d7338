"""The harness of the scripts in this folder: a scenario says what runs, and this runs it.

Contenders take turns in fresh processes; before each the page cache is put into a proven state and
memory is lent; what every run answered is compared; medians and paired ratios make the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastst_patch.bench import guarded, hardware, residency, stats
from fastst_patch.bench.checkpoint_files import CheckpointFile
from fastst_patch.bench.failures import BenchError, UsageError
from fastst_patch.bench.job import LoadJob, Sample, run_json, run_load
from fastst_patch.bench.runner import TRIES, Gate
from fastst_patch.bench.table import with_spread
from fastst_patch.cli.main import option

Answer = TypeVar("Answer")
Ask = Callable[[dict[str, Any]], dict[str, Any]]


# ---- the command --------------------------------------------------------


def arguments(
    text: str, *names: str, rounds: int = 7, folder: str | None = None
) -> argparse.ArgumentParser:
    """A parser with `--rounds`, `--json` and those of the usual options that are named."""
    usual: dict[str, dict[str, Any]] = {
        "--device": {"default": "cpu", "help": "cpu or cuda[:N]"},
        "--dir": {"help": folder or "where to write the files"},
    }
    made = argparse.ArgumentParser(description=text.splitlines()[0])
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--json", metavar="FILE")
    for name in names:
        if name == "-o":
            made.add_argument("-o", "--option", type=option, action="append", default=[],
                              dest="options", metavar="NAME=VALUE",
                              help="an option for patch(); repeatable")  # fmt: skip
        else:
            made.add_argument(name, **usual[name])
    return made


def script(name: str, main: Callable[[], int], child: Ask | None = None) -> None:
    """Run a script, or with `--child` answer one JSON message; ends the process."""
    if child is not None and sys.argv[1:] == ["--child"]:
        print(json.dumps(child(json.loads(sys.stdin.readline()))), flush=True)
        sys.exit(0)
    sys.exit(guarded(name, main))


def fresh(script_file: str, message: Mapping[str, Any], label: str, gate: Gate | None = None
          ) -> dict[str, Any]:  # fmt: skip
    """Ask the child of a script, in a process of its own."""
    return run_json([str(Path(script_file).absolute()), "--child"], message, label, gate)


def load(
    name: str,
    files: Sequence[CheckpointFile],
    device: str = "cpu",
    options: Mapping[str, object] | None = None,
    **how: bool,
) -> Sample:
    """One load of files in a process of its own: by "stock", else patched with the options."""
    paths, orders = (file.path for file in files), (file.order for file in files)
    loader, given = ("stock", {}) if name == "stock" else ("patched", options or {})
    return run_load(LoadJob(loader, device, tuple(paths), tuple(orders), given, **how))


# ---- rounds -------------------------------------------------------------


def order(names: Sequence[str], number: int) -> list[str]:
    """Those of a round. Each begins with another: the next finds the disk as that left it."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def race(
    names: Sequence[str],
    rounds: int,
    run: Callable[[str], Answer],
    proof: Callable[[Answer], Any] | None = None,
    seconds: float = math.inf,
) -> dict[str, list[Answer]]:
    """What each answered, by round.

    Args:
        names: of the contenders.
        rounds: how often each of them runs.
        run: runs one of them.
        proof: what of an answer has to be the same in every run.
        seconds: no round but the first begins that would end later, as the longest tells.

    Raises:
        BenchError: a proof differs from the first. A fast wrong loader is worthless.
    """
    found: dict[str, list[Answer]] = {name: [] for name in names}
    first: list[Any] = []
    begin, longest = time.monotonic(), 0.0
    for number in range(rounds):
        started = time.monotonic()
        if number and started - begin + longest > seconds:
            break
        for name in order(names, number):
            answer = run(name)
            if proof is not None:
                first = first or [proof(answer)]
                if proof(answer) != first[0]:
                    raise BenchError(
                        f"the {name} run gave tensors that differ from those of the first run. "
                        "Unless the files were changed meanwhile, this is a bug: please report it"
                    )
            found[name].append(answer)
        longest = max(longest, time.monotonic() - started)
    return found


def prepared(cache: str, paths: Sequence[str]) -> None:
    """Put files into a state of the page cache.

    Raises:
        BenchError: the kernel says that they are not in it.
    """
    state = residency.prepare(cache, paths)
    if state.verified is False:
        raise BenchError(f"{', '.join(map(str, paths))}: to be {cache}, but {state.fraction:.1%} "
                         "of the bytes are in the page cache; too little memory?")  # fmt: skip


def proven(
    cache: str,
    paths: Sequence[str],
    lender: Any,
    run: Callable[[Gate], Answer],
    resident: Callable[[Answer], float | None],
) -> tuple[Answer, Gate]:
    """Run once behind a gate; again where something else took the cache out of its state.

    The result of such a run is not looked at, so repeating it chooses nothing.

    Raises:
        BenchError: it never was in the state.
    """
    for _ in range(TRIES):
        gate = Gate(cache, paths, lender)
        answer = run(gate)
        inside = resident(answer)
        found = None if inside is None else residency.satisfies(cache, inside)
        if residency.weakest([gate.state.verified, found]) is not False:
            return answer, gate
    seen = [one for one in (gate.state.fraction, inside) if one is not None]
    raise BenchError(
        f"the files were to be {cache} in the page cache, and they were "
        + " and then ".join(f"{one:.1%}" for one in seen)
        + " cached; is another program using them, or is memory short?"
    )


@contextlib.contextmanager
def read_ahead(place: str | Path, kib: int | None) -> Iterator[None]:
    """Set the read-ahead of the disk that holds `place`, and put it back whatever happens.

    Args:
        place: a file or a folder.
        kib: the setting; None or 0 leaves it as it is.

    Raises:
        UsageError: there is none, or it takes a right that is lacking.
    """
    if not kib:
        yield
        return
    setting = hardware.read_ahead_file(place)
    if setting is None:
        raise UsageError(f"{place}: its file system has no read-ahead setting")
    try:
        before = setting.read_text(encoding="ascii")
        setting.write_text(f"{kib}\n", encoding="ascii")
    except OSError as error:
        raise UsageError(
            f"{setting}: {error.strerror}; the read-ahead takes root, outside containers"
        ) from error
    try:
        yield
    finally:
        setting.write_text(before, encoding="ascii")


# ---- numbers ------------------------------------------------------------


def ratio(values: Sequence[float], bases: Sequence[float], name: str) -> dict[str, Any]:
    """The median of the rounds' own ratios and its spread, as JSON."""
    found = stats.paired_ratio(values, bases)
    return {name: found.median, f"{name}_spread": found.spread}


def shown(values: Sequence[float], scale: float = 1.0, decimals: int | None = None) -> str:
    """Median and spread of values, each times the scale."""
    return with_spread(stats.summarize([scale * value for value in values]), decimals)


def shown_ratio(values: Sequence[float], bases: Sequence[float], decimals: int = 2) -> str:
    """Median and spread of paired ratios."""
    return with_spread(stats.paired_ratio(values, bases), decimals)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def median_of_calls(call: Callable[[], object], count: int) -> float:
    """Median seconds of so many calls."""
    return statistics.median(timed(call) for _ in range(count))
