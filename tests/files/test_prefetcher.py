"""The one scheduler, in the order of files, without any engine."""

from __future__ import annotations

from typing import Any

import pytest

from fastst_patch.files.file_order import FileOrder, groups_of
from fastst_patch.files.prefetcher import Group, Prefetcher
from fastst_patch.layout import FileLayout, described
from fastst_patch.locks import here

SIZE = 256


def _layout(count: int, nbytes: int = SIZE) -> FileLayout:
    return described([(f"{i:03}", 2, [nbytes], nbytes) for i in range(count)], data_begin=64)


class _Reader:
    """A front: remembers which groups it started, as (file, numbers), and refuses some files."""

    def __init__(self, counts: list[int], room: int, **options: Any) -> None:
        self.started: list[tuple[int, list[int]]] = []
        self.refused: set[int] = set()
        files = [(_layout(count), range(count)) for count in counts]
        self.order = FileOrder(files, 2 * SIZE, **options)
        self.prefetcher = Prefetcher(self.order, lambda: room * SIZE)

    def start(self, group: Group) -> str | None:
        if group.source in self.refused:
            return None
        self.started.append((group.source, group.items))
        return f"{group.source}.{group.first}"

    def take(self, *positions: int) -> list[str | None]:
        return [self.prefetcher.hand_out(position, self.start) for position in positions]

    def begin(self) -> None:
        self.prefetcher.expect(None, self.start)


def test_groups_have_a_tensor_at_least() -> None:
    layout = _layout(5, nbytes=SIZE + 1)
    assert list(groups_of(layout, range(5), 4 * SIZE)) == [
        ([0, 1], 4 * SIZE), ([2, 3], 4 * SIZE), ([4], 2 * SIZE)
    ]  # fmt: skip
    assert [numbers for numbers, _ in groups_of(layout, range(3), 1)] == [[0], [1], [2]]


def test_groups_start_in_order_as_far_as_there_is_room() -> None:
    reader = _Reader([3, 4], room=5)
    reader.begin()
    assert reader.started == [(0, [0, 1]), (0, [2]), (1, [0, 1])]
    assert reader.take(0) == ["0.0"]
    assert len(reader.started) == 3  # the first group still waits for tensor 1
    assert reader.take(1, 2, 3, 4, 5, 6) == ["0.0", "0.2", "1.3", "1.3", "1.5", "1.5"]
    assert reader.started[3:] == [(1, [2, 3])]
    assert reader.prefetcher._held == 0


def test_only_the_next_group_is_started() -> None:
    reader = _Reader([20], room=100, one_ahead=True)
    assert reader.take(0) == [None]
    assert reader.take(1) == ["0.1"]
    assert reader.started == [(0, [1, 2]), (0, [3, 4])]
    assert reader.take(2, 3) == ["0.1", "0.3"]
    assert reader.started[2:] == [(0, [5, 6])]


@pytest.mark.parametrize(("near", "alone"), [(1, True), (5, False)])
def test_a_jump_is_read_alone_unless_it_is_near(near, alone) -> None:
    reader = _Reader([40], room=4, near=near, lag=8)
    assert reader.take(0, 1) == [None, "0.0"]  # the first request starts what lies there
    assert (reader.take(6) == [None]) == alone
    assert reader.take(30) == [None]
    assert reader.take(31) == ["0.31"]


def test_groups_that_were_passed_make_room() -> None:
    reader = _Reader([40], room=4, near=8, lag=4)
    reader.begin()
    for position in range(0, 40, 2):  # one tensor of each group is never asked for
        assert reader.take(position) == [f"0.{position}"]
        assert reader.prefetcher._held <= 4 * SIZE
    assert len(reader.started) == 20


def test_a_refused_group_is_tried_again_by_the_next_request() -> None:
    reader = _Reader([4, 4], room=100)
    reader.refused = {0}
    reader.begin()
    assert reader.take(0) == [None]
    assert reader.started == []
    reader.refused = set()
    assert reader.take(1) == ["0.1"]
    assert reader.started == [(0, [1, 2]), (0, [3]), (1, [0, 1]), (1, [2, 3])]


def test_a_file_that_is_left_alone_does_not_stop_the_others() -> None:
    reader = _Reader([4, 4], room=100)
    reader.order.left_alone.add(0)
    reader.begin()
    assert reader.started == [(1, [0, 1]), (1, [2, 3])]
    assert reader.take(1, 2) == [None, None]


def test_a_start_that_raises_changes_nothing() -> None:
    reader = _Reader([4], room=100)

    def broken(group: Group) -> None:
        raise OSError(group.items)

    with pytest.raises(OSError, match="0, 1"):
        reader.prefetcher.expect(None, broken)
    assert not here.inside
    reader.begin()
    assert reader.take(0, 1, 2, 3) == ["0.0", "0.0", "0.2", "0.2"]


def test_nested_code_is_served_alone() -> None:
    reader = _Reader([4], room=100)
    reader.begin()
    here.inside = True
    try:
        assert reader.take(0) == [None]
        reader.prefetcher.drop()
    finally:
        here.inside = False
    assert reader.take(0) == ["0.0"]


def test_dropped_items_are_read_anew() -> None:
    reader = _Reader([8], room=100)
    reader.begin()
    reader.prefetcher.drop()
    assert reader.prefetcher._held == 0
    reader.started.clear()
    assert reader.take(3) == [None]
    assert reader.take(4) == ["0.4"]
    assert reader.started == [(0, [4, 5]), (0, [6, 7])]
