"""The order of files: tensors one behind another, file by file, in groups of one file each.

    position = the file's first + number among its wanted tensors

Requests that follow each other closely are a walk: the tensors behind them are read ahead. A
tensor elsewhere is read alone; if the next request follows it closely, the walk goes on there.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, takewhile
from typing import Any

from ..layout import ARENA_ALIGNMENT, FileLayout
from .prefetcher import Group

__all__ = ["FileOrder", "groups_of"]


def groups_of(
    layout: FileLayout, numbers: Iterable[int], nbytes: int
) -> Iterator[tuple[list[int], int]]:
    """Split tensors of a file into groups, in their order: numbers, and bytes with padding.

    Args:
        layout: of the file.
        numbers: of the tensors.
        nbytes: the most bytes of a group; a larger tensor is a group of its own.
    """
    group: list[int] = []
    total = 0
    for i in numbers:
        padded = -(-layout.nbytes(i) // ARENA_ALIGNMENT) * ARENA_ALIGNMENT
        if group and total + padded > nbytes:
            yield group, total
            group, total = [], 0
        group.append(i)
        total += padded
    if group:
        yield group, total


class FileOrder:
    """An `Order`; keys are positions, and a group's source is the number of its file.

    Args:
        files: layout of each, and the numbers of its tensors that may be asked for, ascending.
        nbytes: of a group; a larger tensor is a group of its own.
        tensors: the most in a group; None: any number.
        near: how many positions behind a recent request the next request of a walk may be.
        lag: how many positions past a group a walk must be for it to be given up for the next.
        files_ahead: how many files behind the one in use may be started; None: any number.
        one_ahead: whether only the group right behind the one in use is started.

    Attributes:
        left_alone: files that are not read ahead.
    """

    def __init__(
        self,
        files: Sequence[tuple[FileLayout, Sequence[int]]],
        nbytes: int,
        *,
        tensors: int | None = None,
        near: int = 1,
        lag: int = 0,
        files_ahead: int | None = None,
        one_ahead: bool = False,
    ) -> None:
        self._files = files
        self._starts = list(accumulate((len(numbers) for _, numbers in files), initial=0))
        self._nbytes = nbytes
        self._tensors = tensors or self._starts[-1]
        self._near = near
        self._lag = lag
        self._files_ahead = files_ahead
        self._one_ahead = one_ahead
        self.left_alone: set[int] = set()
        # Several requests, because threads that share a walk get slightly out of order.
        self._recent: deque[int] = deque(maxlen=8)
        self._next = 0
        self._following: Group | None = None  # the group at _next, once it was made
        self._file = 0  # last asked for
        self._behind: int | None = None  # the position behind the group last asked for

    def position(self, k: int, i: int) -> int:
        """Where tensor i of file k is."""
        numbers = self._files[k][1]
        at = i if isinstance(numbers, range) else bisect.bisect_left(numbers, i)
        return self._starts[k] + at

    def expected(self, what: Any) -> bool:
        """Count the first tensor as the next one of a walk."""
        self._recent.append(-1)
        return True

    def requested(self, key: int, waiting: Mapping[Hashable, Group]) -> Group | None:
        """See `Order`."""
        self._file = self._file_of(key)
        group = waiting.get(key)
        if group is None and self._follows(key) and self._file not in self.left_alone:
            group = self._group(key, waiting)
        if group is not None:
            self._behind = group.last + 1
        self._recent.append(key)
        return group

    def next(self, waiting: Mapping[Hashable, Group]) -> Group | None:
        """See `Order`."""
        while self._next < self._starts[-1]:
            if self._next in waiting:
                self._next = waiting[self._next].last + 1
                continue
            k = self._file_of(self._next)
            if k in self.left_alone:
                self._next = self._starts[k + 1]
                continue
            if self._files_ahead is not None and k > self._file + self._files_ahead:
                return None
            if self._one_ahead and self._next != self._behind:
                return None
            if self._following is None or self._following.first != self._next:
                self._following = self._group(self._next, waiting)
            return self._following
        return None

    def started(self, group: Group) -> None:
        """See `Order`."""
        self._next = group.last + 1
        self._following = None

    def gives_up(self, oldest: Group, now: bool) -> bool:
        """See `Order`."""
        return now or (bool(self._recent) and oldest.last + self._lag < self._recent[-1])

    def clear(self) -> list[Group]:
        """See `Order`."""
        self._next = self._starts[-1]
        self._following = None
        return []

    def _file_of(self, position: int) -> int:
        return bisect.bisect_right(self._starts, position) - 1

    def _follows(self, position: int) -> bool:
        return any(0 < position - before <= self._near for before in self._recent)

    def _group(self, position: int, waiting: Mapping[Hashable, Group]) -> Group:
        """A group from a position on, up to the first tensor that waits in another group."""
        k = self._file_of(position)
        (layout, numbers), first = self._files[k], self._starts[k]
        end = min(self._starts[k + 1], position + self._tensors)
        free = takewhile(lambda at: at == position or at not in waiting, range(position, end))
        wanted = (numbers[at - first] for at in free)
        items, nbytes = next(groups_of(layout, wanted, self._nbytes))
        last = position + len(items) - 1
        keys: set[Hashable] = set(range(position, last + 1))
        return Group(k, position, last, items, keys, nbytes=nbytes, held=nbytes)
