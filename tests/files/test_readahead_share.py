"""Stripes that ranks of a machine read ahead in turn."""

from __future__ import annotations

import itertools

import pytest

from fastst_patch.files.readahead_share import LAG, STRIPE, in_turn


@pytest.mark.parametrize("turns", [1, 2, 3, 8])
def test_turns_leave_nothing_out(turns: int) -> None:
    """Every rank reads all that it needs, each in another order, its own first."""
    shared = [(100, 5 * STRIPE + 7), (9 * STRIPE - 1, 40 * STRIPE)]
    alone = [(5 * STRIPE + 7, 5 * STRIPE + 9), (41 * STRIPE, 42 * STRIPE + 1)]
    first: set[int] = set()
    for turn in range(turns):
        found = in_turn(alone, shared, turn, turns).ranges
        assert all(begin < end for begin, end in found)
        ascending = sorted(found)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ascending))
        assert sum(e - b for b, e in found) == sum(e - b for b, e in alone + shared)
        wanted = sorted(alone + shared)
        assert all(any(b <= x < e for b, e in wanted) for x, _ in found)
        begin = next(b for b, _ in found if b < 5 * STRIPE + 7)
        first.add(begin // STRIPE)
    assert first == set(range(min(turns, 6))) or turns > 6


def test_others_stripes_come_behind_ones_own() -> None:
    found = in_turn([], [(0, 64 * STRIPE)], 1, 2).ranges
    assert found[0] == (STRIPE, 2 * STRIPE)
    order = [begin // STRIPE for begin, end in found for _ in range(end - begin) if end == -1] or [
        begin // STRIPE + k for begin, end in found for k in range((end - begin) // STRIPE)
    ]
    assert sorted(order) == list(range(64))
    assert order.index(0) > order.index(2 * LAG - 1)
    assert order.index(0) < order.index(2 * LAG + 3)


def test_one_rank_reads_in_order() -> None:
    assert in_turn([], [(8, 100 * STRIPE)], 0, 1).ranges == [(8, 100 * STRIPE)]
    assert not in_turn([], [], 0, 4).ranges
