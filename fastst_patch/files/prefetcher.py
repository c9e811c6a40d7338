"""Reads tensors ahead of their use: in groups, in an order, within bounds.

    order -> next group -> fits the bounds -> started: a `Pending` -> handed out -> gone

An `Order` decides which items make a group and which group comes next. A function that the caller
passes starts a group. There are five fronts: handles to a device and the explicit loader read in
the order of their files (`file_order`); ``handle.prefetch()`` has a plan
(`fastst_patch.dropin.prefetch_loader`); integrations announce each item before they take it
(`fastst_patch.integrations.prefetch`); engines take parts, as of earlier tensors (`part_order`).

The start function is passed to each call and not kept. A file that owns its prefetcher would
otherwise be in a reference cycle, and its device memory would wait for the garbage collector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..locks import Guard, here, interrupted

if TYPE_CHECKING:
    import torch

__all__ = ["MOST_ITEMS", "Group", "Order", "Pending", "Prefetcher", "Start"]

MOST_ITEMS = 512
"""Most items of a group: starting one stays short however small they are."""


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
        source: where the items come from, for the start function.
        first: position of the first item, in an order that has positions.
        last: position of the last item.
        items: for the start function; empty after the start.
        waiting: keys of the items not handed out.
        nbytes: of all items.
        held: bytes that count against the bound until the last item is handed out: as long as
            the group's job may keep the memory of all items.
        pending: the result of the start function; None before, and once all are handed out.
        over: whether the group was dropped.
    """

    source: Any
    first: int = 0
    last: int = 0
    items: list[Any] = dataclasses.field(default_factory=list)
    waiting: set[Hashable] = dataclasses.field(default_factory=set)
    nbytes: int = 0
    held: int = 0
    pending: Any = None
    over: bool = False


Start = Callable[[Group], Any]
"""Starts a group: returns its `Pending`, or None where it cannot be read ahead now."""


class Order(Protocol):
    """Decides which items make a group, and which group comes next.

    Called with the prefetcher's lock held. The argument ``waiting`` maps the keys of items that
    are started and not handed out to their groups.
    """

    def expected(self, what: Any) -> bool:
        """Note what was announced; return whether a group may be started now."""

    def requested(self, key: Any, waiting: Mapping[Hashable, Group]) -> Group | None:
        """Note a request.

        Returns:
            The group that has the item, which is started now if it is not yet; None where the
            item is read alone.
        """

    def next(self, waiting: Mapping[Hashable, Group]) -> Group | None:
        """The group to be started next, the same one until it is started; None: none for now."""

    def started(self, group: Group) -> None:
        """Note that a group was started."""

    def gives_up(self, oldest: Group, now: bool) -> bool:
        """Whether to give up the oldest group to make room for another one.

        Args:
            oldest: the group.
            now: whether something is asked of the other one already.
        """

    def clear(self) -> list[Group]:
        """Forget what comes next; return the groups that were not started."""


class Prefetcher:
    """Starts groups in an order, within bounds, and hands out their items.

    Usable from any thread; no lock is held while a thread waits for bytes. In a forked child
    everything is dropped. Code that interrupts a section under a lock, such as a signal's handler,
    gets each item read alone.

    Args:
        order: see `Order`.
        room: returns the most bytes that groups may hold.
        flight: the most bytes that may move at a time; None: any number. A larger group moves
            when nothing else does.
        one: whether a group larger than ``room`` is started when no other one holds bytes; if
            not, its first request starts it.
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
        self._groups: dict[Group, None] = {}  # started, and not all handed out; oldest first
        self._at: dict[Hashable, Group] = {}  # by the keys of the items that wait in them
        self._moving: list[Group] = []  # not known to have landed; kept if `flight` is a bound
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
        """Hand out an item, and start what comes next.

        Returns:
            The `Pending` that the caller takes the item from; None: the caller reads it alone.

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
                if group is not None and self._is_started(group, start):
                    pending = self._taken(group, key)
                self._advance(start)
            finally:
                here.inside = False
        return pending

    def drop(self) -> None:
        """Forget what was read ahead, and cancel what is in flight. A request reads it anew."""
        if interrupted():
            return  # it goes with the prefetcher, or makes room for later requests
        with self._guard.lock(self._let_go):
            here.inside = True
            try:
                old = self._let_go()
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

    def _is_started(self, group: Group, start: Start) -> bool:
        """Start the group of a request whatever the bounds say; return whether it is started."""
        if group.pending is not None:
            return True
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
        """Give up groups, the oldest first, until another one fits; return whether it does."""
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
        """Count an item as handed out; return the `Pending` that has it."""
        pending = group.pending
        group.waiting.remove(key)
        self._at.pop(key, None)
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
