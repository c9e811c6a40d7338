"""Fresh processes: started, made ready, let through the gate, watched, and ended when they hang."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .entrants import scrub
from .template import Forked, Template

ROOT = Path(__file__).resolve().parents[2]

# The repository goes last on sys.path: the installed fastst_patch is what is raced, and a
# checkout beside it, which may hold no built extension, is not. A loader's side environment goes
# first, before anything is imported from where it would otherwise be found.
_BOOT = """
import sys
if sys.path and sys.path[0] == "":
    sys.path.pop(0)
root, environment, kind = sys.argv[1:4]
sys.path.append(root)
if environment:
    sys.path.insert(0, environment)
sys.argv[1:] = []
if kind == "template":
    from benchmarks.race.template import main
else:
    from benchmarks.race.child import main
sys.exit(main())
"""

_STDERR_LINES = 12
_GRACE_S = 5.0  # to be gone after its answer; what a library does at exit is not timed


class ProcessFailedError(Exception):
    """A process did not answer.

    Attributes:
        outcome: "crashed" or "time limit".
        detail: why, for the table; without this machine's folders.
    """

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(f"{outcome}: {detail}")
        self.outcome = outcome
        self.detail = detail


def environment_variables() -> dict[str, str]:
    """Those of this process, less the switches of fastst-patch: nobody is patched unasked."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FASTST_") or name.startswith("FASTST_RACE_")
    }
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _popen(kind: str, environment: str, **files: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _BOOT, str(ROOT), environment, kind],
        env=environment_variables(),
        cwd=tempfile.gettempdir(),
        start_new_session=True,  # to end it with what it started
        **files,
    )


def template() -> Template:
    """Make a template of processes; it is started when the first is asked for."""

    def start(its: socket.socket) -> subprocess.Popen[bytes]:
        return _popen("template", "", stdin=its, stdout=subprocess.DEVNULL)

    return Template(start)


class Child:
    """One process, from its start to its end. A context manager: it is gone afterwards.

    Args:
        message: what it is to do.
        environment: folder that goes in front of its ``sys.path``.
        copied: it is a copy of this template; None: it is started afresh.

    Raises:
        OSError, BenchError: it could not be started.
    """

    def __init__(
        self,
        message: Mapping[str, object],
        environment: str | None = None,
        copied: Template | None = None,
    ) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process: subprocess.Popen[bytes] | Forked
        if copied is None:
            pipe = subprocess.PIPE
            self._process = _popen(
                "child", environment or "", stdin=pipe, stdout=pipe, stderr=self._errors
            )
        else:
            self._process = copied.fork(environment or "", self._errors.fileno())
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ready: dict[str, Any] | None = None
        self._failed: ProcessFailedError | None = None
        self._send(json.dumps(message))

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def wait_ready(self, seconds: float) -> dict[str, Any]:
        """Wait until it has imported everything and stands at the gate; return what that took.

        Raises:
            ProcessFailedError: it ended, or takes longer.
        """
        if self._failed is not None:
            raise self._failed
        if self.ready is None:
            try:
                self.ready = self._answer(seconds, "getting ready")
            except ProcessFailedError as failed:
                self._failed = failed  # whoever asks again shall not wait again
                raise
        return self.ready

    def go(self, seconds: float) -> dict[str, Any]:
        """Let it through the gate, and return its answer.

        Raises:
            ProcessFailedError: it ended without one, or takes longer.
        """
        self._send("go")
        return self._answer(seconds, "loading")

    def answer(self, seconds: float) -> dict[str, Any]:
        """Return the answer to a message that has no gate.

        Raises:
            ProcessFailedError: as `go`.
        """
        return self._answer(seconds, "answering")

    def close(self) -> None:
        """Wait a moment for its end, then end it and all that it started."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        if self.ready is None or not self._ended(_GRACE_S):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(_GRACE_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

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

    def _read(self) -> None:
        if self._process.stdout is not None:
            with contextlib.suppress(ValueError):  # closed: nobody wants to know any more
                for line in self._process.stdout:
                    self._lines.put(line)
        self._lines.put(b"")

    def _answer(self, seconds: float, doing: str) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise ProcessFailedError(
                "time limit", f"{seconds:.0f} s passed while {doing}"
            ) from None
        try:
            answer = json.loads(line)
        except ValueError:
            self._ended(_GRACE_S)
            raise ProcessFailedError("crashed", f"while {doing}: {self._reason()}") from None
        return dict(answer)

    def _reason(self) -> str:
        code = self._process.returncode
        how = f"exit status {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                how = f"killed by {signal.Signals(-code).name}"
        told = self.stderr()
        return f"{how}: {scrub(told[-1])}" if told else how

    def stderr(self) -> list[str]:
        """The last lines that it wrote there."""
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-_STDERR_LINES:]


def ask(message: Mapping[str, object], seconds: float = 120.0) -> dict[str, Any]:
    """Ask a fresh process one question.

    Raises:
        ProcessFailedError: it did not answer.
    """
    with Child(message) as child:
        answer = child.answer(seconds)
        child.ready = answer  # it may end by itself
        return answer
