"""Tensors that a consumer announces in the order of use, and that are moving when it takes them.

    ask -> open group of its kind -> full: queued -> started (bytes move) -> taken one by one

A consumer first says what it will want (`RequestPrefetcher.ask`), and later takes it
(`RequestPrefetcher.take`). Groups have some tens of MiB. They start in the order in which they are
full, as long as no more than `FLIGHT` bytes are still moving and, of kinds whose tensors are only
passed through (merged or cast by the consumer, and then freed), no more than `BUDGET` bytes wait
to be taken. A group of which something is taken starts whatever the bounds say: they make a
consumer wait, never fail.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..files.prefetcher import Group, Pending, Prefetcher

if TYPE_CHECKING:
    import torch

__all__ = ["Kind", "Request", "RequestPrefetcher"]

_log = logging.getLogger("fastst_patch")

MIB = 1 << 20
GROUP = 64 * MIB
"""Bytes of one group: a bus moves them in a millisecond or two, beside which starting is cheap."""

FLIGHT = 1024 * MIB
"""Most bytes moving at a time: enough to keep a bus busy while the consumer does other things."""

BUDGET = 512 * MIB
"""Most bytes of tensors passed through that wait to be taken, unless ``device_memory_budget``."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """Tensors that may share a group.

    Attributes:
        key: tells kinds apart.
        start: starts moving some items.
        passing: the consumer frees them soon after it took them.
    """

    key: Hashable
    start: Callable[[Sequence[Any]], Pending]
    passing: bool = False


@dataclasses.dataclass(eq=False)
class Request:
    """A tensor asked for.

    Attributes:
        kind: says how it is moved.
        item: names it, for ``kind.start`` and for what that returns.
        nbytes: its size.
        group: what it moves with; None where it is moved alone.
    """

    kind: Kind
    item: Any
    nbytes: int
    group: Group | None = None


class RequestPrefetcher:
    """See the module. Usable from any thread; waiting holds no lock. It belongs to one load.

    Args:
        budget: the ``device_memory_budget`` given by the user, which then bounds everything
            that waits to be taken; None for the defaults.
    """

    def __init__(self, budget: int | None) -> None:
        if budget is None:
            nbytes, flight, most = GROUP, FLIGHT, BUDGET
        else:
            nbytes, flight, most = max(1, min(GROUP, budget // 3)), min(FLIGHT, budget), budget
        order = _RequestOrder(nbytes, all_count=budget is not None)
        self._prefetcher = Prefetcher(order, lambda: most, flight=flight, one=True)

    def ask(self, kind: Kind, item: Any, nbytes: int) -> Request:
        """Say that a tensor will be taken, after those asked for before. Never raises."""
        request = Request(kind, item, nbytes)
        self._prefetcher.expect(request, _start)
        return request

    def flush(self) -> None:
        """Queue the groups that are not full, too: nothing more is asked for, for now."""
        self._prefetcher.expect(None, _start)

    def take(self, request: Request) -> torch.Tensor:
        """A tensor asked for, usable on any stream; once for each request.

        Raises:
            Exception: what starting its group or reading it raised. Nothing of ours holds the
                tensor's memory then.
        """
        pending: Pending | None = None
        try:
            pending = self._prefetcher.hand_out(request, _start)
            if pending is None:
                pending = request.kind.start([request.item])
            return pending.take(request.item)
        except BaseException as raised:
            traceback.clear_frames(raised.__traceback__)  # they hold what has moved
            raise
        finally:
            del pending

    def drop(self) -> None:
        """Forget everything not taken; bytes in flight are waited for. For the end and errors."""
        self._prefetcher.drop()


def _start(group: Group) -> Pending:
    kind: Kind = group.source
    try:
        return kind.start(group.items)
    except Exception as error:
        _log.debug("a group could not be started", exc_info=True)
        # Its frames hold the group, and the memory that was allocated for it.
        error.__traceback__ = error.__context__ = None
        return _Failed(error)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


class _Failed:
    """Stands for a group that could not be started: each taker of a tensor gets the error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def landed(self) -> bool:
        """Nothing moves."""
        return True

    def take(self, item: Any) -> torch.Tensor:
        """Raise the error."""
        try:
            raise self._error
        finally:
            self._error.__traceback__ = None


class _RequestOrder:
    """An `Order` of announced requests, which are its keys; a group's source is its kind.

    Args:
        nbytes: from which on a group is full.
        all_count: whether tensors count against the bound whatever becomes of them.
    """

    def __init__(self, nbytes: int, all_count: bool) -> None:
        self._nbytes = nbytes
        self._all_count = all_count
        self._open: dict[Hashable, Group] = {}  # by kind, in the order of their first requests
        self._queued: deque[Group] = deque()

    def expected(self, what: Request | None) -> bool:
        """Add a request to the open group of its kind; None: close all."""
        if what is None:
            self._close()
            return True
        kind = what.kind
        group = self._open.get(kind.key)
        if group is None:
            group = self._open[kind.key] = Group(kind)
        counted = what.nbytes if self._all_count or kind.passing else 0
        what.group = group
        group.items.append(what.item)
        group.waiting.add(what)
        group.nbytes += what.nbytes
        group.held += counted
        if group.nbytes < self._nbytes:
            return False
        self._queued.append(self._open.pop(kind.key))
        return True

    def _close(self) -> None:
        self._queued.extend(self._open.values())
        self._open.clear()

    def requested(self, key: Request, waiting: Mapping[Hashable, Group]) -> Group | None:
        """The request's group. RuntimeError: it was dropped. KeyError: the request was served."""
        group = key.group
        if group is None:
            return None
        if group.over:
            raise RuntimeError("the load is over")
        if key not in group.waiting:
            raise KeyError(key.item)
        self._close()
        return group

    def next(self, waiting: Mapping[Hashable, Group]) -> Group | None:
        """See `Order`."""
        return self._queued[0] if self._queued else None

    def started(self, group: Group) -> None:
        """See `Order`."""
        self._queued.remove(group)

    def gives_up(self, oldest: Group, now: bool) -> bool:
        """Never: what was asked for is kept until it is taken."""
        return False

    def clear(self) -> list[Group]:
        """See `Order`."""
        groups = [*self._open.values(), *self._queued]
        self._open.clear()
        self._queued.clear()
        return groups
