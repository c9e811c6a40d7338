"""Races stock against patched: fresh processes, alternating, in proven cache states."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import ceilings, residency, settle
from .ceilings import Ceiling
from .checkpoint_files import CheckpointFile
from .failures import BenchError
from .job import LoadJob, Sample, run_load
from .progress import Progress
from .residency import CacheState

LOADERS = ("stock", "patched")
TRIES = 5


@dataclass(frozen=True)
class Plan:
    """What to race, and for how long."""

    files: Sequence[CheckpointFile]
    device: str = "cpu"
    caches: Sequence[str] = ("cold", "warm")
    rounds: int = 5
    max_seconds: float = 240.0
    options: Mapping[str, object] = field(default_factory=dict)  # for patch()
    ceilings: bool = True  # measure them too

    @property
    def paths(self) -> tuple[str, ...]:
        """The files' absolute paths."""
        return tuple(file.path for file in self.files)

    @property
    def direct_wanted(self) -> bool:
        """Whether the options ask for O_DIRECT, whatever the cache state."""
        io, page_cache = self.options.get("io"), self.options.get("page_cache")
        return io in ("direct", "gds") or page_cache == "drop"


class Gate:
    """What a process finds when it is let through: a proven page cache, and memory.

    A context manager for the time in which it is timed. Both are made at the last moment, since
    pages that have been free for long may not be the machine's any more.
    """

    state: CacheState

    def __init__(self, cache: str, paths: Sequence[str], reserve: settle.Reserve) -> None:
        self._cache, self._paths = cache, paths
        small = cache == residency.SMALL_PAGES
        self._lending = reserve.lend((settle.SMALL,)) if small else reserve.lend()

    def __enter__(self) -> None:
        self.state = residency.prepare(self._cache, self._paths)
        self._lending.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._lending.__exit__(*exc)


@dataclass(frozen=True)
class Run:
    """One sample and the cache state it was prepared in."""

    sample: Sample
    prepared: CacheState

    @property
    def verified(self) -> bool | None:
        """By this process before the child started, and by the child before its clock did."""
        if self.sample.resident_before is None:
            return self.prepared.verified
        inside = residency.satisfies(self.prepared.cache, self.sample.resident_before)
        return residency.weakest([self.prepared.verified, inside])


@dataclass
class Outcome:
    """Everything measured so far."""

    plan: Plan
    runs: dict[tuple[str, str], list[Run]]  # by (cache, loader); one a round
    ceilings: list[Ceiling]
    rounds: int = 0

    @property
    def verified(self) -> bool | None:
        """Whether every run and ceiling found the cache as it should be."""
        verdicts = [run.verified for runs in self.runs.values() for run in runs]
        return residency.weakest(verdicts + [ceiling.verified for ceiling in self.ceilings])


def race(plan: Plan) -> Outcome:
    """Run all rounds, or as many as the time cap allows, at least one."""
    beside: dict[str, list[Ceiling]] = {cache: [] for cache in plan.caches}
    if plan.ceilings:
        beside = ceilings.plan(plan.caches, plan.device, plan.direct_wanted)
    runs: dict[tuple[str, str], list[Run]] = {
        (cache, loader): [] for cache in plan.caches for loader in LOADERS
    }
    outcome = Outcome(plan, runs, [one for group in beside.values() for one in group])
    steps = len(runs) + len(outcome.ceilings)
    begin, longest = time.monotonic(), 0.0
    with (
        Progress(plan.rounds, steps, plan.max_seconds) as bar,
        settle.reserve_for(plan.paths) as reserve,
    ):
        for number in range(plan.rounds):
            started = time.monotonic()
            if number and started - begin + longest > plan.max_seconds:
                break
            _round(outcome, number, beside, bar, reserve)
            outcome.rounds += 1
            longest = max(longest, time.monotonic() - started)
    return outcome


def _round(
    outcome: Outcome,
    number: int,
    beside: dict[str, list[Ceiling]],
    bar: Progress,
    reserve: settle.Reserve,
) -> None:
    # Whoever goes second finds the disk and the allocator as the first left them.
    order = LOADERS if number % 2 == 0 else LOADERS[::-1]
    for cache, measured_beside in beside.items():
        for loader in order:
            bar.step(f"round {number + 1}: {loader}, {cache}")
            run = _run(outcome.plan, loader, cache, reserve)
            outcome.runs[cache, loader].append(run)
            _require_equal(outcome, run.sample, loader, cache)
            bar.update()
        for ceiling in measured_beside:
            bar.step(f"round {number + 1}: {ceiling.name}")
            ceiling.measure(outcome.plan.paths, reserve)
            bar.update()


def _run(plan: Plan, loader: str, cache: str, reserve: settle.Reserve) -> Run:
    """Prepare the cache and load; again when something else took the cache out of that state.

    Kernels that reclaim idle pages, and other programs, do so between preparing and loading.
    The result of such a run is not looked at, so repeating it chooses nothing.
    """
    for _ in range(TRIES):
        run = _run_once(plan, loader, cache, reserve)
        if run.verified is not False:
            break
    return run


def _run_once(plan: Plan, loader: str, cache: str, reserve: settle.Reserve) -> Run:
    job = LoadJob(
        loader=loader,
        device=plan.device,
        paths=plan.paths,
        orders=tuple(file.order for file in plan.files),
        options=plan.options if loader == "patched" else {},
    )
    gate = Gate(cache, plan.paths, reserve)
    sample = run_load(job, gate)
    return Run(sample, gate.state)


def _require_equal(outcome: Outcome, sample: Sample, loader: str, cache: str) -> None:
    """Compare with what the first load of all gave. A fast wrong loader is worthless."""
    first_runs = (runs[0] for runs in outcome.runs.values() if runs)
    expected = next(first_runs).sample.digests
    pairs = zip(outcome.plan.files, expected, sample.digests, strict=True)
    unequal = [file.path for file, one, other in pairs if one != other]
    if unequal:
        raise BenchError(
            f"{', '.join(unequal)}: the {loader} loader ({cache} cache) gave tensors that "
            "differ from those loaded before (keys, dtypes, shapes, strides or bytes). Unless "
            "the file was changed meanwhile, this is a bug: please report it"
        )
