"""The order, the bounds and the errors of announced requests, without any engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastst_patch.integrations import prefetch
from fastst_patch.integrations.prefetch import Kind, RequestPrefetcher


class _Mover:
    """Starts groups, remembers which, and lets them land when told."""

    def __init__(self, lands: bool = True) -> None:
        self.lands = lands
        self.started: list[list[Any]] = []
        self.alive = 0
        self.broken: dict[Any, Exception] = {}

    def kind(self, key: Any = "kind", passing: bool = False) -> Kind:
        return Kind(key, self.start, passing)

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
    prefetcher = RequestPrefetcher(budget=30)  # groups of 10
    requests = [prefetcher.ask(mover.kind(), i, 5) for i in range(5)]
    assert mover.started == [[0, 1], [2, 3]]
    assert [prefetcher.take(request) for request in requests] == [("moved", i) for i in range(5)]
    assert mover.started == [[0, 1], [2, 3], [4]]
    assert mover.alive == 0


def test_a_budget_bounds_what_waits_to_be_taken() -> None:
    mover = _Mover()
    prefetcher = RequestPrefetcher(budget=30)
    requests = [prefetcher.ask(mover.kind(), i, 10) for i in range(9)]
    assert len(mover.started) == 3
    prefetcher.take(requests[0])
    assert len(mover.started) == 4
    # A request that is taken starts its group in spite of the bounds, in any order.
    assert prefetcher.take(requests[8]) == ("moved", 8)
    assert [8] in mover.started
    for request in requests[1:8]:
        prefetcher.take(request)
    assert sorted(item for group in mover.started for item in group) == list(range(9))
    assert mover.alive == 0


def test_a_group_counts_until_its_last_item_is_taken() -> None:
    """Its job keeps the memory of all of them."""
    mover = _Mover()
    prefetcher = RequestPrefetcher(budget=30)
    requests = [prefetcher.ask(mover.kind(), i, 5) for i in range(8)]
    assert len(mover.started) == 3
    prefetcher.take(requests[0])
    assert len(mover.started) == 3
    prefetcher.take(requests[1])
    assert mover.started[3:] == [[6, 7]]


def test_without_a_budget_only_what_passes_through_is_held_back(monkeypatch) -> None:
    for name, value in (("GROUP", 10), ("BUDGET", 20), ("FLIGHT", 1000)):
        monkeypatch.setattr(prefetch, name, value)
    mover = _Mover()
    prefetcher = RequestPrefetcher(budget=None)
    keep, passing = mover.kind("keep"), mover.kind("pass", passing=True)
    for i in range(5):
        prefetcher.ask(keep, ("keep", i), 10)
    requests = [prefetcher.ask(passing, ("pass", i), 10) for i in range(5)]
    assert [group[0] for group in mover.started] == [
        *(("keep", i) for i in range(5)), ("pass", 0), ("pass", 1)
    ]  # fmt: skip
    prefetcher.take(requests[0])
    assert mover.started[-1] == [("pass", 2)]


def test_flight_bounds_what_moves(monkeypatch) -> None:
    monkeypatch.setattr(prefetch, "GROUP", 10)
    monkeypatch.setattr(prefetch, "FLIGHT", 20)
    mover = _Mover(lands=False)
    prefetcher = RequestPrefetcher(budget=None)
    requests = [prefetcher.ask(mover.kind(), i, 10) for i in range(5)]
    assert len(mover.started) == 2
    mover.lands = True
    prefetcher.take(requests[0])
    assert len(mover.started) == 5


def test_kinds_do_not_share_groups_and_flush_keeps_their_order() -> None:
    mover = _Mover()
    prefetcher = RequestPrefetcher(budget=3000)
    for i in range(4):
        prefetcher.ask(mover.kind("odd" if i % 2 else "even"), i, 1)
    assert mover.started == []
    prefetcher.flush()
    assert mover.started == [[0, 2], [1, 3]]


def test_errors_go_to_whoever_takes() -> None:
    mover = _Mover()
    mover.broken = {1: ValueError("no")}
    prefetcher = RequestPrefetcher(budget=30)
    requests = [prefetcher.ask(mover.kind(), i, 10) for i in range(3)]
    assert prefetcher.take(requests[0]) == ("moved", 0)
    with pytest.raises(ValueError, match="no"):
        prefetcher.take(requests[1])
    assert prefetcher.take(requests[2]) == ("moved", 2)
    assert mover.alive == 0


def test_dropped_requests_hold_nothing() -> None:
    mover = _Mover()
    prefetcher = RequestPrefetcher(budget=30)
    requests = [prefetcher.ask(mover.kind(), i, 10) for i in range(6)]
    assert mover.alive == 3
    prefetcher.drop()
    assert mover.alive == 0
    with pytest.raises(RuntimeError, match="over"):
        prefetcher.take(requests[0])
    assert len(mover.started) == 3


@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=40),
    order=st.randoms(use_true_random=False),
    budget=st.one_of(st.none(), st.integers(0, 100)),
)
def test_any_order_gives_each_its_own(sizes, order, budget) -> None:
    mover = _Mover()
    prefetcher = RequestPrefetcher(budget)
    kinds = [mover.kind(passing, passing=passing) for passing in (False, True)]
    requests = [
        (i, prefetcher.ask(kinds[passing], i, nbytes)) for i, (nbytes, passing) in enumerate(sizes)
    ]
    order.shuffle(requests)
    for i, request in requests:
        assert prefetcher.take(request) == ("moved", i)
    assert sorted(item for group in mover.started for item in group) == list(range(len(sizes)))
    assert mover.alive == 0
    assert prefetcher._prefetcher._held == 0


def test_many_threads_take() -> None:
    mover = _Mover()
    prefetcher = RequestPrefetcher(budget=60)
    requests = [prefetcher.ask(mover.kind(), i, 10) for i in range(200)]
    got: list[Any] = []

    def work(part: int) -> None:
        got.extend(prefetcher.take(request) for request in requests[part::4])

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item for _, item in got) == list(range(200))
    assert mover.alive == 0
