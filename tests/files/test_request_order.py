"""What a handle on a remote file reads ahead, in which groups, and what it gives up."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from fastst_patch.files.prefetcher import Group, Prefetcher
from fastst_patch.files.request_order import RequestOrder
from fastst_patch.layout import FileLayout, described

U8 = 4  # number of the dtype; any will do


class Moving:
    """A `Pending` that is there at once."""

    def __init__(self, items: list[Any]) -> None:
        self.items = list(items)

    def landed(self) -> bool:
        return True


def layout_of(sizes: list[int]) -> FileLayout:
    return described([(f"t{i:03}", U8, (size,), size) for i, size in enumerate(sizes)])


def run(sizes: list[int], asked: list[int], *, room: int, nbytes: int) -> list[list[int]]:
    """The groups in the order in which they were started."""
    started: list[list[int]] = []
    alive: weakref.WeakSet[Moving] = weakref.WeakSet()  # what the prefetcher keeps

    def start(group: Group) -> Moving:
        started.append(list(group.items))
        pending = Moving(group.items)
        if group.held:
            alive.add(pending)
            # The group whose last tensor is handed out right now is nobody's read-ahead any more.
            assert sum(sizes[i] for one in alive for i in one.items) <= room + nbytes
        return pending

    prefetcher = Prefetcher(RequestOrder(layout_of(sizes), nbytes), lambda: room)
    for i in asked:
        assert i in prefetcher.hand_out(i, start).items
    return started


def test_what_is_asked_for_comes_first_and_alone() -> None:
    assert run([10] * 8, [3], room=100, nbytes=20) == [[3]]
    assert run([10] * 8, [3, 4], room=100, nbytes=20) == [[3], [4], [5, 6], [7]]


def test_the_order_of_names_is_followed_backwards_too() -> None:
    assert run([10] * 8, [6, 5], room=20, nbytes=20)[:3] == [[6], [5], [3, 4]]


def test_each_tensor_is_started_once() -> None:
    started = run([10] * 50, list(range(50)), room=60, nbytes=20)
    assert sorted(i for group in started for i in group) == list(range(50))


def test_nothing_is_read_ahead_without_room() -> None:
    asked = list(range(10))
    assert run([10] * 10, asked, room=0, nbytes=20) == [[i] for i in asked]


def test_a_tensor_larger_than_the_room_is_read_when_it_is_asked_for() -> None:
    sizes = [10, 10, 500, 10, 10, 10]
    started = run(sizes, list(range(6)), room=50, nbytes=20)
    assert [2] in started
    assert sorted(i for group in started for i in group) == list(range(6))


@pytest.mark.parametrize("jump", [40, 90])
def test_a_jump_makes_room_in_the_end(jump: int) -> None:
    """What was read ahead before is given up once nobody has asked for any of it for long."""
    asked = [0, 1, *range(jump, jump + 60)]
    started = run([10] * 200, asked, room=40, nbytes=20)
    assert any(group[0] > jump + 30 and len(group) == 2 for group in started)


def test_after_drop_everything_is_read_anew() -> None:
    started: list[list[int]] = []

    def start(group: Group) -> Moving:
        started.append(list(group.items))
        return Moving(group.items)

    prefetcher = Prefetcher(RequestOrder(layout_of([10] * 9), 20), lambda: 100)
    for i in (0, 1):
        prefetcher.hand_out(i, start)
    prefetcher.drop()
    before = len(started)
    prefetcher.hand_out(2, start)
    assert started[before] == [2]
