"""Fresh processes: started, made ready, let through a gate, and ended when they hang.

A process reads one JSON message from stdin and answers in JSON lines on stdout. One that waits at
a gate first answers that it is ready, and goes on at the next line. Neither side imports torch or
the engine through this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from ..config import undecided_environment
from .failures import BenchError

Gate = contextlib.AbstractContextManager[None]  # such as harness.Gate

CRASHED, TIME_LIMIT = "crashed", "time limit"

_PACKAGES = Path(__file__).absolute().parents[2]
_STDERR_LINES = 15
_GRACE_S = 5.0  # to be gone after its answer; what a library does at exit is not timed
_PR_SET_PDEATHSIG = 1


class ProcessFailedError(Exception):
    """A process did not answer.

    Attributes:
        outcome: `CRASHED` or `TIME_LIMIT`.
        detail: in one line.
        how: it ended, such as "exit status 1".
        told: the last lines that it wrote to stderr.
    """

    def __init__(self, outcome: str, detail: str, how: str = "", told: Sequence[str] = ()) -> None:
        super().__init__(f"{outcome}: {detail}")
        self.outcome, self.detail, self.how, self.told = outcome, detail, how, told


class Started(Protocol):
    """The part of `subprocess.Popen` that is used here."""

    pid: int
    stdin: IO[bytes] | None
    stdout: IO[bytes] | None
    returncode: Any

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for its end; raise `subprocess.TimeoutExpired` when that takes longer."""

    def kill(self) -> None:
        """Send SIGKILL."""


Start = Callable[[IO[bytes]], Started]


def interpreter(
    arguments: Sequence[str], environment: Mapping[str, str], folder: str | Path
) -> Start:
    """Return what starts a fresh interpreter in a folder, with its stderr in a file."""

    def start(errors: IO[bytes]) -> Started:
        return subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, env=dict(environment), cwd=folder,
            start_new_session=True,  # to end it with what it started
        )  # fmt: skip

    return start


class Child:
    """One process, from its start to its end. A context manager: it is gone afterwards.

    Args:
        message: what it is to do.
        start: starts it.
    """

    def __init__(self, message: Mapping[str, object], start: Start) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = start(self._errors)
        self._text = b""
        self._failed: ProcessFailedError | None = None
        self._answered = False
        self.ready: dict[str, Any] | None = None
        self._send(json.dumps(message))

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.close(_GRACE_S if kind is None else 0.0)

    def wait_ready(self, seconds: float | None = None) -> dict[str, Any]:
        """Wait until it stands at the gate; return what it says there.

        Raises:
            ProcessFailedError: it ended, or takes longer.
        """
        if self._failed is not None:
            raise self._failed
        if self.ready is None:
            try:
                self.ready = self._next_answer(seconds, "getting ready")
            except ProcessFailedError as failed:
                self._failed = failed  # a second caller does not wait again
                raise
        return self.ready

    def go(self, seconds: float | None = None) -> dict[str, Any]:
        """Let it through the gate, and return its answer.

        Raises:
            ProcessFailedError: it ended without one, or takes longer.
        """
        self._send("go")
        answer = self._next_answer(seconds, "loading")
        self._answered = True
        return answer

    def answer(self, seconds: float | None = None) -> dict[str, Any]:
        """Return the answer to a message that has no gate.

        Raises:
            ProcessFailedError: as `go`.
        """
        answer = self._next_answer(seconds, "answering")
        self._answered = True
        return answer

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            ProcessFailedError: its exit status is not 0.
        """
        self._close_stdin()
        self._process.wait()
        if self._process.returncode != 0:
            raise self._failure("ending")

    def close(self, grace_s: float = 0.0) -> None:
        """End it and all that it started; one that has answered may end by itself."""
        self._close_stdin()
        if not self._answered or not self._ended(grace_s):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _close_stdin(self) -> None:
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _ended(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _send(self, line: str) -> None:
        # A process that is gone already is noticed when its answer does not come.
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()

    def _next_answer(self, seconds: float | None, doing: str) -> dict[str, Any]:
        line = self._next_line(seconds)
        if line is None:
            raise ProcessFailedError(TIME_LIMIT, f"{seconds:.0f} s passed while {doing}")
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):
            self._ended(_GRACE_S)
            raise self._failure(doing) from None

    def _next_line(self, seconds: float | None) -> bytes | None:
        """Return the next line, empty when there is none any more; None when time is up."""
        assert self._process.stdout is not None
        source = self._process.stdout.fileno()
        while b"\n" not in self._text:
            if not select.select([source], [], [], seconds)[0]:
                return None
            read = os.read(source, 1 << 16)
            if not read:
                break
            self._text += read
        line, _, self._text = self._text.partition(b"\n")
        return line

    def _failure(self, doing: str) -> ProcessFailedError:
        code = self._process.returncode
        how = f"exit status {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                how = f"killed by {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        told = [line for line in lines if line.strip()][-_STDERR_LINES:]
        last = f": {told[-1]}" if told else ""
        return ProcessFailedError(CRASHED, f"while {doing}: {how}{last}", how, told)


def run_json(
    arguments: Sequence[str],
    message: Mapping[str, object],
    label: str,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """Run a fresh interpreter on a JSON message, and return its answer.

    It runs in the directory that holds this package, so that `-m` finds this very copy
    and not a checkout that happens to be the user's working directory. ``FASTST_ENABLED`` is
    for programs, and does not reach it: the bench decides itself which process is patched.

    Gate and errors are `ask`'s.
    """
    return ask(interpreter(arguments, undecided_environment(), _PACKAGES), message, label, gate)


def ask(
    start: Start, message: Mapping[str, object], label: str, gate: Gate | None = None
) -> dict[str, Any]:
    """Start a process on a JSON message, and return its answer.

    With a gate the process waits after its first answer, and goes on within that context.

    Raises:
        BenchError: it failed; with what it wrote to stderr.
    """
    try:
        with Child(message, start) as child:
            if gate is None:
                answer = child.answer()
            else:
                child.wait_ready()
                with gate:
                    answer = child.go()
            child.finish()
    except ProcessFailedError as failed:
        raise BenchError(_in_words(label, failed)) from None
    return answer


def _in_words(label: str, failed: ProcessFailedError) -> str:
    text = f"{label}: its process failed ({failed.how})"
    if failed.how == "exit status 0":
        text += ": no JSON answer"
    if len(failed.told) == 1:  # the child has put it in words
        return f"{text}: {failed.told[0]}"
    return text + "".join(f"\n  | {line}" for line in failed.told)


# ---- in the child -------------------------------------------------------


def only_answers() -> Callable[[Mapping[str, object]], None]:
    """Keep stdout for answers, and return the function that gives one.

    What is printed by libraries goes to stderr from now on.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: Mapping[str, object]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    return say


def serve(act: Callable[..., Mapping[str, object]]) -> None:
    """Answer the message on stdin: with what ``act`` makes of it.

    Args:
        act: is called with the message and with a function that waits at the gate, after telling
            what it is given.
    """
    say = only_answers()

    def gate(**told: object) -> None:
        say({"ready": True, **told})
        if sys.stdin.readline().strip() != "go":
            sys.exit("the harness is gone")

    say(act(json.loads(sys.stdin.readline()), gate))


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone, however that ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
