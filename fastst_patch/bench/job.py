"""What the runner tells a child process, what the child answers, and the call between.

Neither side imports torch or the engine through this module.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import undecided_environment
from .errors import BenchError

CHILD = ("-m", "fastst_patch.bench.child")

_STDERR_LINES = 15


@dataclass(frozen=True)
class LoadJob:
    """One timed load in a fresh process."""

    loader: str  # "stock" or "patched"
    device: str
    paths: tuple[str, ...]
    orders: tuple[tuple[str, ...], ...]  # per file: tensor names by offset
    options: Mapping[str, object] = field(default_factory=dict)  # for patch()
    touch: bool = True  # time reading every byte too (CPU only)
    probe: bool = True  # report the residency just before the clock starts
    split: bool = False  # start the engine's device before the clock, and time that apart


@dataclass(frozen=True)
class Sample:
    """What one LoadJob measured."""

    load_s: float
    touch_s: float
    digests: tuple[str, ...]  # per file, over names, dtypes, shapes, order and bytes
    tensors: int
    bytes: int
    path: str  # ways taken, such as "mmap+readahead"; "stock" for the stock loader
    fallbacks: tuple[str, ...]  # reasons given by fastst_patch
    resident_before: float | None  # fraction; None: not asked or cannot be told
    memory: Mapping[str, int]  # bytes, with all tensors alive
    memory_before: Mapping[str, int]  # bytes, torch imported and nothing loaded
    versions: Mapping[str, str]
    device_name: str
    parts: Mapping[str, float] = field(default_factory=dict)  # seconds; see child.run

    @property
    def total_s(self) -> float:
        """What a program waits: a lazy load is paid for when the bytes are read."""
        return self.load_s + self.touch_s


def run_load(job: LoadJob) -> Sample:
    """Run one timed load in a fresh process."""
    label = f"{job.loader} loader"
    answer = run_json(CHILD, {"kind": "load", **asdict(job)}, label)
    answer["digests"] = tuple(answer["digests"])
    answer["fallbacks"] = tuple(answer["fallbacks"])
    return Sample(**answer)


def run_json(arguments: Sequence[str], message: Mapping[str, object], label: str) -> dict[str, Any]:
    """Run a fresh interpreter on a JSON message; its last line of output is the answer.

    It runs in the directory that holds this package, so that `-m` finds this very copy
    and not a checkout that happens to be the user's working directory. ``FASTST_ENABLED`` is
    for programs, and does not reach it: who is patched is this bench's own business.
    """
    finished = subprocess.run(
        [sys.executable, *arguments],
        input=json.dumps(message),
        capture_output=True,
        text=True,
        env=undecided_environment(),
        cwd=Path(__file__).absolute().parents[2],
        check=False,
    )
    if finished.returncode != 0:
        raise BenchError(_failure(label, finished.returncode, finished.stderr))
    lines = finished.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise BenchError(_failure(label, 0, finished.stderr) + "\nno JSON answer") from error
    if not isinstance(answer, dict):
        raise BenchError(f"{label}: its answer is no JSON object: {lines[-1]}")
    return answer


def _failure(label: str, code: int, stderr: str) -> str:
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    tail = "\n".join(f"  | {line}" for line in stderr.strip().splitlines()[-_STDERR_LINES:])
    return f"{label}: its process failed ({how})" + (f":\n{tail}" if tail else "")
