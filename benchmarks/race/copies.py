"""Copies of a process that has imported torch, or another slow package, and done nothing else.

Importing torch takes a second or two of a core, on which a race on two cores would spend most of
its time. A copy (``fork``, by the fork server of `multiprocessing`) is a process of its own: it
imports its loader by itself, and waits at the gate as any other. The fork server has imported
torch and nothing else: a loader may come from an environment of its own, with another
safetensors. So this module imports the standard library only: a copy imports it first. No copies
are made for devices: a process that forks must not have opened one.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import IO, Any


class Copy:
    """A copy of the fork server: as much of `subprocess.Popen` as `Child` uses.

    Args:
        environment: folder that goes in front of its ``sys.path``; none where empty.
        variables: its environment variables.
        errors: file for its stderr.
        imported: modules that the fork server imports.
        main: what the copy does; it does not return. The race's own when None.

    Raises:
        BenchError: there is no fork server to be had.
    """

    def __init__(
        self,
        environment: str,
        variables: dict[str, str],
        errors: IO[bytes],
        imported: Sequence[str] = ("torch",),
        main: Callable[[], None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*imported])
        self.returncode: int | None = None
        read, write = context.Pipe(duplex=False)
        get, put = context.Pipe(duplex=False)
        told = Connection(os.dup(errors.fileno()), readable=False)
        with read, write, get, put, told:
            self._process = context.Process(
                target=_become, args=((read, put, told), environment, variables, main)
            )
            try:
                with _environ(variables):  # the fork server gets it, if it is not there yet
                    self._process.start()
            except (OSError, EOFError) as error:
                from fastst_patch.bench.failures import BenchError

                what = f"copying a process that has imported {imported[0]}"
                raise BenchError(f"{what}: {error}") from error
            self.stdin: IO[bytes] | None = os.fdopen(os.dup(write.fileno()), "wb")
            self.stdout: IO[bytes] | None = os.fdopen(os.dup(get.fileno()), "rb")
        self.pid = int(self._process.pid or 0)

    def wait(self, timeout: float | None = None) -> int:
        """As of a Popen. It is 255 where the fork server, which would know, is gone."""
        self._process.join(timeout)
        self.returncode = self._process.exitcode
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def _become(
    files: tuple[Connection, Connection, Connection],
    environment: str,
    variables: dict[str, str],
    main: Callable[[], None] | None,
) -> None:
    """In the copy: be a process that was started with these files."""
    os.setpgid(0, 0)  # it is ended with what it starts
    gc.freeze()  # or the collector would write to, and so copy, all that was imported
    for target, file in enumerate(files):
        os.dup2(file.fileno(), target)
        file.close()
    stdin: Any = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdin = stdin
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(tempfile.gettempdir())
    if environment:
        sys.path.insert(0, environment)
    if main is None:
        from .child import main
    main()


@contextlib.contextmanager
def _environ(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
