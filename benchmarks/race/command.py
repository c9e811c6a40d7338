"""`python -m benchmarks race` and `report`: from the arguments to the files."""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import ceilings
from fastst_patch import engine
from fastst_patch.bench import hardware
from fastst_patch.bench.checkpoint import pick_directory, temporary_folder
from fastst_patch.bench.failures import EXIT_FAILED, BenchError, UsageError
from fastst_patch.bench.process import ProcessFailedError

from . import charts, entrants, probes, process, report, results, runner, truth, whole, workloads
from .entrants import Entrants, Source, scrub
from .plan import COPY_START_S, LEAST_ROUNDS, SLOWEST_GB_PER_S, Planner, units
from .runner import Race, Written
from .screen import Screen
from .watch import DeviceWatch
from .workloads import Workload

CACHES = ("cold", "warm")
QUICK_MINUTES = {"cpu": 19.5, "cuda": 8.0}  # on the two cores of a small machine; on a GPU's time
LIMIT_S = {"quick": 60.0, "full": 900.0}  # for one load
MOST_AT_ONCE = 8  # processes that get ready
DEVICE_BYTES_EACH = 8_000_000_000  # of a device's memory, for each: every one has a context there
PAGE = "report.md"


# ---- race ---------------------------------------------------------------


def race(args: argparse.Namespace, source: Source | None = None) -> int:
    """Race as the command line says, write the results, print the tables.

    Raises:
        BenchError, UsageError: it cannot be done here.
    """
    charts.require_matplotlib()  # before minutes of measuring, not after
    _refuse_early(args)
    facts = ceilings.device_facts(args.device)
    out = Path(args.out).absolute()
    place = pick_directory(args.dir)
    screen = Screen()
    wheels = Path(args.wheels).absolute() if args.wheels else None
    who = entrants.assemble(source or Source(), args.device, args.loaders, wheels, screen.tell)
    if not who.running:
        reasons = "; ".join(f"{name}: {why}" for name, why in who.missing.items())
        raise UsageError(f"no loader can run here: {reasons}")
    suite, absent = _suite(args, place, facts)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error
    environment = hardware.environment(place) | probes.host_facts() | facts
    environment.pop("uuid", None)
    rest = _Rest(args, environment, absent)
    with temporary_folder(place) as folder:
        run = _plan(args, who, suite, folder, facts)
        try:
            with screen.bar():
                runner.race(run, screen, lambda: results.save(_found(run, rest), out))
        except KeyboardInterrupt:
            if (out / results.FILE_NAME).exists():
                screen.tell(f"What was measured until now: python -m benchmarks report {args.out}")
            raise
        if args.end_to_end:
            rest.end_to_end = _end_to_end(args, run, folder, screen)
    found = _found(run, rest)
    results.save(found, out)
    print(write_page([found], out))
    screen.tell(f"{time.monotonic() - run.began:.0f} s; written: {out}")
    return verdict(found)


def verdict(found: results.Found) -> int:
    """1 if our own loaders failed anywhere, or nobody has a result; what others do is theirs."""
    rows = results.rows(found)
    ours = [row for row in rows if row.family == "fastst"]
    bad = any(row.state in ("wrong", "crashed", "time limit") for row in ours)
    return EXIT_FAILED if bad or not any(row.total_s for row in rows) else 0


def _refuse_early(args: argparse.Namespace) -> None:
    reason = engine.native_error()
    if reason is not None:
        raise BenchError(
            f"the native extension, which touches the bytes of all loaders, cannot be used "
            f"({reason}): pip install '.[bench]'"
        )
    if args.rounds < 1:
        raise UsageError("--rounds: at least 1")
    if args.rounds < LEAST_ROUNDS:
        print(f"--rounds {args.rounds}: a rehearsal; nobody is ranked by fewer than "
              f"{LEAST_ROUNDS} rounds", file=sys.stderr)  # fmt: skip


def _suite(
    args: argparse.Namespace, place: Path, facts: dict[str, Any]
) -> tuple[list[Workload], dict[str, str]]:
    """The workloads asked for, and those that cannot be had here."""
    memory = min(hardware.memory_available(), facts.get("device_free", sys.maxsize))
    free = shutil.disk_usage(place).free
    suite = workloads.suite(args.suite, args.device, free, memory)
    absent = workloads.absent()
    if args.workloads is None:
        return suite, absent
    names = {workload.name for workload in suite}
    unknown = [name for name in args.workloads if name not in names | set(absent)]
    if unknown:
        raise UsageError(f"--workloads: {', '.join(unknown)}: not among {', '.join(sorted(names))}")
    chosen = [workload for workload in suite if workload.name in args.workloads]
    if not chosen:
        raise UsageError("; ".join(f"{name}: {absent[name]}" for name in args.workloads))
    return chosen, {name: why for name, why in absent.items() if name in args.workloads}


def _plan(
    args: argparse.Namespace,
    who: Entrants,
    suite: Sequence[Workload],
    folder: Path,
    facts: dict[str, Any],
) -> Race:
    minutes = args.minutes
    if minutes is None and args.suite == "quick":
        minutes = QUICK_MINUTES[args.device]
    raced = units(suite, who.running, CACHES, again=args.suite == "full")
    budget_s = None if minutes is None else 60 * minutes
    reserved_s = whole.RESERVED_S[args.suite, args.device] if args.end_to_end else 0.0
    planner = Planner(raced, budget_s, args.rounds, reserved_s)
    planner.slowest = SLOWEST_GB_PER_S[args.device]
    copied = args.device == "cpu" and not args.afresh
    if copied:
        planner.start_s = COPY_START_S
    return Race(
        entrants=who,
        device=args.device,
        workloads=suite,
        provide=lambda workload: provide(workload, folder, who),
        planner=planner,
        seed=random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed,
        limit_s=LIMIT_S[args.suite],
        at_once=_at_once(facts),
        watch=DeviceWatch(facts.get("uuid")),
        copied=copied,
    )


def _at_once(facts: dict[str, Any]) -> int:
    """How many processes get ready together: one a core, and not all of a device's memory."""
    fitting = facts.get("device_memory", sys.maxsize) // DEVICE_BYTES_EACH
    return int(max(1, min(hardware.cpu_count(), MOST_AT_ONCE, fitting)))


@contextlib.contextmanager
def provide(workload: Workload, place: Path, who: Entrants) -> Iterator[Written]:
    """Write a workload's files, find the truth about them, and remove them afterwards."""
    folder = place / workload.name
    bar = tqdm(total=workload.nbytes, unit="B", unit_scale=True, disable=None, leave=False,
               desc=f"writing {workload.name}")  # fmt: skip
    try:
        with bar:
            files = [str(path) for path in workloads.write(workload, folder, bar.update)]
        dtypes, path = truth.dtypes(files), folder / "truth.json"
        refusals = {loader.name: loader.refuses(dtypes) for loader in who.running}
        refused = {name: scrub(reason) for name, reason in refusals.items() if reason}
        truth.write(truth.of(files), path)
        for loader in who.running:
            if loader.name not in refused and loader.reads(files) != files:
                reason = _make(loader.name, who, files)
                refused |= {loader.name: reason} if reason else {}
        yield Written(tuple(files), str(path), refused)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make(name: str, who: Entrants, files: Sequence[str]) -> str | None:
    """Have a loader write what it reads instead of the files; say why, if it cannot."""
    message = {"kind": "make", "module": who.source.module, "folder": who.source.folder,
               "loader": name, "files": list(files)}  # fmt: skip
    try:
        process.ask(message, seconds=1800.0)
    except ProcessFailedError as failed:
        return f"its own files could not be written: {scrub(str(failed))}"
    return None


# ---- results ------------------------------------------------------------


@dataclass
class _Rest:
    """What results.json holds beside the race itself."""

    args: argparse.Namespace
    environment: dict[str, Any]
    absent: dict[str, str]
    end_to_end: dict[str, Any] | None = None


def _found(run: Race, rest: _Rest) -> results.Found:
    args, who = rest.args, run.entrants
    return {
        "schema": results.SCHEMA,
        "suite": args.suite,
        "device": run.device,
        "seed": run.seed,
        "seconds": round(run.elapsed_s, 1),
        "rounds": {"asked": run.planner.rounds},
        "limit_s": run.limit_s,
        "started_together": run.at_once,
        "copied": run.copied,
        "environment": rest.environment,
        "loaders": [
            {
                "name": loader.name,
                "family": loader.family,
                "package": loader.package,
                "version": _version(loader),
                "environment": loader.environment,
                "note": loader.note,
            }
            for loader in who.everyone
        ],
        "missing": who.missing,
        "workloads": [
            {
                name: getattr(workload, name)
                for name in ("name", "description", "files", "tensors", "nbytes", "scaled", "dtype",
                             "source")
            }
            for workload in run.workloads
        ],
        "absent": rest.absent,
        "refused": run.refused,
        "dropped": run.planner.dropped,
        "orders": run.orders,
        "ceilings": [one for name, board in run.boards.items() for one in board.to_json(name)],
        "runs": run.runs,
        "end_to_end": rest.end_to_end,
    }  # fmt: skip


def _version(loader: Any) -> str | None:
    """The version found from here; that of a side environment is part of its name."""
    if loader.environment is not None:
        return str(loader.environment).partition("==")[2] or None
    return hardware.version(loader.package) if loader.package else None


def write_page(sections: Sequence[results.Found], out: Path) -> str:
    """Write the Markdown page, its charts, and the summary of a single section; return the text."""
    sections = [results.summarize(found) for found in sections]
    drawn = [charts.draw(found, out, _suffix(sections, number))
             for number, found in enumerate(sections)]  # fmt: skip
    page = report.markdown(sections, drawn)
    if len(sections) == 1:
        results.save_summary(sections[0], out)
    try:
        (out / PAGE).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out / PAGE}: cannot write: {error.strerror}") from error
    return page


def _suffix(sections: Sequence[results.Found], number: int) -> str:
    return f"-{number + 1}" if len(sections) > 1 else ""


def _end_to_end(
    args: argparse.Namespace, run: Race, place: Path, screen: Screen
) -> dict[str, Any] | None:
    screen.tell("End to end: transformers and diffusers.")
    left_s = None
    if run.planner.budget_s is not None:
        reserved_s = whole.RESERVED_S[args.suite, args.device]
        left_s = max(run.planner.budget_s - run.elapsed_s, reserved_s / 2)
    return whole.measure(args.device, args.suite, place, args.rounds, left_s)


# ---- report -------------------------------------------------------------


def redraw(args: argparse.Namespace) -> int:
    """Draw results again, and shrink them; several together where they were measured alike.

    Where all of several were, what was put together is written, too.

    Raises:
        UsageError: a folder holds none.
    """
    charts.require_matplotlib()
    several = [results.read(Path(folder)) for folder in args.folders]
    first = Path(args.folders[0])
    out = Path(args.out or (first if first.is_dir() else first.parent)).absolute()
    if not args.out and len(args.folders) > 1:
        raise UsageError("report: several results are drawn together: say where, with --out DIR")
    out.mkdir(parents=True, exist_ok=True)
    merged = results.merge(several)
    if len(several) > 1 and len(merged) == 1:
        results.save(merged[0], out)
    print(write_page(merged, out))
    return 0
