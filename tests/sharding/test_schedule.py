"""Who reads and exchanges what, without any process: the pure functions of sharding.

A file is simulated as bytes. Whatever ranks want of it, what `schedule` makes of that must give
each what torch's slicing gives it, with every byte read once.
"""

from __future__ import annotations

import itertools
import math
from array import array
from typing import Any, NamedTuple

import pytest
import sharded
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastst_patch.layout import ARENA_ALIGNMENT
from fastst_patch.runs import Runs
from fastst_patch.sharding import SKIP, Owner
from fastst_patch.sharding.schedule import Extent, pack, part_bytes, ranges_of, segments, split
from fastst_patch.sharding.spec import chunk, take_of

few = settings(max_examples=60)


class World(NamedTuple):
    """A file, and what each rank wants of it."""

    shapes: list[list[int]]
    itemsizes: list[int]
    rules: list[list[Any]]  # by rank, then by tensor
    readers: list[int]

    @property
    def size(self) -> int:
        return len(self.rules)


_dims = st.lists(st.integers(0, 9), max_size=3)
_edge = st.none() | st.integers(-11, 11)
_slices = st.builds(slice, _edge, _edge, st.none() | st.integers(1, 4))


@st.composite
def _rules(draw: Any, shape: list[int], world: int) -> Any:
    ranks = st.integers(0, world - 1)
    kinds = [st.sampled_from([None, "replicate", SKIP]), st.builds(Owner, ranks)]
    kinds.append(st.builds(Owner, st.sets(ranks)))
    if shape:
        kinds.append(st.integers(-len(shape), len(shape) - 1))
        kinds.append(_slices)
        kinds.append(st.lists(_slices, max_size=len(shape)).map(tuple))
    return draw(st.one_of(kinds))


@st.composite
def _worlds(draw: Any) -> World:
    size = draw(st.integers(1, 7))
    shapes = draw(st.lists(_dims, min_size=1, max_size=6))
    itemsizes = [draw(st.sampled_from([1, 2, 4, 8])) for _ in shapes]
    alike = [draw(_rules(shape, size)) for shape in shapes]
    same = draw(st.booleans())
    rules = [
        alike if same else [draw(_rules(shape, size)) for shape in shapes] for _ in range(size)
    ]
    readers = draw(st.sets(st.integers(0, size - 1), min_size=1))
    readers = set(range(size)) if draw(st.booleans()) else readers
    return World(shapes, itemsizes, rules, sorted(readers))


def _extents(world: World) -> tuple[list[Extent], int]:
    found, begin = [], 100
    for shape, itemsize in zip(world.shapes, world.itemsizes, strict=True):
        rows = shape[0] if shape else 1
        row_bytes = itemsize * math.prod(shape[1:])
        found.append(Extent(begin, rows, row_bytes))
        begin += rows * row_bytes
    return found, begin


def _takes(world: World, rank: int) -> list[Any]:
    return [
        take_of(rule, f"t{i}", shape, rank, world.size)
        for i, (rule, shape) in enumerate(zip(world.rules[rank], world.shapes, strict=True))
    ]


def _needs(world: World) -> list[list[int]]:
    return [
        [edge for take in _takes(world, rank) for edge in (take.rows if take else (0, 0))]
        for rank in range(world.size)
    ]


def _rows(needs: list[int]) -> set[tuple[int, int]]:
    return {
        (i, row)
        for i in range(len(needs) // 2)
        for row in range(needs[2 * i], needs[2 * i + 1])
    }  # fmt: skip


def _listed(rows: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(i, row) for i, first, last in rows for row in range(first, last)]


@few
@given(world=_worlds())
def test_split(world: World) -> None:
    """Alone is what one rank needs that can read; shared the rest; together all, once."""
    extents, _ = _extents(world)
    needs = _needs(world)
    alone, shared = split(extents, needs, world.readers)
    solid = {i for i, extent in enumerate(extents) if extent.row_bytes}
    wanted = [{(i, row) for i, row in _rows(one) if i in solid} for one in needs]
    assert len(alone) == world.size
    takers: dict[tuple[int, int], list[int]] = {}
    for rank, rows in enumerate(wanted):
        for row in rows:
            takers.setdefault(row, []).append(rank)
    for rank, rows in enumerate(alone):
        assert _listed(rows) == sorted(_listed(rows))
        for row in _listed(rows):
            assert takers[row] == [rank]
            assert rank in world.readers
    assert _listed(shared) == sorted(_listed(shared))
    for row in _listed(shared):
        assert len(takers[row]) > 1 or takers[row][0] not in world.readers
    moved = [row for rows in (*alone, shared) for row in _listed(rows)]
    assert len(moved) == len(set(moved))
    assert set(moved) == set(takers)


def _read(file: bytes, flat: array[int], into: bytearray) -> int:
    """Do what an engine does with triples; returns the bytes read."""
    total, before = 0, -1
    for at in range(0, len(flat), 3):
        begin, nbytes, place = flat[at : at + 3]
        assert nbytes > 0
        assert begin >= before
        before = begin + nbytes
        assert place + nbytes <= len(into)
        into[place : place + nbytes] = file[begin : begin + nbytes]
        total += nbytes
    return total


@few
@given(world=_worlds(), size=st.sampled_from([1, 7, 64, 300, 5000]), seed=st.integers(0, 99))
def test_what_is_moved_is_what_torch_slices(world: World, size: int, seed: int) -> None:
    """Units are read in parts by the readers, the parts joined, and sliced by every rank."""
    extents, end = _extents(world)
    generator = torch.Generator().manual_seed(seed)
    file = bytes(torch.randint(0, 256, (end,), dtype=torch.uint8, generator=generator).tolist())
    alone, shared = split(extents, _needs(world), world.readers)
    read = 0
    shared_rows: dict[tuple[int, int], bytes] = {}
    for unit in pack(extents, shared, size):
        readers = len(world.readers)
        each = part_bytes(unit, readers)
        assert each * readers >= unit.nbytes
        assert each % ARENA_ALIGNMENT == 0
        whole = bytearray()
        for part in range(readers):
            buffer = bytearray(each)
            read += _read(file, segments(unit, part * each, (part + 1) * each), buffer)
            whole += buffer
        for piece in unit.pieces:
            assert piece.offset % ARENA_ALIGNMENT == 0
            assert piece.begin == (
                extents[piece.tensor].begin + piece.first * extents[piece.tensor].row_bytes
            )
            length = extents[piece.tensor].row_bytes
            for row in range(piece.first, piece.last):
                at = piece.offset + (row - piece.first) * length
                assert (piece.tensor, row) not in shared_rows
                shared_rows[piece.tensor, row] = bytes(whole[at : at + length])
        last = unit.pieces[-1]
        assert unit.nbytes == last.offset + last.nbytes
        single = len(unit.pieces) == 1 and unit.pieces[0].last - unit.pieces[0].first == 1
        assert unit.nbytes <= size or single
    for rank in range(world.size):
        rows = dict(shared_rows)
        ranges = Runs(ranges_of(extents, alone[rank])).ranges
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
        read += sum(end - begin for begin, end in ranges)
        for i, row in _listed(alone[rank]):
            begin = extents[i].begin + row * extents[i].row_bytes
            assert any(a <= begin and begin + extents[i].row_bytes <= b for a, b in ranges)
            rows[i, row] = file[begin : begin + extents[i].row_bytes]
        _check_rank(world, rank, extents, file, rows)
    needed = {row for one in _needs(world) for row in _rows(one)}
    assert read == sum(extents[i].row_bytes for i, _ in needed)


def _check_rank(
    world: World, rank: int, extents: list[Extent], file: bytes, rows: dict[Any, bytes]
) -> None:
    """Slicing what a rank has of a tensor gives what torch slices of the whole."""
    for i, take in enumerate(_takes(world, rank)):
        shape, itemsize, extent = world.shapes[i], world.itemsizes[i], extents[i]
        nbytes = extent.rows * extent.row_bytes
        whole = _as_tensor(file[extent.begin : extent.begin + nbytes], shape, itemsize)
        expected = _expected(world.rules[rank][i], whole, rank, world.size)
        if expected is None:
            assert take is None
            continue
        assert take is not None
        have = bytearray(b"\xaa" * nbytes)
        for row in range(*take.rows):
            place = row * extent.row_bytes
            have[place : place + extent.row_bytes] = rows.get((i, row), b"")[: extent.row_bytes]
        assert len(have) == nbytes, "rows that nobody brought"
        ours = _as_tensor(bytes(have), shape, itemsize)
        pieces = [ours[part.index] for part in take.parts]
        result = pieces[0] if len(pieces) == 1 else torch.cat(pieces, take.dim)
        assert result.shape == expected.shape
        assert torch.equal(result, expected)
        assert [part.size for part in take.parts] == [list(piece.shape[:-1]) for piece in pieces]


def _as_tensor(data: bytes, shape: list[int], itemsize: int) -> torch.Tensor:
    """Whole numbers, as many bytes each as the dtype has."""
    raw = torch.tensor(list(data), dtype=torch.uint8)
    return raw.view(*shape, itemsize) if shape else raw.view(itemsize)


def _expected(rule: Any, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor | None:
    dims = whole.dim() - 1  # without the bytes of an element
    if rule is SKIP:
        return None
    if isinstance(rule, Owner):
        ranks = [rule.ranks] if isinstance(rule.ranks, int) else rule.ranks
        return whole if rank in ranks else None
    if isinstance(rule, int):
        return sharded.chunk(whole, rule % dims, rank, size)
    return whole if rule in (None, "replicate") else whole[rule]


@given(length=st.integers(0, 40), size=st.integers(1, 12))
def test_chunk_is_torchs(length: int, size: int) -> None:
    """And DTensor's; where they differ, at no elements, nobody gets any."""
    tensor = torch.arange(length)
    for rank in range(size):
        begin, end = chunk(length, rank, size)
        assert tensor[begin:end].tolist() == sharded.chunk(tensor, 0, rank, size).tolist()


@few
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    cuts=st.lists(_slices, min_size=1, max_size=3),
    window=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_within(shape: list[int], cuts: list[slice], window: tuple[int, int]) -> None:
    """Some rows of a tensor hold some rows of a part, and indexing them gives those."""
    first, last = sorted(min(edge, shape[0]) for edge in window)
    rule = tuple(cuts[: len(shape)])
    take = take_of(rule, "t", shape, 0, 1)
    assert take is not None
    (part,) = take.parts
    whole = torch.arange(math.prod(shape)).view(*shape)
    expected = whole[rule]
    found = part.within(first, last)
    inside = [k for k, row in enumerate(torch.arange(shape[0])[rule[0]]) if first <= row < last]
    if not inside:
        assert found is None
        return
    assert found is not None
    rows, index = found
    assert list(range(*rows.indices(len(expected)))) == inside
    assert torch.equal(whole[first:last][index], expected[rows])


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_pack_goes_on_behind_rows_that_are_larger_than_a_unit(size: int) -> None:
    extents = [Extent(0, 3, 1000), Extent(3000, 0, 8), Extent(3000, 5, 0), Extent(3000, 1, 1)]
    alone, shared = split(extents, [[0, 3, 0, 0, 0, 5, 0, 1]] * 2, [0, 1])
    assert alone == [[], []]
    units = pack(extents, shared, size)
    assert sum(piece.nbytes for unit in units for piece in unit.pieces) == 3001
