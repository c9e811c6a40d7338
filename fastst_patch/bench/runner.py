"""Races stock against patched: fresh processes, alternating, in proven cache states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import ceilings, harness, residency, settle
from .ceilings import Ceiling
from .checkpoint_files import CheckpointFile
from .failures import BenchError
from .harness import Run
from .job import LoadJob, Sample, run_load
from .progress import Progress

LOADERS = ("stock", "patched")


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


@dataclass
class Outcome:
    """Everything measured so far."""

    plan: Plan
    runs: dict[tuple[str, str], list[Run[Sample]]]  # by (cache, loader); one a round
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
    runs: dict[tuple[str, str], list[Run[Sample]]] = {
        (cache, loader): [] for cache in plan.caches for loader in LOADERS
    }
    outcome = Outcome(plan, runs, [one for group in beside.values() for one in group])
    steps = len(runs) + len(outcome.ceilings)
    with (
        Progress(plan.rounds, steps, plan.max_seconds) as bar,
        settle.reserve_for(plan.paths) as reserve,
    ):
        for number in harness.rounds(plan.rounds, plan.max_seconds):
            _round(outcome, number, beside, bar, reserve)
            outcome.rounds += 1
    return outcome


def _round(
    outcome: Outcome,
    number: int,
    beside: dict[str, list[Ceiling]],
    bar: Progress,
    reserve: settle.Reserve,
) -> None:
    for cache, measured_beside in beside.items():
        for loader in harness.order(LOADERS, number):
            bar.step(f"round {number + 1}: {loader}, {cache}")
            run = _run(outcome.plan, loader, cache, reserve)
            outcome.runs[cache, loader].append(run)
            _require_equal(outcome, run.sample, loader, cache)
            bar.update()
        for ceiling in measured_beside:
            bar.step(f"round {number + 1}: {ceiling.name}")
            ceiling.measure(outcome.plan.paths, reserve)
            bar.update()


def _run(plan: Plan, loader: str, cache: str, reserve: settle.Reserve) -> Run[Sample]:
    job = LoadJob(
        loader=loader,
        device=plan.device,
        paths=plan.paths,
        orders=tuple(file.order for file in plan.files),
        options=plan.options if loader == "patched" else {},
    )
    return harness.repeated(cache, plan.paths, reserve, lambda gate: run_load(job, gate))


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
