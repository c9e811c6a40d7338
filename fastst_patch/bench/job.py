"""What the runner tells a child process, what the child answers, and the call between.

Neither side imports torch or the engine through this module.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import undecided_environment
from . import settle
from .failures import BenchError

CHILD = ("-m", "fastst_patch.bench.child")

READY = "ready"  # a process's first line

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


Gate = contextlib.AbstractContextManager[None]  # as of runner.Gate


def run_load(job: LoadJob, gate: Gate | None = None) -> Sample:
    """Run one timed load in a fresh process.

    It enters the gate when all is imported, and leaves it when the load is over. Without one it
    has memory that is there, and the page cache as it is.
    """
    label = f"{job.loader} loader"
    message = {"kind": "load", **asdict(job)}
    if gate is not None:
        answer = run_json(CHILD, message, label, gate)
    else:
        with settle.reserve_for(job.paths) as reserve:
            answer = run_json(CHILD, message, label, reserve.lend())
    answer["digests"] = tuple(answer["digests"])
    answer["fallbacks"] = tuple(answer["fallbacks"])
    return Sample(**answer)


def run_json(
    arguments: Sequence[str],
    message: Mapping[str, object],
    label: str,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """Run a fresh interpreter on a JSON message; its last line of output is the answer.

    It runs in the directory that holds this package, so that `-m` finds this very copy
    and not a checkout that happens to be the user's working directory. ``FASTST_ENABLED`` is
    for programs, and does not reach it: who is patched is this bench's own business.

    With a gate the process waits after its first line of output, and goes on within that context.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=undecided_environment(),
            cwd=Path(__file__).absolute().parents[2],
        )
        with process, _ended(process):
            output = _talk(process, json.dumps(message) + "\n", gate)
        errors.seek(0)
        told = errors.read()
    if process.returncode != 0:
        raise BenchError(_failure(label, process.returncode, told))
    lines = output.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise BenchError(_failure(label, 0, told) + "\nno JSON answer") from error
    if not isinstance(answer, dict):
        raise BenchError(f"{label}: its answer is no JSON object: {lines[-1]}")
    return answer


def _talk(process: subprocess.Popen[str], message: str, gate: Gate | None) -> str:
    if gate is None:
        return process.communicate(message)[0]
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it says why below
        process.stdin.write(message)
        process.stdin.flush()
    process.stdout.readline()  # READY, or nothing: it ended
    with gate:
        try:
            return process.communicate("go\n")[0]
        except BrokenPipeError:  # it is gone with the message unread; how it ended says why
            return ""


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Leave no process behind when the block ends early."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


def _failure(label: str, code: int, stderr: str) -> str:
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    lines = stderr.strip().splitlines()[-_STDERR_LINES:]
    if len(lines) == 1:  # the child has put it in words
        return f"{label}: its process failed ({how}): {lines[0]}"
    tail = "\n".join(f"  | {line}" for line in lines)
    return f"{label}: its process failed ({how})" + (f":\n{tail}" if tail else "")
