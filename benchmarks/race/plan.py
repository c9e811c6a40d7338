"""What is raced within the time there is: which cells, by whom; a planner that drops, not rushes.

A cell is one workload in one state of the page cache. Rounds are never fewer than asked for;
where time is short there are fewer cells, or fewer loaders in the less important ones, and what
was left out is named in the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loaders import Loader
    from .workloads import Workload

LEAST_ROUNDS = 5

# Before anything is known. To start a process, import torch and check the bytes; and the same of
# a copy that has imported torch, which took 0.2 to 0.3 s on two cores:
START_S = 2.5
COPY_START_S = 0.3
SLOWEST_GB_PER_S = {"cpu": 0.5, "cuda": 3.0}
WRITE_GB_PER_S = 0.2  # writing the files, and what a yardstick needs beside them


@dataclass(frozen=True)
class Cell:
    """One workload in one state of the page cache."""

    workload: str
    cache: str

    def __str__(self) -> str:
        return f"{self.workload}, {self.cache}"


@dataclass(eq=False)
class Unit:
    """What is taken in or left out as a whole: some loaders in one cell."""

    cell: Cell
    loaders: tuple[str, ...]
    nbytes: int
    again: bool  # each load is followed by a second one in a new process
    done: int = 0  # rounds
    seconds: float | None = None  # that the last round took

    def __str__(self) -> str:
        return f"{self.cell}: {', '.join(self.loaders)}"

    @property
    def loads(self) -> int:
        """Processes in a round."""
        return len(self.loaders) * (2 if self.again else 1)


def representatives(loaders: Sequence[Loader]) -> tuple[str, ...]:
    """The first of each family."""
    families: dict[str, str] = {}
    for loader in loaders:
        families.setdefault(loader.family, loader.name)
    return tuple(families.values())


def units(
    workloads: Sequence[Workload], loaders: Sequence[Loader], caches: Sequence[str], again: bool
) -> list[Unit]:
    """All there is to race, the most important first.

    The first workload by everybody, then every other by one loader of each family, then by the
    rest. Second loads follow the cold ones: with ``again`` all, else those of the first workload
    by one of each family.
    """
    chosen = representatives(loaders)
    rest = tuple(loader.name for loader in loaders if loader.name not in chosen)
    found: list[Unit] = []
    for others in (False, True):
        for racing in (chosen, rest):
            for number, workload in enumerate(workloads):
                if others != (number > 0) or not racing:
                    continue
                for cache in caches:
                    second = cache == "cold" and (again or (number == 0 and racing == chosen))
                    found.append(Unit(Cell(workload.name, cache), racing, workload.nbytes, second))
    return found


@dataclass
class Planner:
    """Decides, from the times seen so far, which units there is time for.

    Args:
        units: the most important first.
        budget_s: for everything; None: no limit.
        rounds: of every unit.
        reserved_s: kept for what comes after the rounds.
        beside_s: what the ceilings of a round took.
        write_s: to make the files of a workload, by byte.
        slowest: GB/s assumed of a load before any was seen.
        start_s: of each load at most what does not grow with its bytes.
    """

    units: list[Unit]
    budget_s: float | None
    rounds: int
    reserved_s: float = 0.0
    beside_s: float = 0.0
    write_s: float = 1e-9 / WRITE_GB_PER_S
    slowest: float = SLOWEST_GB_PER_S["cpu"]
    start_s: float = START_S
    dropped: dict[str, str] = field(default_factory=dict)  # unit -> why
    passed: set[str] = field(default_factory=set)  # workloads whose turn it was already

    def __post_init__(self) -> None:
        self._all = list(self.units)

    def of(self, workload: str) -> list[Unit]:
        """The units of a workload that are still raced."""
        return [unit for unit in self.units if unit.cell.workload == workload]

    def cells(self, workload: str) -> list[tuple[Cell, list[Unit]]]:
        """The same by cell."""
        cells: dict[Cell, list[Unit]] = {}
        for unit in self.of(workload):
            cells.setdefault(unit.cell, []).append(unit)
        return list(cells.items())

    def took(self, cell: Cell, seconds: float) -> None:
        """Note a round of a cell."""
        here = [unit for unit in self.units if unit.cell == cell]
        loads = sum(unit.loads for unit in here)
        for unit in here:
            unit.done += 1
            unit.seconds = seconds * unit.loads / loads

    def predicted(self, unit: Unit) -> float:
        """Seconds of one round of a unit."""
        if unit.seconds is not None:
            return unit.seconds
        seen = [one for one in self.units if one.seconds is not None]
        if not seen:
            return unit.loads * (self.start_s + unit.nbytes / self.slowest / 1e9)
        # A part of each load is its start, the rest goes with the bytes.
        loads = sum(one.loads for one in seen)
        seconds = sum(one.seconds or 0.0 for one in seen)
        start = min(self.start_s, seconds / loads)
        moved = sum(one.loads * one.nbytes for one in seen)
        return unit.loads * (start + (seconds - start * loads) / max(moved, 1) * unit.nbytes)

    def left_s(self) -> float:
        """The estimate: seconds until everything is over."""
        return self._left(self.units) + self.reserved_s

    def _left(self, units: Sequence[Unit]) -> float:
        seconds = 0.0
        workloads: dict[str, int] = {}
        for unit in units:
            seconds += (self.rounds - unit.done) * self.predicted(unit)
            name = unit.cell.workload
            workloads[name] = max(workloads.get(name, 0), self.rounds - unit.done)
            if workloads[name] == self.rounds and unit is self._first_of(units, name):
                seconds += unit.nbytes * self.write_s
        return seconds + self.beside_s * sum(workloads.values())

    @staticmethod
    def _first_of(units: Sequence[Unit], workload: str) -> Unit:
        return next(unit for unit in units if unit.cell.workload == workload)

    def fit(self, elapsed_s: float) -> None:
        """Drop units until the rest fits: those not begun first, the least important first.

        One unit stays, whatever it takes. What was dropped before anything was known comes back
        where it fits now, unless its workload's turn has begun: its rounds would be too few.
        """
        kept = set(self.units)
        self.units = [
            one for one in self._all if one in kept or one.cell.workload not in self.passed
        ]
        for unit in self.units:
            self.dropped.pop(str(unit), None)
        while self.budget_s is not None and len(self.units) > 1:
            if elapsed_s + self.left_s() <= self.budget_s:
                return
            running = [unit for unit in self.units if unit.done < self.rounds]
            if not running:
                return
            fresh = [unit for unit in running if not unit.done]
            last = (fresh or running)[-1]
            if last is self.units[0]:
                return
            self.units.remove(last)
            self.dropped[str(last)] = (
                f"left out after {last.done} rounds: no time" if last.done
                else "left out, for its rounds would not fit the time allowed"
            )  # fmt: skip
