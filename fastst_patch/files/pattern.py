"""In which order a handle is asked for its tensors, and so which will be asked for next.

Programs walk a file in one of a few orders: as it lies in the file, by sorted names (`keys()`), by
names with numbers in their order (layer 2 before layer 10); forwards, backwards, or every tenth.
Several threads, or several loops, may each be at another place. Two requests next to each other in
one of the orders start a `Walk`, or three with the same distance between them; what it foresees is
read ahead, and each request that it has foreseen confirms it.

Pure: no I/O, no torch. Without locks: all of this is hints. Threads that meet, or a handler that
strikes, can make something be foreseen twice or once less.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence

from ..layout import FileLayout

__all__ = ["AccessPattern", "Walk"]

RECENT = 8
"""Requests that a new one is compared with: threads that share a walk come out of order."""

WALKS = 8
"""Walks at a time; the one that began first is forgotten."""

NATURAL_FROM = 4
"""Requests before names are put in natural order: some 30 ms for 20,000, once a file."""


class _Order:
    """One order of a file's tensors: number -> place, and back."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers
        self.places: Sequence[int] = numbers
        if not isinstance(numbers, range):
            places = array("Q", bytes(8 * len(numbers)))
            for place, i in enumerate(numbers):
                places[i] = place
            self.places = places


class Walk:
    """A way through the tensors: from a place in an order, by steps of a constant length.

    Attributes:
        ahead: numbers foreseen and not asked for yet.
        nbytes: of those together, as far as they are to be read.
        dense: whether neighbours follow each other, so that what lies between is wanted, too.
    """

    def __init__(self, order: _Order, place: int, step: int) -> None:
        self._order = order
        self._next = place + step
        self._step = step
        self.ahead: dict[int, int] = {}  # number -> bytes
        self.nbytes = 0

    @property
    def dense(self) -> bool:
        """See above."""
        return abs(self._step) == 1

    def foresee(self) -> int | None:
        """The next tensor; None at the end."""
        if not 0 <= self._next < len(self._order.numbers):
            return None
        result = self._order.numbers[self._next]
        self._next += self._step
        return result

    def add(self, i: int, nbytes: int) -> None:
        """Note that a tensor is being read ahead."""
        self.nbytes += nbytes - self.ahead.get(i, 0)
        self.ahead[i] = nbytes

    def passed(self, i: int) -> bool:
        """Note a request: whether this walk has foreseen it."""
        nbytes = self.ahead.pop(i, None)
        if nbytes is None:
            return False
        self.nbytes -= nbytes
        return True


class AccessPattern:
    """The requests to one handle so far. Usable from any thread."""

    def __init__(self, layout: FileLayout) -> None:
        self._layout = layout
        self._orders: list[_Order] = [_Order(range(len(layout.names)))]
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._walks: deque[Walk] = deque(maxlen=WALKS)

    def request(self, i: int) -> Walk | None:
        """Note a request for tensor i; the walk that it belongs to, if any."""
        for walk in list(self._walks):
            if walk.passed(i):
                self._recent.append(i)
                return walk
        recent = list(self._recent)
        if i in recent:  # in pieces, or once more: that tells of no order
            return None
        self._recent.append(i)
        found = self._found(i, recent)
        if found is not None:
            self._walks.append(found)
        return found

    def _found(self, i: int, recent: list[int]) -> Walk | None:
        orders = self._known_orders(len(recent))
        for order in orders:
            place = order.places[i]
            before = [order.places[other] for other in recent]
            for step in (1, -1):
                if place - step in before:
                    return Walk(order, place, step)
        for order in orders if len(recent) > 1 else ():
            first, second = (order.places[other] for other in recent[-2:])
            step = order.places[i] - second
            if step and step == second - first:
                return Walk(order, order.places[i], step)
        return None

    def _known_orders(self, requests: int) -> list[_Order]:
        """The orders to compare with, each made when those before it have explained nothing."""
        layout, known = self._layout, self._orders
        if requests and len(known) == 1:
            known.append(self._by(layout.sorted_names))
        if requests >= NATURAL_FROM and len(known) == 2:
            known.append(self._by(layout.natural_names))
        return known

    def _by(self, names: Sequence[str]) -> _Order:
        return _Order(array("Q", [self._layout.index[name] for name in names]))
