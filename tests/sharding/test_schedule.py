"""Which rank reads and exchanges which rows: the pure functions of sharding, in one process.

A file is simulated as bytes. For any plans, `schedule` must bring each rank the bytes that torch's
slicing gives, and read every byte once.
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
from fastst_patch.sharding.spec import chunk, shard_of

few = settings(max_examples=60)


class World(NamedTuple):
    """A file, and each rank's specs for it."""

    shapes: list[list[int]]
    itemsizes: list[int]
    specs: list[list[Any]]  # by rank, then by tensor
    readers: list[int]

    @property
    def size(self) -> int:
        return len(self.specs)


_dims = st.lists(st.integers(0, 9), max_size=3)
_edge = st.none() | st.integers(-11, 11)
_slices = st.builds(slice, _edge, _edge, st.none() | st.integers(1, 4))


@st.composite
def _specs(draw: Any, shape: list[int], world: int) -> Any:
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
    alike = [draw(_specs(shape, size)) for shape in shapes]
    same = draw(st.booleans())
    specs = [
        alike if same else [draw(_specs(shape, size)) for shape in shapes] for _ in range(size)
    ]
    readers = draw(st.sets(st.integers(0, size - 1), min_size=1))
    readers = set(range(size)) if draw(st.booleans()) else readers
    return World(shapes, itemsizes, specs, sorted(readers))


def _extents(world: World) -> tuple[list[Extent], int]:
    found, begin = [], 100
    for shape, itemsize in zip(world.shapes, world.itemsizes, strict=True):
        rows = shape[0] if shape else 1
        row_bytes = itemsize * math.prod(shape[1:])
        found.append(Extent(begin, rows, row_bytes))
        begin += rows * row_bytes
    return found, begin


def _shards(world: World, rank: int) -> list[Any]:
    return [
        shard_of(spec, f"t{i}", shape, rank, world.size)
        for i, (spec, shape) in enumerate(zip(world.specs[rank], world.shapes, strict=True))
    ]


def _needs(world: World) -> list[list[int]]:
    return [
        [edge for shard in _shards(world, rank) for edge in (shard.rows if shard else (0, 0))]
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
    """Alone are rows that one reading rank needs, shared all others; no row is in both."""
    extents, _ = _extents(world)
    needs = _needs(world)
    alone, shared = split(extents, needs, world.readers)
    solid = {i for i, extent in enumerate(extents) if extent.row_bytes}
    wanted = [{(i, row) for i, row in _rows(one) if i in solid} for one in needs]
    assert len(alone) == world.size
    users: dict[tuple[int, int], list[int]] = {}
    for rank, rows in enumerate(wanted):
        for row in rows:
            users.setdefault(row, []).append(rank)
    for rank, rows in enumerate(alone):
        assert _listed(rows) == sorted(_listed(rows))
        for row in _listed(rows):
            assert users[row] == [rank]
            assert rank in world.readers
    assert _listed(shared) == sorted(_listed(shared))
    for row in _listed(shared):
        assert len(users[row]) > 1 or users[row][0] not in world.readers
    moved = [row for rows in (*alone, shared) for row in _listed(rows)]
    assert len(moved) == len(set(moved))
    assert set(moved) == set(users)


def _read(file: bytes, flat: array[int], into: bytearray) -> int:
    """Read triples as the engine does; return the bytes read."""
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
def test_moved_bytes_are_torchs_slices(world: World, size: int, seed: int) -> None:
    """Readers read parts of units; the parts are joined, and every rank slices them."""
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
    """Slices of the rows that a rank has equal torch's slices of the whole tensor."""
    for i, shard in enumerate(_shards(world, rank)):
        shape, itemsize, extent = world.shapes[i], world.itemsizes[i], extents[i]
        nbytes = extent.rows * extent.row_bytes
        whole = _as_tensor(file[extent.begin : extent.begin + nbytes], shape, itemsize)
        expected = _expected(world.specs[rank][i], whole, rank, world.size)
        if expected is None:
            assert shard is None
            continue
        assert shard is not None
        have = bytearray(b"\xaa" * nbytes)
        for row in range(*shard.rows):
            place = row * extent.row_bytes
            have[place : place + extent.row_bytes] = rows.get((i, row), b"")[: extent.row_bytes]
        assert len(have) == nbytes, "rows that no rank read"
        ours = _as_tensor(bytes(have), shape, itemsize)
        pieces = [ours[region.index] for region in shard.regions]
        result = pieces[0] if len(pieces) == 1 else torch.cat(pieces, shard.dim)
        assert result.shape == expected.shape
        assert torch.equal(result, expected)
        assert [one.size for one in shard.regions] == [list(piece.shape[:-1]) for piece in pieces]


def _as_tensor(data: bytes, shape: list[int], itemsize: int) -> torch.Tensor:
    """Each element as a row of its bytes."""
    raw = torch.tensor(list(data), dtype=torch.uint8)
    return raw.view(*shape, itemsize) if shape else raw.view(itemsize)


def _expected(spec: Any, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor | None:
    dims = whole.dim() - 1  # without the bytes of an element
    if spec is SKIP:
        return None
    if isinstance(spec, Owner):
        ranks = [spec.ranks] if isinstance(spec.ranks, int) else spec.ranks
        return whole if rank in ranks else None
    if isinstance(spec, int):
        return sharded.chunk(whole, spec % dims, rank, size)
    return whole if spec in (None, "replicate") else whole[spec]


@given(length=st.integers(0, 40), size=st.integers(1, 12))
def test_chunk_is_torchs(length: int, size: int) -> None:
    """DTensor's chunks are the same; they differ only where a chunk is empty."""
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
    """Indexing some rows of a tensor gives the rows of a region that are among them."""
    first, last = sorted(min(edge, shape[0]) for edge in window)
    spec = tuple(cuts[: len(shape)])
    shard = shard_of(spec, "t", shape, 0, 1)
    assert shard is not None
    (region,) = shard.regions
    whole = torch.arange(math.prod(shape)).view(*shape)
    expected = whole[spec]
    found = region.within(first, last)
    inside = [k for k, row in enumerate(torch.arange(shape[0])[spec[0]]) if first <= row < last]
    if not inside:
        assert found is None
        return
    assert found is not None
    rows, index = found
    assert list(range(*rows.indices(len(expected)))) == inside
    assert torch.equal(whole[first:last][index], expected[rows])


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_pack_continues_after_rows_that_are_larger_than_a_unit(size: int) -> None:
    extents = [Extent(0, 3, 1000), Extent(3000, 0, 8), Extent(3000, 5, 0), Extent(3000, 1, 1)]
    alone, shared = split(extents, [[0, 3, 0, 0, 0, 5, 0, 1]] * 2, [0, 1])
    assert alone == [[], []]
    units = pack(extents, shared, size)
    assert sum(piece.nbytes for unit in units for piece in unit.pieces) == 3001
