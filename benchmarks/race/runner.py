"""The rounds: random order, fresh processes, proven cache states; whoever fails is listed."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.ceilings import Board, board
from fastst_patch.bench import residency, settle
from fastst_patch.bench.failures import BenchError
from fastst_patch.bench.process import Child, ProcessFailedError

from . import process
from .entrants import Entrants, scrub
from .plan import Cell, Planner
from .process import Starters
from .screen import Screen
from .watch import DeviceWatch

if TYPE_CHECKING:
    from .workloads import Workload

TRIES = 4
LEAST_FOR_CEILINGS = 200_000_000  # bytes; less is over before threads have started


@dataclass(frozen=True)
class Written:
    """A workload's files, and what they hold."""

    files: tuple[str, ...]
    truth: str  # see truth.write
    refused: dict[str, str] = field(default_factory=dict)  # loader -> why it cannot take it


Provide = Callable[["Workload"], contextlib.AbstractContextManager[Written]]


@dataclass
class Race:
    """What is raced, by whom, how often; and everything measured so far.

    ``provide`` writes a workload's files, which exist as long as its context.
    """

    entrants: Entrants
    device: str
    workloads: Sequence[Workload]
    provide: Provide
    planner: Planner
    seed: int
    limit_s: float  # for one load
    at_once: int  # processes that get ready together; they are timed one at a time
    watch: DeviceWatch
    reserve: settle.Reserve = field(default_factory=lambda: settle.Reserve(0))
    ceilings: bool = True  # measure them, too
    copied: bool = False  # loads after the first round are by copies of one process
    began: float = field(default_factory=time.monotonic)
    runs: list[dict[str, Any]] = field(default_factory=list)
    orders: list[dict[str, Any]] = field(default_factory=list)
    boards: dict[str, Board] = field(default_factory=dict)  # by workload
    refused: list[dict[str, str]] = field(default_factory=list)
    out: dict[tuple[Cell, str], str] = field(default_factory=dict)  # (cell, loader) -> why

    @property
    def elapsed_s(self) -> float:
        """Seconds since everything began, writing the files included."""
        return time.monotonic() - self.began


Step = tuple[str, Any]  # ("load", name of a loader) or ("ceiling", one of Board.steps)


def race(run: Race, shown: Screen, save: Callable[[], None] = lambda: None) -> None:
    """Run everything; ``save`` is called after each round, so that an interruption loses little."""
    chance = random.Random(run.seed)
    for workload in run.workloads:
        run.planner.fit(run.elapsed_s)
        run.planner.passed.add(workload.name)
        if run.planner.of(workload.name):
            _workload(run, workload, chance, shown, save)


def _workload(
    run: Race, workload: Workload, chance: random.Random, shown: Screen, save: Callable[[], None]
) -> None:
    planner, begin = run.planner, time.monotonic()
    shown.doing(f"writing {workload.name}")
    with run.provide(workload) as written:
        planner.write_s = (time.monotonic() - begin) / max(workload.nbytes, 1)
        for name, reason in written.refused.items():
            run.refused.append({"workload": workload.name, "loader": name, "reason": reason})
        if run.ceilings and (workload.nbytes >= LEAST_FOR_CEILINGS or not run.boards):
            caches = dict.fromkeys(unit.cell.cache for unit in planner.units)
            run.boards[workload.name] = board(run.device, list(caches), written.files)
        with settle.reserve_for(written.files) as run.reserve:
            for number in range(1, planner.rounds + 1):
                shown.estimate(planner)
                _round(run, workload.name, written, number, chance=chance, shown=shown)
                planner.fit(run.elapsed_s)
                if number == 1 and not _others_began(run, workload.name):
                    _tell_plan(run, shown)
                save()


def _others_began(run: Race, name: str) -> bool:
    return any(one["workload"] != name for one in run.orders)


def _round(
    run: Race,
    name: str,
    written: Written,
    number: int,
    *,
    chance: random.Random,
    shown: Screen,
) -> None:
    planner = run.planner
    cells = planner.cells(name)
    chance.shuffle(cells)
    seen: set[str] = set()
    beside_s = 0.0
    for cell, units in cells:
        names = [loader for unit in units for loader in unit.loaders]
        again = {loader for unit in units if unit.again for loader in unit.loaders}
        # Once, so that imports are timed, too.
        afresh = number == 1 and not _others_began(run, name)
        turns = _Turns(cell, names, again, number, _ceilings(run, cell, seen), afresh)
        loading_s, measuring_s = _cell(run, written, turns, chance, shown)
        planner.took(cell, loading_s)
        beside_s += measuring_s
    if beside_s:
        planner.beside_s = beside_s


def _tell_plan(run: Race, shown: Screen) -> None:
    seconds, planner = run.planner.left_s(), run.planner
    cells = {unit.cell for unit in planner.units}
    shown.tell(
        f"After the first round ({run.elapsed_s / 60:.1f} min): about {seconds / 60:.1f} min more "
        f"for {planner.rounds} rounds of {len(cells)} cells in all."
    )
    for unit, why in planner.dropped.items():
        cell, _, loaders = unit.partition(": ")
        shown.tell(f"  {cell}, {len(loaders.split(', '))} loaders: {why}")


def _ceilings(run: Race, cell: Cell, seen: set[str]) -> list[Any]:
    """The ceilings measured beside this cell: in each round once for a state of the cache."""
    here = run.boards.get(cell.workload)
    if here is None:
        return []
    steps = here.steps(cell.cache, not seen)
    seen.add(cell.cache)
    return steps


@dataclass(frozen=True)
class _Turns:
    """What is done in one cell in one round."""

    cell: Cell
    loaders: Sequence[str]
    again: set[str]
    round: int
    ceilings: Sequence[Any]
    afresh: bool  # every process imports torch itself


def _cell(
    run: Race, written: Written, turns: _Turns, chance: random.Random, shown: Screen
) -> tuple[float, float]:
    """Let everybody load once, the ceilings among them, in a random order that is noted.

    Returns the seconds that the loads took, and those of a later round's ceilings.
    """
    cell, number = turns.cell, turns.round
    out = {loader for where, loader in run.out if where == cell} | set(written.refused)
    steps: list[Step] = [("load", name) for name in turns.loaders if name not in out]
    steps += [("ceiling", one) for one in turns.ceilings]
    chance.shuffle(steps)
    order = [what if kind == "load" else what.name for kind, what in steps]
    run.orders.append({"round": number, "workload": cell.workload, "cache": cell.cache,
                       "order": order})  # fmt: skip
    racing = [what for kind, what in steps if kind == "load"]
    begin, measuring, later = time.monotonic(), 0.0, 0.0
    copied, seen = run.copied and not turns.afresh, len(run.runs)
    waiting = [name for name in racing for _ in range(2 if name in turns.again else 1)]
    with Starters(lambda name: _start(run, written, name, copied), waiting, run.at_once) as ready:
        for turn, (kind, what) in enumerate(steps):
            if kind == "ceiling":
                shown.doing(f"round {number}: {what.name}")
                # Of the variants that are tried, later rounds measure one.
                variants = len(getattr(what, "variants", ())) or 1
                seconds = _measure_ceiling(what, run.boards[cell.workload].files, run.reserve)
                measuring, later = measuring + seconds, later + seconds / variants
                continue
            shown.doing(f"round {number}: {cell}: {what}")
            record = {"workload": cell.workload, "cache": cell.cache, "round": number,
                      "turn": turn, "loader": what}  # fmt: skip
            _load_and_again(run, written, ready, record, what in turns.again)
            ready.forget(what)
            shown.step(2 if what in turns.again else 1)
    loading = time.monotonic() - begin - measuring
    return loading - (_importing(run, seen) if turns.afresh else 0.0), later


def _importing(run: Race, seen: int) -> float:
    """Seconds of the loads after the first `seen` that loads by copies will not take."""
    if not run.copied:
        return 0.0
    samples = [one["sample"] for one in run.runs[seen:] if one["sample"]]
    return sum(sample["import_s"] or 0.0 for sample in samples) / run.at_once


def _measure_ceiling(step: Any, files: Sequence[str], reserve: settle.Reserve) -> float:
    begin = time.monotonic()
    try:
        step.measure(files, reserve)
    except BenchError as error:  # no reason to end the race
        step.unavailable = str(error)
    return time.monotonic() - begin


# ---- one load -----------------------------------------------------------


def _start(run: Race, written: Written, name: str, copied: bool) -> Child:
    loader, source = run.entrants.running_by_name[name], run.entrants.source
    message = {
        "kind": "load",
        "loader": name,
        "module": source.module,
        "folder": source.folder,
        "device": run.device,
        "files": written.files,
        "read": loader.reads(list(written.files)),
        "truth": written.truth,
    }
    return process.begin(message, run.entrants.environment_of(loader), copied=copied)


def _load_and_again(
    run: Race, written: Written, ready: Starters, record: dict[str, Any], again: bool
) -> None:
    """Load; where asked for, once more in a new process with the cache as the first left it."""
    name, cache = record["loader"], record["cache"]
    found = _proven(run, written, ready, name, cache)
    run.runs.append(record | {"again": False} | found)
    if again and found["outcome"] == "ok":
        second = _once(run, written, ready, name, None)
        run.runs.append(record | {"again": True} | second)
        found = second if second["outcome"] in ("crashed", "time limit", "wrong") else found
    if found["outcome"] in ("crashed", "time limit", "wrong"):
        cell = Cell(record["workload"], cache)
        run.out[cell, name] = f"{found['outcome']} in round {record['round']}: {found['detail']}"


def _proven(run: Race, written: Written, ready: Starters, name: str, cache: str) -> dict[str, Any]:
    """Load from a proven state; again when something else took the cache out of it.

    Kernels that reclaim idle pages, and other programs, do so between preparing and loading.
    The result of such a run is not looked at, so repeating it chooses nothing.
    """
    for tries in range(1, TRIES + 1):
        found = _once(run, written, ready, name, cache) | {"tries": tries}
        if found["outcome"] != "cache":
            break
    return found


def _once(
    run: Race, written: Written, ready: Starters, name: str, cache: str | None
) -> dict[str, Any]:
    files = run.entrants.running_by_name[name].reads(list(written.files))
    try:
        with ready.take(name) as child:
            started = child.wait_ready(process.READY_S)
            state = residency.prepare(cache, files) if cache else None
            with run.reserve.lend(), run.watch.peak() as risen:
                sample = started | child.go(run.limit_s)
    except ProcessFailedError as failed:
        return {"outcome": failed.outcome, "detail": scrub(failed.detail), "sample": None}
    sample["device_peak"] = risen[0] if risen else None
    left, _ = residency.resident_fraction(files)
    return judge(cache, state, sample) | {"sample": sample, "resident_after": left}


def judge(
    cache: str | None, state: residency.CacheState | None, sample: dict[str, Any]
) -> dict[str, Any]:
    """Say what a run is worth: "wrong" bytes, a wrong state of the page "cache", or "ok"."""
    if sample["wrong"]:
        more = sample["wrong_count"] - len(sample["wrong"])
        detail = "; ".join(sample["wrong"]) + (f"; and {more} more" if more else "")
        return {"outcome": "wrong", "detail": detail, "verified": None}
    path = sample.get("path")
    if path is not None and not any(
        count for way, count in path["bytes"].items() if way != "stock"
    ):
        reasons = "; ".join(path["fallbacks"]) or "patch() had no effect"
        detail = f"stock did it, which is no result under our name: {reasons}"
        return {"outcome": "crashed", "detail": detail, "verified": None}
    if cache is None or state is None:
        return {"outcome": "ok", "detail": None, "verified": None}
    inside = sample["resident_before"]
    verdict = residency.verdict(state, inside)
    if verdict is False:
        seen = state.fraction if inside is None else inside
        detail = f"to be {cache}, but {seen:.1%} of the bytes were in the page cache"
        return {"outcome": "cache", "detail": detail, "verified": False}
    return {"outcome": "ok", "detail": None, "verified": verdict}
