"""Layouts, plans of what is read where, and remembered headers."""

from __future__ import annotations

from typing import Any

import pytest

from fastst_patch import engine
from fastst_patch.dtypes import DTYPE_NAMES
from fastst_patch.layout import FileLayout, LayoutCache, described, plan_arena, plan_rows

U8, F32 = DTYPE_NAMES.index("U8"), DTYPE_NAMES.index("F32")


def layout_of(*nbytes: int, data_begin: int = 100) -> FileLayout:
    return described([(f"t{i}", U8, (n,), n) for i, n in enumerate(nbytes)], data_begin)


def test_a_described_layout_says_what_it_was_told() -> None:
    layout = described([("b10", F32, (2, 3), 24), ("b9", U8, (), 1)], 64, {"a": "b"})
    assert layout.names == ("b10", "b9")
    assert layout.index == {"b10": 0, "b9": 1}
    assert [layout.extent(i) for i in range(2)] == [(64, 88), (88, 89)]
    assert [layout.nbytes(i) for i in range(2)] == [24, 1]
    assert [layout.shape(i) for i in range(2)] == [[2, 3], []]
    assert [layout.dtype(i) for i in range(2)] == [F32, U8]
    assert layout.dtypes == 1 << F32 | 1 << U8
    assert layout.data_bytes == 25
    assert layout.metadata == {"a": "b"}
    assert layout.sorted_names == ("b10", "b9")
    assert layout.natural_names == ("b9", "b10")


def test_metadata_outlives_its_file(raw: Any) -> None:
    header = {"__metadata__": {"a": "b"}, "x": raw.entry("U8", [1], 0, 1)}
    layout = engine.read_layout(engine.open_file(raw.write(raw.pack(header, b"\7"))))
    assert layout.metadata == {"a": "b"}


def test_tensors_in_an_arena_are_aligned_and_neighbours_merge() -> None:
    plan = plan_arena(layout_of(256, 256, 10, 0, 5))
    assert plan.tensors.tolist() == [0, 1, 2, 3, 4]
    assert plan.offsets.tolist() == [0, 256, 512, 768, 768]
    assert plan.segments.tolist() == [100, 522, 0, 622, 5, 768]
    assert (plan.arena_bytes, plan.data_bytes) == (1024, 527)


def test_a_plan_of_some_tensors_leaves_the_others_out() -> None:
    plan = plan_arena(layout_of(256, 256, 256), [2, 0])
    assert plan.tensors.tolist() == [0, 2]
    assert plan.segments.tolist() == [100, 256, 0, 612, 256, 256]
    assert plan_arena(layout_of(0, 0)).arena_bytes == 1
    assert plan_arena(layout_of(), []).segments.tolist() == []


def test_rows_are_byte_ranges() -> None:
    layout = described([("a", F32, (4, 3), 48), ("empty", F32, (0, 3), 0)])
    assert plan_rows(layout, 0, 1, 3) == (12, 36)
    assert plan_rows(layout, 1, 0, 0) == (0, 0)


def test_old_headers_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayoutCache, "BYTES", 400)
    cache, key = LayoutCache(), [(0, i, 0) for i in range(6)]
    kept = [layout_of(1, data_begin=100) for _ in range(4)]
    for i in range(4):
        cache.put(key[i], kept[i])
    assert cache.get(key[0]) is kept[0]  # used last
    cache.put(key[4], layout_of(1, data_begin=100))
    assert cache.get(key[1]) is None
    assert cache.get(key[0]) is kept[0]
    cache.put(key[5], layout_of(1, data_begin=101))  # more than a quarter of all
    assert cache.get(key[5]) is None
