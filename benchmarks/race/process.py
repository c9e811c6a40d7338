"""The race's timed processes: fresh, or copies of one that has imported torch (`copies`)."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastst_patch.bench.process import Child, ProcessFailedError, interpreter

from .copies import Copy

ROOT = Path(__file__).resolve().parents[2]
READY_S = 180.0  # to import everything and open the device

# The repository goes last on sys.path: the installed fastst_patch is what is raced, and a
# checkout beside it, which may hold no built extension, is not. A loader's side environment goes
# first, before anything is imported from where it would otherwise be found.
_BOOT = """
import sys
if sys.path and sys.path[0] == "":
    sys.path.pop(0)
root, environment = sys.argv[1:3]
sys.path.append(root)
if environment:
    sys.path.insert(0, environment)
sys.argv[1:] = []
from benchmarks.race.child import main
main()
"""


def environment_variables() -> dict[str, str]:
    """Those of this process, less the switches of fastst-patch: no loader is patched unasked."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FASTST_") or name.startswith("FASTST_RACE_")
    }
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def begin(
    message: Mapping[str, object], environment: str | None = None, *, copied: bool = False
) -> Child:
    """Start one process.

    Args:
        message: what it is to do.
        environment: folder that goes in front of its ``sys.path``.
        copied: it is a copy of the fork server; else it is started afresh.

    Raises:
        OSError, BenchError: it could not be started.
    """
    folder, variables = environment or "", environment_variables()
    if copied:
        return Child(message, lambda errors: Copy(folder, variables, errors))
    arguments = ("-c", _BOOT, str(ROOT), folder)
    return Child(message, interpreter(arguments, variables, tempfile.gettempdir()))


def ask(message: Mapping[str, object], seconds: float = 120.0) -> dict[str, Any]:
    """Ask a fresh process one question.

    Raises:
        ProcessFailedError: it did not answer.
    """
    with begin(message) as child:
        return child.answer(seconds)


# ---- some at a time -----------------------------------------------------


class Starters:
    """Processes that get ready some at a time, before any of them is timed.

    Starting is what takes longest, and can be done by several cores; being timed cannot. A context
    manager: none is left afterwards.

    Args:
        start: starts a process of a loader.
        order: loaders, as they will be asked for.
        at_once: how many get ready together.
    """

    def __init__(self, start: Callable[[str], Child], order: Sequence[str], at_once: int) -> None:
        self._start, self._waiting, self._at_once = start, list(order), at_once
        self._started: list[tuple[str, Child]] = []

    def __enter__(self) -> Starters:
        return self

    def __exit__(self, *exc: object) -> None:
        for _, child in self._started:
            child.close()
        self._started.clear()

    def take(self, name: str) -> Child:
        """Hand over a process of this loader that is ready or has failed; the caller closes it."""
        if name not in [started for started, _ in self._started]:
            self._begin(name)
        place = [started for started, _ in self._started].index(name)
        return self._started.pop(place)[1]

    def _begin(self, name: str) -> None:
        batch = [name]  # a repetition, unless it is waiting
        if name in self._waiting:
            at = self._waiting.index(name)
            batch = self._waiting[at : at + self._at_once]
            del self._waiting[: at + self._at_once]
        begun = [(one, self._start(one)) for one in batch]
        self._started += begun
        for _, child in begun:
            with contextlib.suppress(ProcessFailedError):  # its taker is told
                child.wait_ready(READY_S)

    def forget(self, name: str) -> None:
        """End what was begun for loads of this loader that are not wanted any more."""
        self._waiting = [one for one in self._waiting if one != name]
        for started, child in self._started:
            if started == name:
                child.close()
        self._started = [one for one in self._started if one[0] != name]
