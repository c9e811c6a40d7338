"""What a process does when ``FASTST_ENABLED`` has patched it.

It logs the patched targets. With ``run --profile`` it also appends each load to a file that all
processes share, and that stays when one of them is killed. One of them, or the launcher, prints
the file at the end.
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
from ..errors import OptionError
from ..report import LoadReport, listen
from ..report_table import render
from .patcher import PatchReport

__all__ = ["begin", "finish", "print_table"]

_log = logging.getLogger("fastst_patch")
_FIELDS = tuple(field.name for field in dataclasses.fields(LoadReport))


def begin(patched: PatchReport) -> None:
    """Begin to log and to record. Called once, by the ``import fastst_patch`` that patches.

    Args:
        patched: result of ``patch()``.
    """
    _log.info("%s", _what_was_done(patched))
    profile = environment_profile()
    if profile is not None:
        path = profile[0]
        listen(lambda report: _append(path, report))
    if profile is not None or _log.isEnabledFor(logging.INFO):
        _report_at_end()


def _what_was_done(patched: PatchReport) -> str:
    """The report in one line, since each process logs it."""
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
    # One write per record, so that records of processes do not mix. The newline comes first, so
    # that a record that was cut off spoils no other one. The file is opened each time, because
    # programs close descriptors that they do not know, and never created: its reader removes it.
    line = b"\n" + json.dumps(record).encode("ascii")
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(fd, line)
        finally:
            os.close(fd)


def _report_open_handles() -> None:
    handle = sys.modules.get(f"{__package__.partition('.')[0]}.dropin.handle")
    if handle is not None:  # else nothing was opened
        handle.report_open_handles()


def _report_at_end() -> None:
    # Children of multiprocessing do not run atexit functions but their finalizers. Forked children
    # drop the finalizers of their parent first.
    from multiprocessing import util

    def at_end(_: object = None) -> None:
        util.Finalize(None, _report_open_handles, exitpriority=-100)  # after all others

    util.register_after_fork(_report_at_end, at_end)
    at_end()


# ---- printing ----


def finish(path: str) -> None:
    """Print the loads of this process and its children, at the end of this process."""
    _report_open_handles()
    print_table(path)


def print_table(path: str, verbose: bool | None = None) -> None:
    """Print and remove a file of loads; does nothing when it is gone.

    Args:
        path: of the file.
        verbose: print all columns, however wide; None: if the log level is info or debug.
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
    """Whether ``run -v``, or the environment, asks for all columns."""
    try:
        return current().log_level in ("info", "debug")
    except OptionError:
        return False


def _load(line: bytes) -> list[tuple[int, LoadReport]]:
    """The load in a line; none when the line is empty or was cut off."""
    try:
        record: dict[str, Any] = json.loads(line)
        return [(record["pid"], LoadReport(**{name: record[name] for name in _FIELDS}))]
    except (ValueError, TypeError, KeyError):
        return []
