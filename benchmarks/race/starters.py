"""Processes that get ready some at a time, before any of them is timed.

Starting is what takes longest, and can be done by several cores; being timed cannot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import process
from .entrants import read_by

if TYPE_CHECKING:
    from .loaders import Loader
    from .runner import Race, Written

READY_S = 180.0  # to import everything and open the device


class Starters:
    """The processes of one cell in one round. A context manager: none is left afterwards.

    Args:
        run: whose loaders, device and number at once are meant.
        written: the workload.
        order: loaders, as they will be asked for.
        again: loaders that will be asked for twice in a row.
        afresh: every process imports torch itself, also where there is a template to copy.
    """

    def __init__(
        self,
        run: Race,
        written: Written,
        order: Sequence[str],
        again: set[str],
        *,
        afresh: bool = True,
    ) -> None:
        self._run = run
        self._written = written
        self._waiting = [name for name in order for _ in range(2 if name in again else 1)]
        self._started: list[tuple[str, process.Child]] = []
        self._loaders = {loader.name: loader for loader in run.entrants.running}
        self._copied = None if afresh else run.template

    def __enter__(self) -> Starters:
        return self

    def __exit__(self, *exc: object) -> None:
        for _, child in self._started:
            child.close()
        self._started.clear()

    def loader(self, name: str) -> Loader:
        """The loader of that name."""
        return self._loaders[name]

    def take(self, name: str) -> process.Child:
        """Hand over a process of this loader that is ready or has failed; the caller closes it."""
        for place, (started, child) in enumerate(self._started):
            if started == name:
                del self._started[place]
                return child
        batch = [name]  # a repetition, unless it is waiting
        if name in self._waiting:
            at = self._waiting.index(name)
            batch = self._waiting[at : at + self._run.at_once]
            del self._waiting[: at + self._run.at_once]
        begun = [(one, self._start(one)) for one in batch]
        self._started += begun
        for _, child in begun:
            with contextlib.suppress(process.ProcessFailedError):  # whoever takes it hears of it
                child.wait_ready(READY_S)
        return self.take(name)

    def forget(self, name: str) -> None:
        """End what was begun for loads of this loader that are not wanted any more."""
        self._waiting = [one for one in self._waiting if one != name]
        for started, child in self._started:
            if started == name:
                child.close()
        self._started = [one for one in self._started if one[0] != name]

    def _start(self, name: str) -> process.Child:
        run, loader = self._run, self._loaders[name]
        source = run.entrants.source
        message = {
            "kind": "load",
            "loader": name,
            "module": source.module,
            "folder": source.folder,
            "device": run.device,
            "files": self._written.files,
            "read": read_by(loader, self._written.files),
            "truth": self._written.truth,
        }
        return process.Child(message, run.entrants.environment_of(loader), self._copied)
