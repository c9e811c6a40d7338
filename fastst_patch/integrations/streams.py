"""Tensors on their way to a device before they are asked for: grouped, bounded, handed out singly.

A consumer first says what it will want, in the order of use (`Stream.ask`), and later takes it
(`Stream.take`). What was asked for is moved in groups of some tens of MiB:

    ask -> open group of its lane -> full: waits -> started (bytes move) -> taken one by one

Groups start in the order of their first tensor, as long as no more than `flight` bytes are still
moving and, of lanes whose tensors are only passed through (merged or cast by the consumer, and
then freed), no more than `budget` bytes wait to be taken. What is taken is started whatever the
bounds say: they make it wait, never fail.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..locks import Guard

if TYPE_CHECKING:
    import torch

__all__ = ["Lane", "Moving", "Stream", "Ticket"]

_log = logging.getLogger("fastst_patch")

MIB = 1 << 20
WINDOW = 64 * MIB
"""Bytes of one group: a millisecond or two of a bus, so that starting one costs little beside."""

FLIGHT = 1024 * MIB
"""Most bytes moving at a time: enough to keep a bus busy while the consumer does other things."""

BUDGET = 512 * MIB
"""Most bytes of tensors passed through that wait to be taken, unless ``device_memory_budget``."""


class Moving(Protocol):
    """A group under way. Dropping it cancels what has not landed."""

    def landed(self) -> bool:
        """Whether all of it is there, or has failed. Never blocks."""

    def take(self, item: Any) -> torch.Tensor:
        """Wait for one tensor and let go of it."""


@dataclasses.dataclass(frozen=True)
class Lane:
    """Tensors that may share a group.

    Attributes:
        key: tells lanes apart.
        start: starts moving some items.
        passing: the consumer frees them soon after it took them.
    """

    key: Hashable
    start: Callable[[Sequence[Any]], Moving]
    passing: bool = False


@dataclasses.dataclass(eq=False)
class _Group:
    lane: Lane
    order: int  # of its first ticket
    items: list[Any] = dataclasses.field(default_factory=list)
    nbytes: int = 0
    waiting: int = 0  # tickets not taken
    held: int = 0  # bytes of them
    moving: Moving | None = None
    started: bool = False
    error: Exception | None = None


class Ticket:
    """A tensor asked for."""

    __slots__ = ("group", "item", "nbytes")

    def __init__(self, group: _Group, item: Any, nbytes: int) -> None:
        self.group = group
        self.item = item
        self.nbytes = nbytes


class Stream:
    """See the module. Usable from any thread; waiting holds no lock.

    It belongs to one load. Code that interrupts the load, as a signal's handler does, loads by a
    stream of its own and never meets this one half changed.

    Args:
        budget: the ``device_memory_budget`` given by the user, which then bounds everything
            that waits to be taken; None for the defaults.
    """

    def __init__(self, budget: int | None) -> None:
        self._guard = Guard()
        self._window = WINDOW if budget is None else max(1, min(WINDOW, budget // 3))
        self._flight = FLIGHT if budget is None else min(FLIGHT, budget)
        self._budget = BUDGET if budget is None else budget
        self._all_count = budget is not None
        self._open: dict[Hashable, _Group] = {}
        self._queued: deque[_Group] = deque()
        self._flying: list[_Group] = []  # started, not known to have landed
        self._live: set[_Group] = set()  # started, not all taken
        self._held = 0
        self._asked = 0

    def ask(self, lane: Lane, item: Any, nbytes: int) -> Ticket:
        """Say that a tensor will be taken, after those asked for before. Never raises."""
        with self._guard.lock(self._let_go):
            group = self._open.get(lane.key)
            if group is None:
                group = self._open[lane.key] = _Group(lane, self._asked)
            self._asked += 1
            group.items.append(item)
            group.nbytes += nbytes
            group.waiting += 1
            group.held += nbytes
            if group.nbytes >= self._window:
                self._queued.append(self._open.pop(lane.key))
                self._advance()
            return Ticket(group, item, nbytes)

    def flush(self) -> None:
        """Nothing more will be asked for, for now: queue what is not full, too."""
        with self._guard.lock(self._let_go):
            self._queued.extend(sorted(self._open.values(), key=lambda group: group.order))
            self._open.clear()
            self._advance()

    def take(self, ticket: Ticket) -> torch.Tensor:
        """A tensor asked for, usable on any stream; once for each ticket.

        Raises:
            Exception: what starting its group or reading it raised. Nothing of ours holds the
                tensor's memory then.
        """
        group = ticket.group
        with self._guard.lock(self._let_go):
            if self._open:
                self.flush()
            if not group.started:
                self._queued.remove(group)
                self._start(group)
            moving, error = group.moving, group.error
        try:
            if error is not None:
                raise error
            assert moving is not None
            return moving.take(ticket.item)
        except BaseException as raised:
            traceback.clear_frames(raised.__traceback__)  # they hold what has moved
            raise
        finally:
            if error is not None:
                error.__traceback__ = None
            del moving, error
            with self._guard.lock(self._let_go):
                self._taken(ticket)
                self._advance()

    def drop(self) -> None:
        """Forget everything not taken; bytes in flight are waited for. For the end and errors."""
        with self._guard.lock(self._let_go):
            self._let_go()

    # ---- with the lock held ----

    def _let_go(self) -> object:
        groups = [*self._open.values(), *self._queued, *self._live]
        old = [group.moving for group in groups]
        self._open.clear()
        self._queued.clear()
        self._flying.clear()
        self._live.clear()
        for group in groups:
            group.moving = None
            group.started = True
            group.error = group.error or RuntimeError("the load is over")
        return old

    def _counts(self, group: _Group) -> bool:
        return self._all_count or group.lane.passing

    def _taken(self, ticket: Ticket) -> None:
        group = ticket.group
        group.waiting -= 1
        group.held -= ticket.nbytes
        if group.started and self._counts(group):
            self._held -= ticket.nbytes
        if group.waiting == 0:
            group.moving = None
            self._live.discard(group)

    def _start(self, group: _Group) -> None:
        group.started = True
        if self._counts(group):
            self._held += group.held
        try:
            group.moving = group.lane.start(group.items)
        except Exception as error:  # told to whoever takes one of its tensors
            _log.debug("a group could not be started", exc_info=True)
            group.error = error
            # Its frames hold the group, and what there is of its memory.
            error.__traceback__ = error.__context__ = None
        except BaseException as error:
            group.error = RuntimeError("starting it was interrupted")
            traceback.clear_frames(error.__traceback__)
            raise
        else:
            self._flying.append(group)
            self._live.add(group)
        group.items = []

    def _advance(self) -> None:
        while self._queued:
            self._flying = [
                group
                for group in self._flying
                if group.moving is not None and not group.moving.landed()
            ]
            group = self._queued[0]
            flying = sum(other.nbytes for other in self._flying)
            if flying and flying + group.nbytes > self._flight:
                return
            if self._counts(group) and self._held and self._held + group.held > self._budget:
                return
            self._queued.popleft()
            self._start(group)
