"""Process groups of a few ranks for tests, and their outcomes; rank_nursery.py is the ranks' side.

A test module runs the cases of a group in one job, because a fork and gloo's handshake take time.
Its tests then assert one case each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

NURSERY = Path(__file__).resolve().with_name("rank_nursery.py")

# A rank is aborted after this time, unless a job sets another limit.
LIMIT_S = 90.0


@dataclass(frozen=True)
class Case:
    """A function call in every rank.

    Attributes:
        call: ``module.function``.
        arguments: its keywords; values are of JSON's types.
        name: unique in a job; by default made of the call and its arguments.
    """

    call: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def key(self) -> str:
        values = "-".join(str(one) for one in self.arguments.values())
        return self.name or f"{self.call.split('.')[1]}-{values}"


@dataclass(frozen=True)
class Failure:
    """An exception that a rank's call raised; ``cause*`` describe the cause of a RankError."""

    type: str
    bases: Sequence[str]
    text: str
    rank: int | None
    cause: str | None
    cause_type: str | None
    cause_bases: Sequence[str]
    cause_errno: int | None
    trace: str

    def is_a(self, name: str) -> bool:
        """Whether its class or a base of it has this name."""
        return name in self.bases


@dataclass(frozen=True)
class Outcome:
    """The outcome of one case in one rank."""

    value: Any
    error: Failure | None
    seconds: float


@dataclass(frozen=True)
class End:
    """How a rank ended: its status, its time, whether it was late, and left processes running."""

    status: int
    seconds: float
    late: bool
    orphans: bool


@dataclass(frozen=True)
class Ran:
    """Ends and outcomes of a job's ranks."""

    folder: Path
    ends: Sequence[End]
    outcomes: Sequence[Mapping[str, Outcome]]

    def log(self) -> str:
        """Output of the ranks, with their stacks if they hung."""
        return "\n".join(
            f"--- rank {rank}, {end}\n{(self.folder / f'log-{rank}').read_text(errors='replace')}"
            for rank, end in enumerate(self.ends)
        )

    def of(self, case: Case | str) -> list[Outcome]:
        """Each rank's outcome of a case, by rank; fails if a rank did not finish it."""
        key = case if isinstance(case, str) else case.key
        missing = [rank for rank, found in enumerate(self.outcomes) if key not in found]
        assert not missing, f"ranks {missing} did not finish {key}\n{self.log()}"
        return [found[key] for found in self.outcomes]

    def values(self, case: Case | str) -> list[Any]:
        """Each rank's value of a case; fails with the traceback where one raised."""
        outcomes = self.of(case)
        traces = [
            f"--- rank {rank}\n{one.error.trace}" for rank, one in enumerate(outcomes) if one.error
        ]
        assert not traces, "\n".join(traces)
        return [one.value for one in outcomes]

    def errors(self, case: Case | str) -> list[Failure]:
        """Each rank's exception in a case; fails where a rank raised none."""
        outcomes = self.of(case)
        missing = [(rank, one.value) for rank, one in enumerate(outcomes) if one.error is None]
        assert not missing, f"no exception in ranks {missing}"
        return [one.error for one in outcomes if one.error is not None]

    def assert_ended(self) -> None:
        """Assert that all ranks ended by themselves, with status 0 and no process left."""
        for end in self.ends:
            assert (end.status, end.late, end.orphans) == (0, False, False), self.log()


class Nursery:
    """Starts groups of ranks, one at a time; see `run`."""

    def __init__(self, folder: Path, library: Path | None) -> None:
        self._folder = folder
        self._library = library
        self._jobs = 0
        self._errors = (folder / "nursery-errors").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, str(NURSERY)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            cwd=folder, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def run(
        self,
        cases: Sequence[Case],
        world: int,
        *,
        environment: Mapping[str, str] | None = None,
        environments: Sequence[Mapping[str, str]] = (),
        timeout: float = 60.0,
        limit: float = LIMIT_S,
        group: bool = True,
        meet: bool = True,
        doomed: Sequence[int] = (),
        preload: Sequence[str] = (),
        server: bool = False,
    ) -> Ran:
        """Run cases in a group of fresh ranks, in order.

        Args:
            cases: what to run, the same in every rank.
            world: how many ranks.
            environment: of all ranks, besides pytest's own.
            environments: of each rank, besides.
            timeout: of the process group, in seconds.
            limit: seconds after which a rank that has not ended is aborted.
            group: whether to make a process group.
            meet: whether ranks wait for each other between cases; not if a case kills a rank.
            doomed: ranks that do not end by themselves: late as soon as all others have ended.
            preload: modules that all ranks need, imported once.
            server: whether ranks meet at a TCP store, as torchrun's do, instead of a file.
        """
        keys = [case.key for case in cases]
        assert len(set(keys)) == len(keys), keys
        self._jobs += 1
        folder = self._folder / f"job{self._jobs}"
        folder.mkdir()
        job = {
            "cases": [
                {"name": c.key, "call": c.call, "arguments": dict(c.arguments)} for c in cases
            ],
            "world": world, "folder": str(folder), "timeout": timeout, "limit": limit,
            "library": None if self._library is None else str(self._library),
            "environment": dict(environment or {}), "group": group, "meet": meet, "server": server,
            "doomed": list(doomed),
            "environments": [dict(one) for one in environments] or [{}] * world,
            "preload": sorted({case.call.split(".")[0] for case in cases} | set(preload)),
        }  # fmt: skip
        answer = self._ask(json.dumps(job), limit + 60)
        ends = [End(**one) for one in json.loads(answer)]
        return Ran(folder, ends, [_outcomes(folder, rank) for rank in range(world)])

    def _ask(self, line: str, limit: float) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # The nursery aborts late ranks. The timer ends the nursery where that itself hangs.
        watchdog = threading.Timer(limit, self._process.kill)
        watchdog.start()
        try:
            print(line, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            watchdog.cancel()
        if not answer:
            self._errors.seek(0)
            raise AssertionError(f"the nursery of ranks died\n{self._errors.read()}")
        return answer


def _outcomes(folder: Path, rank: int) -> dict[str, Outcome]:
    path = folder / f"outcomes-{rank}.jsonl"
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        outcome = json.loads(line)
        error = None if outcome["error"] is None else Failure(**outcome["error"])
        found[outcome["name"]] = Outcome(outcome["value"], error, outcome["seconds"])
    return found


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory, fake_driver: Any) -> Iterator[Nursery]:
    """Starts process groups over gloo; see `Nursery.run`."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    started = Nursery(tmp_path_factory.mktemp("ranks"), Path(fake_driver.path))
    yield started
    started.close()
