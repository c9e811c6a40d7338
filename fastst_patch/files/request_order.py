"""The order of requests: what a handle on a file without a map reads ahead.

Requests are predicted as for mapped files (`pattern`). What is asked for is started first, alone;
what is predicted follows in groups.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from ..layout import FileLayout
from .pattern import AccessPattern, Walk
from .prefetcher import Group

__all__ = ["RequestOrder"]

_MOST = 256
"""Most tensors of a group: starting one stays short however small its tensors are."""

_STALE = 32
"""Requests after which a group that nothing is asked of is given up for another one."""


class RequestOrder:
    """An `Order` of one file; keys are numbers of tensors.

    Args:
        layout: of the file.
        nbytes: of a group; a larger tensor is a group of its own. A tensor is usable when those in
            front of it in its group are, so groups are small.
    """

    def __init__(self, layout: FileLayout, nbytes: int) -> None:
        self._layout = layout
        self._nbytes = nbytes
        self._pattern = AccessPattern(layout)
        self._walk: Walk | None = None  # of the last request that belonged to one
        self._following: Group | None = None  # the group to be started next, once it was made
        self._requests = 0
        self._used: dict[Group, int] = {}  # the request that last asked for something of a group

    def expected(self, what: Any) -> bool:
        """Nothing is announced."""
        return True

    def requested(self, key: int, waiting: Mapping[Hashable, Group]) -> Group | None:
        """The group that has a tensor, or a new one of it alone."""
        self._requests += 1
        self._walk = self._pattern.request(key) or self._walk
        group = waiting.get(key)
        if group is not None:
            self._used[group] = self._requests
            if len(group.waiting) == 1:
                del self._used[group]
            return group
        self._leave_out(key)
        nbytes = self._layout.nbytes(key)
        # It is handed out at once, so it does not count as read ahead.
        return Group(None, items=[key], waiting={key}, nbytes=nbytes)

    def next(self, waiting: Mapping[Hashable, Group]) -> Group | None:
        """See `Order`."""
        if self._following is None and self._walk is not None:
            self._following = self._predicted(self._walk, waiting)
        return self._following

    def started(self, group: Group) -> None:
        """See `Order`."""
        if group is self._following:
            self._following = None
            self._used[group] = self._requests

    def gives_up(self, oldest: Group, now: bool) -> bool:
        """See `Order`."""
        stale = self._used.get(oldest, 0) + _STALE < self._requests
        if now or stale:
            self._used.pop(oldest, None)
        return now or stale

    def clear(self) -> list[Group]:
        """See `Order`."""
        self._walk = self._following = None
        self._used.clear()
        return []

    def _leave_out(self, key: int) -> None:
        """A tensor that is asked for now is not read ahead as well."""
        group = self._following
        if group is None or key not in group.waiting:
            return
        group.items.remove(key)
        group.waiting.remove(key)
        group.nbytes -= self._layout.nbytes(key)
        group.held = group.nbytes
        if not group.items:
            self._following = None

    def _predicted(self, walk: Walk, waiting: Mapping[Hashable, Group]) -> Group | None:
        group = Group(None)
        while len(group.items) < _MOST and group.nbytes < self._nbytes:
            i = walk.foresee()
            if i is None:
                break
            nbytes = self._layout.nbytes(i)
            walk.add(i, nbytes)
            if i in waiting:
                continue
            group.items.append(i)
            group.waiting.add(i)
            group.nbytes += nbytes
        group.held = group.nbytes
        group.items.sort()  # as they lie in the file
        return group if group.items else None
