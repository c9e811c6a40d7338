"""Which parts of tensors are predicted, from what was used of earlier ones."""

from __future__ import annotations

from typing import Any

import torch

from fastst_patch.dtypes import DTYPE_NAMES
from fastst_patch.files.part_order import _LOOK, PartOrder
from fastst_patch.files.parts import Part, apart
from fastst_patch.files.prefetcher import Prefetcher
from fastst_patch.layout import FileLayout, described

F32 = DTYPE_NAMES.index("F32")
WHOLE, HALF = Part(0, (8,), (1,)), Part(4, (4,), (1,))


def layout_of(names: list[str], elements: int = 8) -> FileLayout:
    return described([(name, F32, (elements,), 4 * elements) for name in names])


class Started:
    """A `Pending`."""

    def landed(self) -> bool:
        return True

    def take(self, item: Any) -> torch.Tensor:
        raise AssertionError


class Load:
    """An order behind a prefetcher.

    Attributes:
        groups: items of the groups that were started.
        alone: positions whose parts were read alone.
    """

    def __init__(self, layout: FileLayout, group: int = 64, room: int = 1 << 20) -> None:
        self.order = PartOrder([(layout, range(len(layout.names)))], group)
        self.prefetcher = Prefetcher(self.order, lambda: room)
        self.groups: list[list[Any]] = []
        self.alone: list[int] = []

    def _start(self, group: Any) -> Started:
        self.groups.append(list(group.items))
        return Started()

    def give(self, position: int, *parts: Part) -> None:
        self.prefetcher.expect(position, self._start)
        self.use(position, *parts)

    def use(self, position: int, *parts: Part) -> None:
        for part in parts:
            if self.prefetcher.hand_out((position, part), self._start) is None:
                self.alone.append(position)

    @property
    def started(self) -> list[int]:
        return [i for items in self.groups for i, _ in items]


def test_later_layers_take_the_same_parts() -> None:
    load = Load(layout_of([f"layers.{n}.{w}" for n in range(4) for w in "ab"]))
    for position in range(8):
        load.give(position, WHOLE if position % 2 else HALF)
    assert load.alone == [0, 1]
    assert load.started == [2, 3, 4, 5, 6, 7]
    assert all(part == (WHOLE if i % 2 else HALF) for items in load.groups for i, part in items)


def test_nothing_behind_an_unknown_tensor_is_predicted() -> None:
    load = Load(layout_of(["l.0.a", "l.1.a", "new", "l.2.a"]))
    load.give(0, HALF)
    load.give(1, HALF)
    assert load.started == [1]
    load.give(2, HALF)
    assert load.started == [1, 3]
    load.give(3, HALF)
    assert load.alone == [0, 2]


def test_another_shape_is_another_kind() -> None:
    load = Load(described([("l.0", F32, (8,), 32), ("l.1", F32, (9,), 36)]))
    load.give(0, HALF)
    load.give(1, HALF)
    assert load.alone == [0, 1]


def test_layers_of_another_stage_are_not_predicted() -> None:
    load = Load(layout_of([f"l.{n}" for n in range(9)]))
    for position in range(4):
        load.give(position)
    for position in range(4, 9):
        load.give(position, HALF)
    assert load.alone == [4]
    assert load.started == [5, 6, 7, 8]


def test_what_is_not_used_is_given_up_for_what_is() -> None:
    load = Load(layout_of([f"l.{n}" for n in range(40)]), group=16, room=48)
    load.give(0, HALF)
    for position in range(1, 20):
        load.give(position)
    assert len(load.started) <= 4
    for position in range(20, 40):
        load.give(position, HALF)
    assert load.alone == [0, 20]
    assert load.prefetcher._held == 0


def test_experts_follow_those_of_the_layer_before() -> None:
    names = [f"l.{n}.experts.{e}" for n in range(3) for e in range(4)]
    load = Load(layout_of(names), group=16, room=32)
    for position in range(12):
        mine = position % 4 < 2
        load.give(position, *([HALF] if mine else []))
    unused = [i for i in load.started if i % 4 >= 2]
    assert unused == [2, 3]  # of the first layer alone
    assert load.alone == [0]


def test_small_parts_move_together() -> None:
    count = 4 * _LOOK
    load = Load(layout_of([f"l.{n}" for n in range(count)]), group=1 << 20)
    for position in range(count):
        load.give(position, HALF)
    assert load.alone == [0]
    assert load.started == list(range(1, count))
    assert len(load.groups) <= 4 * 2 + 1


def test_a_part_used_later_is_learned() -> None:
    load = Load(layout_of([f"l.{n}" for n in range(5)]))
    load.give(0)
    load.give(1)
    load.prefetcher.hand_out((0, HALF), load._start)
    load.give(2, HALF)
    load.give(3, HALF)
    assert 3 in load.started


def test_parts_used_while_the_next_tensor_is_given_are_predicted(monkeypatch) -> None:
    """As by engines that copy in threads of their own. What is predicted is not looked up anew."""
    count = 4 * _LOOK
    load = Load(layout_of([f"l.{n}" for n in range(count)]), group=1 << 20)
    looked_at: list[int] = []
    predicted = load.order._predicted
    monkeypatch.setattr(load.order, "_predicted", lambda at: predicted(looked_at.append(at) or at))
    for position in range(count):
        load.give(position)
        if position:
            load.use(position - 1, HALF)
    assert load.alone == [0]
    assert load.started == list(range(1, count))
    assert len(looked_at) <= 4 * count


def test_a_group_counts_until_its_last_part_is_taken() -> None:
    """Its job keeps the memory of all of them."""
    load = Load(layout_of([f"l.{n}" for n in range(80)]), group=64, room=64)
    load.give(0, HALF)
    load.give(1, HALF)
    assert load.groups == [[(n, HALF) for n in range(1, 5)]]
    for position in range(2, 5):
        assert load.prefetcher._held == 64
        load.give(position, HALF)
    assert load.groups[1:] == [[(n, HALF) for n in range(5, 9)]]


def test_parts_that_overlap_go_apart() -> None:
    layout = layout_of(["a", "b"])
    columns = [Part(n, (2, 2), (4, 1)) for n in (0, 2)]
    rows = [Part(n, (4,), (1,)) for n in (0, 4)]
    assert apart(layout, [(0, rows[1]), (1, rows[0]), (0, rows[0])]) == [
        [(0, rows[0]), (0, rows[1]), (1, rows[0])]
    ]
    assert apart(layout, [(0, columns[0]), (0, columns[1]), (1, rows[0])]) == [
        [(0, columns[0]), (1, rows[0])],
        [(0, columns[1])],
    ]
