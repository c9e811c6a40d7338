"""The order of parts of tensors, which are predicted from what was used of earlier tensors.

    model.layers.3.mlp.experts.17.w1    expert 17 of the layers before, or else any expert

What was used of a tensor predicts what will be used of the next one whose name differs in its
numbers alone, if shape and dtype are the same. "Nothing" is a prediction, too: of the layers of
other pipeline stages, and of other ranks' experts.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

from ..layout import FileLayout
from .parts import Part, itemsize_of
from .prefetcher import MOST_ITEMS, Group

__all__ = ["PartOrder"]

_NUMBER = re.compile(r"[0-9]+")

_LOOK = 128
"""Most tensors that are looked ahead, in search of one that will be used."""


class PartOrder:
    """An `Order` of predicted parts.

    Keys are pairs of a position and a part. Positions count the tensors as they are given. The
    source of a group is the number of its file.

    Args:
        files: layout of each, and the numbers of its tensors that are given.
        nbytes: of a group; a larger part is a group of its own.
    """

    def __init__(self, files: Sequence[tuple[FileLayout, Sequence[int]]], nbytes: int) -> None:
        self._layouts = [layout for layout, _ in files]
        self.places = [(k, i) for k, (_, numbers) in enumerate(files) for i in numbers]
        self._nbytes = nbytes
        self._known: dict[Hashable, tuple[Part, ...]] = {}
        self._late: set[Hashable] = set()  # kinds that are used when the next tensor is given
        self._at = -1  # the tensor given last
        self._used: dict[Part, None] = {}  # of it
        self._next = 0  # behind all that were started
        self._cursor = 0  # behind all that were looked at
        self._group: Group | None = None  # the next one
        self._full = False  # nothing more joins it
        self._kinds_of: dict[int, tuple[Hashable, Hashable]] = {}  # of those looked at

    def expected(self, what: int) -> bool:
        """Note that a tensor is given, by its position: the one before was used.

        Engines that copy in other threads, or stack tensors, may use it later.
        """
        if self._at >= 0:
            if self._used or self._kinds(self._at)[0] not in self._late:
                self._learn(self._at, tuple(self._used))
            self._kinds_of.pop(self._at, None)
        self._at, self._used = what, {}
        return True

    def requested(self, key: tuple[int, Part], waiting: Mapping[Hashable, Group]) -> Group | None:
        """See `Order`."""
        position, part = key
        if position == self._at:
            self._used[part] = None
        else:
            kind = self._kinds(position)[0]
            self._late.add(kind)
            before = self._known.get(kind, ())
            if part not in before:
                self._learn(position, (*before, part))
            self._kinds_of.pop(position, None)
        group = waiting.get(key)
        if group is None and self._group is not None and key in self._group.waiting:
            group = self._group
        return group

    def next(self, waiting: Mapping[Hashable, Group]) -> Group | None:
        """See `Order`. A group that is not full can wait until half of what is ahead is used."""
        if self._group is not None and self._group.last < self._at:
            self._group, self._full = None, False
        if not self._full:
            self._look_ahead()
        group = self._group
        if group is None or self._full or group.first <= self._at + _LOOK // 2:
            return group
        return None

    def started(self, group: Group) -> None:
        """See `Order`."""
        self._next = group.last + 1
        self._group, self._full = None, False

    def gives_up(self, oldest: Group, now: bool) -> bool:
        """Give up what was predicted and not used."""
        return oldest.last < self._at

    def clear(self) -> list[Group]:
        """See `Order`."""
        self._next = self._cursor = len(self.places)
        self._group = None
        return []

    def _kinds(self, position: int) -> tuple[Hashable, Hashable]:
        """What tensors have in common: in other layers, and in other layers and experts."""
        found = self._kinds_of.get(position)
        if found is None:
            k, i = self.places[position]
            layout = self._layouts[k]
            name, form = layout.names[i], (tuple(layout.shape(i)), layout.dtype(i))
            found = (_NUMBER.sub("#", name, count=1), form), (_NUMBER.sub("#", name), form, "any")
            self._kinds_of[position] = found
        return found

    def _learn(self, position: int, parts: tuple[Part, ...]) -> None:
        layer, any_number = self._kinds(position)
        if self._known.get(layer, parts) != parts:  # so what was looked at is wrong, too
            self._cursor = self._next
            self._group, self._full = None, False
        self._known[layer] = self._known[any_number] = parts

    def _predicted(self, position: int) -> tuple[Part, ...] | None:
        """The parts that will be used of a tensor; None: nothing like it was seen."""
        layer, any_number = self._kinds(position)
        found = self._known.get(layer)
        return self._known.get(any_number) if found is None else found

    def _look_ahead(self) -> None:
        """Add to the group what is predicted next."""
        self._cursor = max(self._cursor, self._next, self._at, 0)
        while self._cursor < min(len(self.places), self._at + _LOOK):
            position = self._cursor
            parts = self._predicted(position)
            if parts is None and position > self._at:
                return
            if parts:
                if self._group is None:
                    self._group = Group(self.places[position][0], position)
                elif not self._joins(self._group, position, parts):
                    self._full = True
                    return
                self._add(self._group, position, parts)
            self._cursor += 1

    def _joins(self, group: Group, position: int, parts: tuple[Part, ...]) -> bool:
        nbytes = sum(self._bytes(position, part) for part in parts)
        return (
            group.source == self.places[position][0]
            and group.nbytes + nbytes <= self._nbytes
            and len(group.items) < MOST_ITEMS
        )

    def _add(self, group: Group, position: int, parts: tuple[Part, ...]) -> None:
        group.last = position
        for part in parts:
            nbytes = self._bytes(position, part)
            group.items.append((self.places[position][1], part))
            group.waiting.add((position, part))
            group.nbytes += nbytes
            group.held += nbytes

    def _bytes(self, position: int, part: Part) -> int:
        k, i = self.places[position]
        return part.numel * itemsize_of(self._layouts[k], i)
