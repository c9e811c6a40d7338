"""Programs that start in milliseconds: forks of a process that has imported torch.

A fresh interpreter needs a second or two of a core for torch alone, which is most of what a
program in a test takes. `WarmPython.run` stands for ``python -c`` where a program imports torch
anyway. It cannot stand for it where the test is about that import, where the program spawns copies
of itself, or where something is read as the interpreter starts: flags, ``PYTHONPATH``,
``LD_LIBRARY_PATH``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

SERVER = Path(__file__).resolve().with_name("warm_server.py")
LIMIT_S = 120.0

TORCHRUN = """
import sys
from torch.distributed.run import main
main(sys.argv[1:])
"""
"""A program that is torchrun. Its ranks are fresh processes."""


class Program:
    """A program that runs; as much of `subprocess.Popen` as is used.

    Args:
        status: tells its pid, and how it ended.
        stdin: a pipe to it, or None.
        stdout: a pipe from it, or None.
    """

    def __init__(self, status: int, stdin: IO[bytes] | None, stdout: IO[bytes] | None) -> None:
        self._status = status
        self._text = b""
        self.stdin, self.stdout = stdin, stdout
        self.returncode: int | None = None
        self.pid = int(self._line(LIMIT_S))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the status is negative where a signal ended it.

        Raises:
            subprocess.TimeoutExpired: it takes longer.
        """
        if self.returncode is None:
            self.returncode = int(self._line(timeout))
            os.close(self._status)
        return self.returncode

    def kill(self) -> None:
        """End it, with what it started in its session, unless it has ended."""
        if self.returncode is None:
            for end in (os.kill, os.killpg):  # the second fails before it leads a session
                with contextlib.suppress(ProcessLookupError):
                    end(self.pid, signal.SIGKILL)
            self.wait(LIMIT_S)

    def _line(self, timeout: float | None) -> bytes:
        limit = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._text:
            left = None if limit is None else max(0.0, limit - time.monotonic())
            if not select.select([self._status], [], [], left)[0]:
                raise subprocess.TimeoutExpired("a fork of the warm Python", timeout or 0.0)
            read = os.read(self._status, 100)
            assert read, "the server of warm Pythons is gone"
            self._text += read
        line, _, self._text = self._text.partition(b"\n")
        return line


class WarmPython:
    """A process that has imported modules, and forks programs when it is told to.

    Args:
        modules: that it imports. Programs import everything else themselves.
    """

    def __init__(self, *modules: str) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(SERVER), str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd=tempfile.gettempdir(),
            )  # fmt: skip

    def close(self) -> None:
        """End the server; programs that run go on."""
        self._socket.close()
        self._process.wait(30)

    def start(
        self,
        code: str | Path,
        arguments: Sequence[object] = (),
        *,
        folder: str | Path,
        stdin: IO[Any] | int | None,
        stdout: IO[Any] | int,
        stderr: IO[Any] | int,
        environment: Mapping[str, str] | None = None,
        quiet: bool = False,
    ) -> Program:
        """Start a program.

        Args:
            code: its source, as of ``-c``, or the path of a script.
            arguments: the rest of its ``sys.argv``.
            folder: its current one.
            stdin: a file, or `subprocess.PIPE`; None has nothing to read.
            stdout: a file, or `subprocess.PIPE`.
            stderr: a file.
            environment: all its variables; this process's when None.
            quiet: it ignores warnings, as with ``-W ignore``.
        """
        is_file = isinstance(code, Path)
        job = {
            "source": code.read_text(encoding="utf-8") if isinstance(code, Path) else code,
            "file": is_file,
            "argv": [str(code) if is_file else "-c", *map(str, arguments)],
            "folder": str(folder), "quiet": quiet,
            "environment": dict(os.environ if environment is None else environment),
        }  # fmt: skip
        with contextlib.ExitStack() as theirs:
            if stdin is None:
                stdin = theirs.enter_context(open(os.devnull, "rb"))
            ours: list[IO[bytes] | None] = []
            files = []
            for file, mode in ((stdin, "wb"), (stdout, "rb")):
                if file == subprocess.PIPE:
                    read, write = os.pipe()
                    mine, other = (write, read) if mode == "wb" else (read, write)
                    theirs.callback(os.close, other)
                    ours.append(os.fdopen(mine, mode))
                    files.append(other)
                else:
                    ours.append(None)
                    files.append(file if isinstance(file, int) else file.fileno())
            files.append(stderr if isinstance(stderr, int) else stderr.fileno())
            status, told = os.pipe()
            theirs.callback(os.close, told)
            socket.send_fds(self._socket, [json.dumps(job).encode()], [*files, told])
        return Program(status, *ours)

    def run(
        self,
        code: str | Path,
        *arguments: object,
        folder: str | Path,
        environment: Mapping[str, str] | None = None,
        stdin: str = "",
        quiet: bool = False,
        limit_s: float = LIMIT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; see `start`.

        Args:
            stdin: what it can read.
            limit_s: seconds after which it is ended.

        Raises:
            subprocess.TimeoutExpired: it takes longer.
        """
        with contextlib.ExitStack() as stack:
            given, out, err = (
                stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
                for _ in range(3)
            )
            given.write(stdin)
            given.seek(0)
            program = self.start(
                code, arguments, folder=folder, stdin=given, stdout=out, stderr=err, quiet=quiet,
                environment=environment,
            )  # fmt: skip
            try:
                status = program.wait(limit_s)
            finally:
                program.kill()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess([str(code)], status, out.read(), err.read())


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Programs that start with torch imported; see `WarmPython.run`."""
    started = WarmPython("torch")
    yield started
    started.close()
