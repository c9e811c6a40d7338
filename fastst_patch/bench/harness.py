"""The one harness of all measurements: a scenario says what runs, and this runs it.

Contenders take turns in fresh processes. Before each the page cache is put into a proven state and
memory is lent; the answers of all runs are compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from . import residency
from .failures import BenchError
from .process import Gate as AnyGate
from .residency import SMALL_PAGES, CacheState
from .settle import SMALL

TRIES = 5


class Measured(Protocol):
    """The answer of a process that looked at the page cache just before its clock started."""

    @property
    def resident_before(self) -> float | None:
        """Fraction of the files' bytes; None where it cannot be told."""


class Lender(Protocol):
    """Such as `settle.Reserve`."""

    def lend(self, *kinds: Any) -> AnyGate:
        """Free memory for what runs within the context."""


Answer = TypeVar("Answer")
Sample = TypeVar("Sample", bound=Measured)


class Gate:
    """What a process finds when it is let through: a proven page cache, and memory.

    A context manager for the time in which it is timed. Both are made at the last moment, since
    pages that have been free for long may not be the machine's any more.
    """

    state: CacheState

    def __init__(self, cache: str, paths: Sequence[str], lender: Lender) -> None:
        self._cache, self._paths = cache, paths
        self._lending = lender.lend((SMALL,)) if cache == SMALL_PAGES else lender.lend()

    def __enter__(self) -> None:
        self.state = residency.prepare(self._cache, self._paths)
        self._lending.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._lending.__exit__(*exc)


@dataclass(frozen=True)
class Run(Generic[Sample]):
    """One sample and the cache state it was prepared in."""

    sample: Sample
    prepared: CacheState

    @property
    def verified(self) -> bool | None:
        """By this process before the child started, and by the child before its clock did."""
        return residency.verdict(self.prepared, self.sample.resident_before)


def repeated(
    cache: str, paths: Sequence[str], lender: Lender, run: Callable[[Gate], Sample]
) -> Run[Sample]:
    """Run once behind a gate; again when something else took the cache out of its state.

    Kernels that reclaim idle pages, and other programs, do so between preparing and loading.
    The result of such a run is not looked at, so repeating it chooses nothing.
    """
    for _ in range(TRIES):
        gate = Gate(cache, paths, lender)
        sample = run(gate)
        made = Run(sample, gate.state)
        if made.verified is not False:
            break
    return made


def proven(
    cache: str, paths: Sequence[str], lender: Lender, run: Callable[[Gate], Sample]
) -> Run[Sample]:
    """Do as `repeated`.

    Raises:
        BenchError: the cache never was in its state.
    """
    made = repeated(cache, paths, lender, run)
    if made.verified is False:
        fractions = (made.prepared.fraction, made.sample.resident_before)
        seen = " and then ".join(f"{one:.1%}" for one in fractions if one is not None)
        raise BenchError(
            f"the files were to be {cache} in the page cache, and they were {seen} cached; "
            "is another program using them, or is memory short?"
        )
    return made


def rounds(count: int, max_seconds: float = math.inf) -> Iterator[int]:
    """Count rounds; none but the first begins that would end too late, as the longest tells."""
    begin, longest = time.monotonic(), 0.0
    for number in range(count):
        started = time.monotonic()
        if number and started - begin + longest > max_seconds:
            return
        yield number
        longest = max(longest, time.monotonic() - started)


def order(names: Sequence[str], number: int) -> list[str]:
    """Return the names in the order of a round.

    Each round begins with another: the next contender finds the disk and the allocator as that
    left them.
    """
    first = number % len(names)
    return [*names[first:], *names[:first]]


def race(
    names: Sequence[str],
    count: int,
    run: Callable[[str], Answer],
    proof: Callable[[Answer], Any] | None = None,
    max_seconds: float = math.inf,
) -> dict[str, list[Answer]]:
    """Return what each contender answered, by round.

    Args:
        names: of the contenders.
        count: how often each of them runs.
        run: runs one of them.
        proof: what of an answer has to be the same in every run.
        max_seconds: see `rounds`.

    Raises:
        BenchError: a proof differs from the first. A fast wrong loader is worthless.
    """
    found: dict[str, list[Answer]] = {name: [] for name in names}
    first: list[Any] = []
    for number in rounds(count, max_seconds):
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
    return found
