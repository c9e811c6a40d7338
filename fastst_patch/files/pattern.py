"""Predicts which tensors a handle will be asked for next, from the order of earlier requests.

Programs read a file in one of a few orders: by offset, by sorted names (`keys()`), or by names
with their numbers in order (layer 2 before layer 10); forwards, backwards, or every tenth tensor.
Several threads, or several loops, may each be at another place. Two requests that are neighbours
in one of the orders start a `Walk`; so do three requests at equal distances. The tensors that a
walk predicts are read ahead, and each predicted request confirms the walk.

This module does no I/O and does not use torch. It takes no lock, because a wrong prediction costs
only time: threads that meet, or a signal's handler, may make it predict a tensor twice, or not.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence

from ..layout import FileLayout

__all__ = ["AccessPattern", "Walk"]

RECENT = 8
"""How many requests a new one is compared with: threads that share a walk get out of order."""

WALKS = 8
"""Most walks at a time; one more replaces the oldest."""

NATURAL_FROM = 4
"""Requests before the names are sorted in natural order, which takes some 30 ms for 20,000 names,
once for each file."""


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
    """A sequence of tensors: from a place in an order on, by steps of a constant length.

    Attributes:
        ahead: numbers of the tensors predicted and not asked for yet, each with the bytes that
            are read ahead for it.
        nbytes: sum of these bytes.
        dense: whether the steps have length 1: then the bytes between two tensors are wanted, too.
    """

    def __init__(self, order: _Order, place: int, step: int) -> None:
        self._order = order
        self._next = place + step
        self._step = step
        self.ahead: dict[int, int] = {}
        self.nbytes = 0

    @property
    def dense(self) -> bool:
        """See above."""
        return abs(self._step) == 1

    def foresee(self) -> int | None:
        """Number of the next tensor; None at the end."""
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
        """Note a request for tensor i; return whether this walk had predicted it."""
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
        """Note a request for tensor i; return the walk that it belongs to, if any."""
        for walk in list(self._walks):
            if walk.passed(i):
                self._recent.append(i)
                return walk
        recent = list(self._recent)
        if i in recent:  # taken in pieces, or once more: no order shows in it
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
        """The orders to compare with. Each is made once the cheaper ones have not fitted."""
        layout, known = self._layout, self._orders
        if requests and len(known) == 1:
            known.append(self._by(layout.sorted_names))
        if requests >= NATURAL_FROM and len(known) == 2:
            known.append(self._by(layout.natural_names))
        return known

    def _by(self, names: Sequence[str]) -> _Order:
        return _Order(array("Q", [self._layout.index[name] for name in names]))
