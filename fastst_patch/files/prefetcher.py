"""Groups of items that are read ahead of their use: the one scheduler behind three fronts.

    order -> next group -> within the bounds -> started: a `Pending` -> handed out -> gone

An `Order` says which items make a group and which group comes next; a function that is given to
each call starts one. A handle and the explicit loader read in the order of their files
(`file_order`); integrations announce each item before they take it
(`fastst_patch.integrations.prefetch`).

The function that starts groups is not kept: a file that keeps its prefetcher would else be part
of a reference cycle, and its memory would wait for the garbage collector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..locks import Guard, here, interrupted

if TYPE_CHECKING:
    import torch

__all__ = ["Group", "Order", "Pending", "Prefetcher", "Start"]


class Pending(Protocol):
    """Tensors on their way, each to be taken as often as it was asked for.

    Dropping it cancels what has not landed.
    """

    def landed(self) -> bool:
        """Whether nothing moves any more: all of it is there, or has failed. Never blocks."""

    def take(self, item: Any, /) -> torch.Tensor:
        """Wait for one tensor, and let go of it. Raises as `OpenedFile.tensor`."""


@dataclasses.dataclass(eq=False)
class Group:
    """Items that move together.

    Attributes:
        source: where they come from: tells the function that starts groups what to start.
        first: position of the first item, in an order that has positions.
        last: position of the last item.
        items: what is to be started; empty afterwards.
        waiting: by the key of each item not handed out: the bytes that no longer count against
            the bound once it is. What is left of `held` goes with the last item.
        nbytes: of all items.
        held: bytes that count against the bound.
        pending: what is on its way; None before the start, and after the last item.
        over: whether it was dropped.
    """

    source: Any
    first: int = 0
    last: int = 0
    items: list[Any] = dataclasses.field(default_factory=list)
    waiting: dict[Hashable, int] = dataclasses.field(default_factory=dict)
    nbytes: int = 0
    held: int = 0
    pending: Any = None
    over: bool = False


Start = Callable[[Group], Any]
"""Starts a group: returns its `Pending`, or None where it cannot be read ahead now."""


class Order(Protocol):
    """In which groups items are read, and in which order. Called with the prefetcher's lock held.

    ``waiting`` is the group of each item that is started and not handed out, by the item's key.
    """

    def expected(self, what: Any) -> bool:
        """Note what was announced; whether a group may be started now."""

    def requested(self, key: Any, waiting: Mapping[Hashable, Group]) -> Group | None:
        """Note a request.

        Returns:
            The group that has the item, or one that is to be started for it now; None where the
            item is read alone.
        """

    def next(self, waiting: Mapping[Hashable, Group]) -> Group | None:
        """The group to be started next: the same one until it is. None: nothing, for now."""

    def started(self, group: Group) -> None:
        """A group was started."""

    def gives_up(self, oldest: Group, now: bool) -> bool:
        """Whether the oldest group may go unused for another: ``now`` if that is asked for."""

    def clear(self) -> list[Group]:
        """Forget what comes next; return the groups that were not started."""


class Prefetcher:
    """Starts groups in an order, within bounds, and hands their items out.

    Usable from any thread; waiting holds no lock. In a forked child it is as after `drop`. Code
    that interrupts another call, as a signal's handler does, is served without any read-ahead.

    Args:
        order: see `Order`.
        room: the most bytes that groups started and not used up may hold.
        flight: the most bytes that move at a time, unless nothing else moves; None: any number.
        one: whether a group may be started where no other holds bytes, however large it is.
    """

    def __init__(
        self,
        order: Order,
        room: Callable[[], int],
        *,
        flight: int | None = None,
        one: bool = False,
    ) -> None:
        self._guard = Guard()
        self._order = order
        self._room = room
        self._flight = flight
        self._one = one
        self._groups: dict[Group, None] = {}  # started and not used up, the oldest first
        self._at: dict[Hashable, Group] = {}  # by the keys of items that wait in them
        self._moving: list[Group] = []  # not known to have landed; where `flight` is a bound
        self._held = 0

    def expect(self, what: Any, start: Start) -> None:
        """Tell the order what will be asked for, and start what comes next. Returns at once."""
        if interrupted():
            return
        with self._guard.lock(self._let_go):
            here.inside = True
            try:
                if self._order.expected(what):
                    self._advance(start)
            finally:
                here.inside = False

    def hand_out(self, key: Hashable, start: Start) -> Any:
        """What is on its way with an item in it, which the caller takes; starts what comes next.

        Returns:
            The group's `Pending`; None: the caller has to read the item alone.

        Raises:
            Exception: what starting a group raised.
        """
        if interrupted():
            return None
        with self._guard.lock(self._let_go):
            here.inside = True
            try:
                group = self._order.requested(key, self._at)
                pending = None
                if group is not None and (group.pending is not None or self._enter(group, start)):
                    pending = self._taken(group, key)
                self._advance(start)
            finally:
                here.inside = False
        return pending

    def drop(self, pending: Any = None) -> None:
        """Forget one group by what is on its way, or all. What is in flight is cancelled."""
        if interrupted():
            return  # it goes with the prefetcher, or with what is asked for next
        old = None
        with self._guard.lock(self._let_go):
            here.inside = True
            try:
                if pending is None:
                    old = self._let_go()
                else:
                    for group in [one for one in self._groups if one.pending is pending]:
                        self._give_up(group)
            finally:
                here.inside = False
        del old  # ended without the lock: that may wait

    # ---- with the lock held ----

    def _let_go(self) -> object:
        groups = [*self._groups, *self._order.clear()]
        old = [group.pending for group in groups]
        self._groups, self._at, self._moving = {}, {}, []
        self._held = 0
        for group in groups:
            group.pending, group.over = None, True
        return old

    def _enter(self, group: Group, start: Start) -> bool:
        """Start a group of which something is asked for now, whatever the bounds say."""
        self._make_room(group, now=True)
        return self._start(group, start)

    def _advance(self, start: Start) -> None:
        """Start what comes next, as far as the bounds allow."""
        while (group := self._order.next(self._at)) is not None:
            if not self._make_room(group, now=False):
                return
            if not self._start(group, start) and self._order.next(self._at) is group:
                return  # another request tries again

    def _start(self, group: Group, start: Start) -> bool:
        pending = start(group)
        if pending is None:
            return False
        group.pending, group.items = pending, []
        self._groups[group] = None
        self._at.update(dict.fromkeys(group.waiting, group))
        self._held += group.held
        if self._flight is not None:
            self._moving.append(group)
        self._order.started(group)
        return True

    def _make_room(self, group: Group, now: bool) -> bool:
        """Give up groups, the oldest first, until another fits the bounds; whether it does."""
        while not self._fits(group):
            oldest = next(iter(self._groups), None)
            if oldest is None or not self._order.gives_up(oldest, now):
                return False
            self._give_up(oldest)
        return True

    def _fits(self, group: Group) -> bool:
        if self._flight is not None:
            self._moving = [
                one for one in self._moving if one.pending is not None and not one.pending.landed()
            ]
            moving = sum(one.nbytes for one in self._moving)
            if moving and moving + group.nbytes > self._flight:
                return False
        if not group.held or (self._one and not self._held):
            return True
        return self._held + group.held <= self._room()

    def _taken(self, group: Group, key: Hashable) -> Any:
        """Count an item as handed out; what is on its way with it."""
        pending = group.pending
        freed = group.waiting.pop(key)
        self._at.pop(key, None)
        group.held -= freed
        self._held -= freed
        if not group.waiting:
            self._forget(group)
        return pending

    def _give_up(self, group: Group) -> None:
        for key in group.waiting:
            if self._at.get(key) is group:
                del self._at[key]
        self._forget(group)

    def _forget(self, group: Group) -> None:
        if group in self._groups:
            del self._groups[group]
            self._held -= group.held
        group.pending = None
