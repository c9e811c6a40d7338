"""What the scripts in this folder share: the command line, processes, the table and the JSON.

A scenario names its contenders and its columns, and says what a child does; turns, memory, the page
cache and the comparison of bytes are `fastst_patch.bench.harness`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import operator
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastst_patch.bench import guarded, hardware, harness, settle, stats, write_json
from fastst_patch.bench.checkpoint import (
    TensorSpec,
    pick_directory,
    temporary_folder,
    write_checkpoint,
)
from fastst_patch.bench.checkpoint_files import CheckpointFile
from fastst_patch.bench.failures import UsageError
from fastst_patch.bench.job import LoadJob, Sample, run_load
from fastst_patch.bench.process import Gate, end_with_parent, run_json, serve
from fastst_patch.bench.table import with_spread
from fastst_patch.cli.main import option
from fastst_patch.report_table import grid

Act = Callable[..., Mapping[str, object]]  # (message, gate): see process.serve

# ---- the command --------------------------------------------------------


def arguments(text: str, *names: str, rounds: int | None = 7) -> argparse.ArgumentParser:
    """A parser with `--json`, the usual options that are named, and `--rounds` unless None."""
    usual: dict[str, dict[str, Any]] = {
        "--device": {"default": "cpu", "help": "cpu or cuda[:N]"},
        "--dir": {"help": "where to write the files"},
        "-o": {"action": "append", "type": option, "default": [], "dest": "options",
               "metavar": "NAME=VALUE", "help": "an option for patch(); repeatable"},
    }  # fmt: skip
    made = argparse.ArgumentParser(description=text.splitlines()[0])
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--json", metavar="FILE")
    for name in names:
        made.add_argument(name, *(["--option"] if name == "-o" else []), **usual[name])
    return made


def script(name: str, main: Callable[[], int], child: Act | None = None) -> None:
    """Run a script, or with `--child` answer one JSON message; ends the process."""
    if child is not None and sys.argv[1:] == ["--child"]:
        end_with_parent()
        serve(child)
        sys.exit(0)
    sys.exit(guarded(name, main))


def folder(directory: str | None) -> contextlib.AbstractContextManager[Path]:
    """A folder on a disk; it is removed afterwards."""
    return temporary_folder(pick_directory(directory))


def write(path: Path, specs: Sequence[TensorSpec], **how: bool) -> str:
    """Write a checkpoint; return its path."""
    write_checkpoint(path, specs, lambda _: None, **how)
    return str(path)


def installed(*packages: str) -> list[str]:
    """Those that can be imported; the others are named on stderr."""
    found = [one for one in packages if importlib.util.find_spec(one) is not None]
    for name in packages:
        if name not in found:
            print(f"{name} cannot be imported here: left out", file=sys.stderr)
    return found


def from_tests(name: str) -> Any:
    """A module of tests/support.

    Raises:
        UsageError: this is no checkout, or the module needs a package that is not installed.
    """
    folder = str(Path(__file__).resolve().parent.parent / "tests" / "support")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"needs the checkout with its tests ({error})") from error
    finally:
        sys.path.remove(folder)


# ---- processes ----------------------------------------------------------


def fresh(script_file: str, message: Mapping[str, Any], label: str, gate: Gate | None = None
          ) -> SimpleNamespace:  # fmt: skip
    """Ask the child of a script, in a process of its own."""
    asked = [str(Path(script_file).absolute()), "--child"]
    return SimpleNamespace(**run_json(asked, message, label, gate))


def load(
    name: str,
    files: Sequence[CheckpointFile],
    device: str = "cpu",
    options: Mapping[str, object] | None = None,
    gate: Gate | None = None,
    **how: bool,
) -> Sample:
    """One load of files in a process of its own: by "stock", else patched with the options."""
    paths, orders = (file.path for file in files), (file.order for file in files)
    loader, given = ("stock", {}) if name == "stock" else ("patched", options or {})
    return run_load(LoadJob(loader, device, tuple(paths), tuple(orders), given, **how), gate)


def in_cache(
    cache: str, paths: Sequence[str], run: Callable[[Gate], Any], lender: Any = None
) -> Any:
    """Run once with the page cache proven in a state, and memory lent."""
    if lender is not None:
        return harness.proven(cache, paths, lender, run).sample
    with settle.reserve_for(paths) as reserve:
        return harness.proven(cache, paths, reserve, run).sample


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def median_of_calls(call: Callable[[], object], count: int) -> float:
    """Median seconds of so many calls."""
    return statistics.median(timed(call) for _ in range(count))


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


# ---- the table and the JSON ---------------------------------------------


@dataclass(frozen=True)
class Column:
    """One number of an answer, over all rounds.

    The text is a median with its spread; with ``base`` the median of the rounds' own ratios to
    that contender, and nothing where it did not run.
    """

    heading: str
    of: Callable[[Any], float | None]
    scale: float = 1.0
    decimals: int | None = None
    base: str | None = None

    def summary(self, runs: Mapping[str, Sequence[Any]], name: str) -> stats.Summary | None:
        """Of one contender; None where an answer has no such number."""
        values = self._values(runs[name])
        if self.base is None:
            return stats.summarize(values) if values else None
        base = self._values(runs.get(self.base, ()))
        return stats.paired_ratio(values, base) if values and base else None

    def _values(self, answers: Sequence[Any]) -> list[float] | None:
        found = [self.of(one) for one in answers]
        return None if None in found else [self.scale * one for one in found]

    def shown(self, runs: Mapping[str, Sequence[Any]], name: str) -> str:
        """The text of a cell."""
        found = self.summary(runs, name)
        decimals = 2 if self.base and self.decimals is None else self.decimals
        return "-" if found is None else with_spread(found, decimals)


def answer(name: str) -> Callable[[Any], float]:
    """What a column takes from an answer: its field of that name."""
    return operator.attrgetter(name) if name.isidentifier() else lambda one: vars(one)[name]


def ratio(of: Callable[[Any], float], base: str, decimals: int = 2, name: str = "") -> Column:
    """The column of ratios to a contender; ``name`` tells several of them apart."""
    return Column(f"{name} / {base}".lstrip(), of, 1.0, decimals, base)


@dataclass
class Table:
    """Rows of contenders under the same columns, for the terminal and as JSON.

    Args:
        columns: of numbers.
        facts: headings of text columns before the contender's name; `add` gets their values, and
            others for the JSON alone.
        text: headings of text columns after the numbers, and what makes each from a row's answers.
    """

    columns: Sequence[Column]
    facts: Sequence[str] = ()
    text: Mapping[str, Callable[[Sequence[Any]], str]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    cells: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, runs: Mapping[str, Sequence[Any]], **facts: object) -> None:
        """Add a row for each contender."""
        for name, answers in runs.items():
            numbers = {one.heading: one.summary(runs, name) for one in self.columns}
            told = {heading: make(answers) for heading, make in self.text.items()}
            self.rows.append(
                {**facts, "contender": name, **told}
                | {heading: one and asdict(one) for heading, one in numbers.items()}
                | {"runs": [_plain(one) for one in answers]}
            )
            shown = (one.shown(runs, name) for one in self.columns)
            known = (str(facts[heading]) for heading in self.facts)
            self.cells.append((*known, name, *shown, *told.values()))

    def render(self) -> str:
        """The text of the table."""
        headings = (*self.facts, "contender", *(one.heading for one in self.columns), *self.text)
        return "\n".join(grid([headings, *self.cells], {*self.facts, "contender", *self.text}))


def _plain(answer: Any) -> Any:
    return vars(answer) if isinstance(answer, SimpleNamespace) else asdict(answer)


def report(args: argparse.Namespace, title: str, table: Table, **facts: object) -> int:
    """Print a title and the table, and write the JSON file that was asked for."""
    print(f"{title}; medians of {args.rounds} alternating rounds in fresh processes, "
          f"± {stats.SPREAD}")  # fmt: skip
    print(table.render())
    if args.json:
        write_json(args.json, {**facts, "rounds": args.rounds,
                               "options": dict(getattr(args, "options", ())),
                               "results": table.rows})  # fmt: skip
    return 0
