"""What a process does that the environment has switched on, besides patching itself.

It logs what was patched. With ``run --profile`` it also appends each load to a file that all
processes share, which outlives whichever of them is killed, and one of them, or the launcher,
prints it at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from ..config import current, environment_profile
from ..dropin.handle import report_open_handles
from ..errors import OptionError
from ..report import LoadReport, listen
from ..report_table import render
from .patcher import PatchReport

__all__ = ["begin", "finish", "print_table"]

_log = logging.getLogger("fastst_patch")
_FIELDS = tuple(field.name for field in dataclasses.fields(LoadReport))


def begin(patched: PatchReport) -> None:
    """Called once, by the ``import fastst_patch`` that patches.

    Args:
        patched: what ``patch()`` returned.
    """
    _log.info("%s", _what_was_done(patched))
    profile = environment_profile()
    if profile is not None:
        path = profile[0]
        listen(lambda report: _append(path, report))
    if profile is not None or _log.isEnabledFor(logging.INFO):
        _report_at_end()


def _what_was_done(patched: PatchReport) -> str:
    """In a line, since each process says it."""
    if patched.reason is not None:
        return f"process {os.getpid()}: nothing patched: {patched.reason}"
    by_reason: dict[str, list[str]] = {}
    for status in patched.targets.values():
        state = "patched when imported" if status.later else status.reason or "patched"
        by_reason.setdefault(state, []).append(status.name)
    done = [f"{state}: {', '.join(names)}" for state, names in by_reason.items()]
    return f"process {os.getpid()}: " + "; ".join(done)


def _append(path: str, report: LoadReport) -> None:
    record = {"pid": os.getpid(), **dataclasses.asdict(report)}
    # One write, so that records of processes do not mix; begun with the newline, so that one
    # that was cut spoils no other. Opened anew, since programs close descriptors they do not know,
    # and never created: without it, nobody is there any more to read it.
    line = b"\n" + json.dumps(record).encode("ascii")
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(fd, line)
        finally:
            os.close(fd)


def _report_at_end() -> None:
    # Children of multiprocessing end without atexit, but they call their own finalizers; forked
    # ones forget those of their parent first.
    from multiprocessing import util

    def at_end(_: object = None) -> None:
        util.Finalize(None, report_open_handles, exitpriority=-100)  # after the others

    util.register_after_fork(_report_at_end, at_end)
    at_end()


# ---- the one that prints ----


def finish(path: str) -> None:
    """Print what this process and its children have loaded, at the end of this one."""
    report_open_handles()
    print_table(path)


def print_table(path: str, verbose: bool | None = None) -> None:
    """Print and remove a file of loads; nothing when it is gone.

    Args:
        path: of the file.
        verbose: more than fits the terminal; None: as the log level in force says.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
        os.unlink(path)
    except OSError:
        return
    stream = sys.__stderr__
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):  # closed
            loads = [load for line in lines for load in _load(line)]
            text = render(loads, verbose=_is_verbose() if verbose is None else verbose)
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            stream.flush()


def _is_verbose() -> bool:
    """Whether ``run -v``, or the environment, asks for more than fits the terminal."""
    try:
        return current().log_level in ("info", "debug")
    except OptionError:
        return False


def _load(line: bytes) -> list[tuple[int, LoadReport]]:
    """The load in a line; none in an empty line or one that was cut."""
    try:
        record: dict[str, Any] = json.loads(line)
        return [(record["pid"], LoadReport(**{name: record[name] for name in _FIELDS}))]
    except (ValueError, TypeError, KeyError):
        return []
