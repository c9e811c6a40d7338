"""Runs of bytes: joined where they touch, in the order in which they are given."""

from __future__ import annotations

import pytest

from fastst_patch.runs import Runs


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        ([], []),
        ([(3, 5)], [(3, 5)]),
        ([(3, 5), (5, 9), (9, 9)], [(3, 9)]),
        ([(3, 5), (6, 9)], [(3, 5), (6, 9)]),
        ([(3, 9), (4, 6), (8, 12)], [(3, 12)]),
        ([(5, 9), (3, 5)], [(5, 9), (3, 5)]),
        ([(0, 2), (8, 9), (2, 4)], [(0, 2), (8, 9), (2, 4)]),
    ],
)
def test_neighbours_are_joined(given: list[tuple[int, int]], joined: list[tuple[int, int]]) -> None:
    found = Runs(iter(given))
    assert found.ranges == joined
    assert found.nbytes == sum(end - begin for begin, end in joined)
    assert found.flat.typecode == "Q"
    assert list(found.flat) == [x for begin, end in joined for x in (begin, end - begin, 0)]
