"""A process that has imported torch and does nothing else, and copies of it for single loads.

Importing torch takes a second or two of a core, on which a race on two cores would spend most of
its time. What is timed is not touched by it: a copy (``fork``) is a process of its own, imports
its loader by itself, and waits at the gate as any other. It has run nothing before but imports.

    harness   -- socket: environment + stdin, stdout, stderr, status -->   template
    template  -- status: the copy's pid, and how it ended -->              harness
    copy      -- stdin, stdout, as a process that was started afresh -->   harness

The template must not import what loaders bring: one of them may come from an environment of its
own, with another safetensors. Not for devices: who forks must not have opened one, and large
machines import quickly.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

READY = b"ready"
_FILES = 4  # of a copy: stdin, stdout, stderr, status


class Forked:
    """A copy of the template: what is used here of `subprocess.Popen`, over pipes of its own."""

    def __init__(self, status: BinaryIO, stdin: BinaryIO, stdout: BinaryIO) -> None:
        self._status = status
        self.stdin: BinaryIO | None = stdin
        self.stdout: BinaryIO | None = stdout
        self.returncode: int | None = None
        told = status.readline()
        if not told:
            raise OSError("the template is gone")
        self.pid = int(told)

    def wait(self, timeout: float | None = None) -> int:
        """As of a Popen. Of a copy whose template is gone nobody knows how it ended: -SIGKILL."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            told = self._status.readline()
            self._status.close()
            self.returncode = int(told) if told else -signal.SIGKILL
        return self.returncode


class Template:
    """The process that is copied, from the first `fork` on. A context: it is gone afterwards.

    Args:
        start: starts it on a socket, its stdin.
    """

    def __init__(self, start: Callable[[socket.socket], subprocess.Popen[bytes]]) -> None:
        self._start = start
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def __enter__(self) -> Template:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End it. Copies that still run are their own processes, and are not ended."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.wait()
            self._process = None

    def fork(self, environment: str, errors: int) -> Forked:
        """Make a copy that waits for a job.

        Args:
            environment: goes in front of its ``sys.path``; empty: nothing does.
            errors: descriptor that its stderr goes to.

        Raises:
            BenchError: there is no template to be had.
        """
        try:
            return self._copy(environment, errors)
        except OSError:  # killed, for its memory perhaps: once is no reason to give up
            self.close()
        from fastst_patch.bench.failures import BenchError

        try:
            return self._copy(environment, errors)
        except OSError as error:
            self.close()
            raise BenchError(f"copying a process that has imported torch: {error}") from error

    def _copy(self, environment: str, errors: int) -> Forked:
        if self._socket is None:
            self._socket = self._open()
        pipes = [os.pipe() for _ in range(3)]  # stdin, stdout, status
        (read, write), (get, put), (hear, say) = pipes
        theirs, ours = (read, put, say), (write, get, hear)
        try:
            socket.send_fds(self._socket, [b"\0" + environment.encode()], [read, put, errors, say])
        except OSError:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        files = [os.fdopen(fd, mode) for fd, mode in zip(ours, ("wb", "rb", "rb"), strict=True)]
        try:
            return Forked(files[2], files[0], files[1])
        except OSError:
            for file in files:
                file.close()
            raise

    def _open(self) -> socket.socket:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = self._start(its)
        if mine.recv(len(READY)) != READY:
            mine.close()
            raise OSError("it ended, or could not import torch")
        return mine


# ---- in the template ----


def main() -> int:
    """Import torch, and serve the socket on stdin until the harness is gone."""
    import torch  # noqa: F401

    from . import child

    gc.collect()
    gc.freeze()  # or the collector of every copy would write to, and so copy, all of it
    harness = socket.socket(fileno=os.dup(0))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    copies: dict[int, int] = {}  # status pipe of each by its pid
    harness.send(READY)
    while True:
        ready = select.select([harness, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            _bury(copies)
        if harness not in ready:
            continue
        request, fds, _, _ = socket.recv_fds(harness, 65536, _FILES)
        if not request:
            return 0
        pid = os.fork()
        if pid == 0:
            _become(fds, request[1:].decode(), [harness.detach(), woken, wake, *copies.values()])
            return child.main()
        os.setpgid(pid, pid)  # before anybody knows of it: it is ended with what it starts
        copies[pid] = fds[3]
        _tell(fds[3], pid)
        for fd in fds[:3]:
            os.close(fd)


def _bury(copies: dict[int, int]) -> None:
    while copies:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        _tell(copies[pid], os.waitstatus_to_exitcode(status))
        os.close(copies.pop(pid))


def _tell(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the harness does not want to know any more
        os.write(status, b"%d\n" % number)


def _become(fds: list[int], environment: str, others: Iterable[int]) -> None:
    """Be a process that was started with these files."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, fd in enumerate(fds[:3]):
        os.dup2(fd, target)
    for fd in (*fds, *others):
        os.close(fd)
    stdin: Any = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdin = stdin
    if environment:
        sys.path.insert(0, environment)
