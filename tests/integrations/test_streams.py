"""The order, the bounds and the errors of streams, without any engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastst_patch.integrations import streams
from fastst_patch.integrations.streams import Lane, Stream


class _Mover:
    """Starts groups, remembers which, and lets them land when told."""

    def __init__(self, lands: bool = True) -> None:
        self.lands = lands
        self.started: list[list[Any]] = []
        self.alive = 0
        self.broken: dict[Any, Exception] = {}

    def lane(self, key: Any = "lane", passing: bool = False) -> Lane:
        return Lane(key, self.start, passing)

    def start(self, items: Sequence[Any]) -> _Moved:
        self.started.append(list(items))
        for item in items:
            if item in self.broken:
                raise self.broken[item]
        return _Moved(self, items)


class _Moved:
    def __init__(self, mover: _Mover, items: Sequence[Any]) -> None:
        self.mover = mover
        self.items = set(items)
        mover.alive += 1

    def __del__(self) -> None:
        self.mover.alive -= 1

    def landed(self) -> bool:
        return self.mover.lands

    def take(self, item: Any) -> Any:
        self.items.remove(item)
        return ("moved", item)


def test_groups_start_when_full_and_in_order() -> None:
    mover = _Mover()
    stream = Stream(budget=30)  # groups of 10
    tickets = [stream.ask(mover.lane(), i, 5) for i in range(5)]
    assert mover.started == [[0, 1], [2, 3]]
    assert [stream.take(ticket) for ticket in tickets] == [("moved", i) for i in range(5)]
    assert mover.started == [[0, 1], [2, 3], [4]]
    assert mover.alive == 0


def test_a_budget_bounds_what_waits_to_be_taken() -> None:
    mover = _Mover()
    stream = Stream(budget=30)
    tickets = [stream.ask(mover.lane(), i, 10) for i in range(9)]
    assert len(mover.started) == 3
    stream.take(tickets[0])
    assert len(mover.started) == 4
    # What is taken is started, bounds or not; nothing hangs on the order.
    assert stream.take(tickets[8]) == ("moved", 8)
    assert [8] in mover.started
    for ticket in tickets[1:8]:
        stream.take(ticket)
    assert sorted(item for group in mover.started for item in group) == list(range(9))
    assert mover.alive == 0


def test_without_a_budget_only_what_passes_through_is_held_back(monkeypatch) -> None:
    for name, value in (("WINDOW", 10), ("BUDGET", 20), ("FLIGHT", 1000)):
        monkeypatch.setattr(streams, name, value)
    mover = _Mover()
    stream = Stream(budget=None)
    keep, passing = mover.lane("keep"), mover.lane("pass", passing=True)
    for i in range(5):
        stream.ask(keep, ("keep", i), 10)
    tickets = [stream.ask(passing, ("pass", i), 10) for i in range(5)]
    assert [group[0] for group in mover.started] == [
        *(("keep", i) for i in range(5)), ("pass", 0), ("pass", 1)
    ]  # fmt: skip
    stream.take(tickets[0])
    assert mover.started[-1] == [("pass", 2)]


def test_flight_bounds_what_moves(monkeypatch) -> None:
    monkeypatch.setattr(streams, "WINDOW", 10)
    monkeypatch.setattr(streams, "FLIGHT", 20)
    mover = _Mover(lands=False)
    stream = Stream(budget=None)
    tickets = [stream.ask(mover.lane(), i, 10) for i in range(5)]
    assert len(mover.started) == 2
    mover.lands = True
    stream.take(tickets[0])
    assert len(mover.started) == 5


def test_lanes_do_not_share_groups_and_flush_keeps_their_order() -> None:
    mover = _Mover()
    stream = Stream(budget=3000)
    for i in range(4):
        stream.ask(mover.lane("odd" if i % 2 else "even"), i, 1)
    assert mover.started == []
    stream.flush()
    assert mover.started == [[0, 2], [1, 3]]


def test_errors_go_to_whoever_takes() -> None:
    mover = _Mover()
    mover.broken = {1: ValueError("no")}
    stream = Stream(budget=30)
    tickets = [stream.ask(mover.lane(), i, 10) for i in range(3)]
    assert stream.take(tickets[0]) == ("moved", 0)
    with pytest.raises(ValueError, match="no"):
        stream.take(tickets[1])
    assert stream.take(tickets[2]) == ("moved", 2)
    assert mover.alive == 0


def test_dropped_streams_hold_nothing() -> None:
    mover = _Mover()
    stream = Stream(budget=30)
    tickets = [stream.ask(mover.lane(), i, 10) for i in range(6)]
    assert mover.alive == 3
    stream.drop()
    assert mover.alive == 0
    with pytest.raises(RuntimeError, match="over"):
        stream.take(tickets[0])
    assert len(mover.started) == 3


@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=40),
    order=st.randoms(use_true_random=False),
    budget=st.one_of(st.none(), st.integers(0, 100)),
)
def test_any_order_gives_each_its_own(sizes, order, budget) -> None:
    mover = _Mover()
    stream = Stream(budget)
    lanes = [mover.lane(passing, passing=passing) for passing in (False, True)]
    tickets = [
        (i, stream.ask(lanes[passing], i, nbytes)) for i, (nbytes, passing) in enumerate(sizes)
    ]
    order.shuffle(tickets)
    for i, ticket in tickets:
        assert stream.take(ticket) == ("moved", i)
    assert sorted(item for group in mover.started for item in group) == list(range(len(sizes)))
    assert mover.alive == 0
    assert stream._held == 0


def test_many_threads_take() -> None:
    mover = _Mover()
    stream = Stream(budget=60)
    tickets = [stream.ask(mover.lane(), i, 10) for i in range(200)]
    got: list[Any] = []

    def work(part: int) -> None:
        got.extend(stream.take(ticket) for ticket in tickets[part::4])

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item for _, item in got) == list(range(200))
    assert mover.alive == 0
