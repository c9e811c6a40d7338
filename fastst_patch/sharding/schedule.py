"""Which rank reads which rows, and which rows are exchanged. No I/O, torch or process group.

A tensor is rows of its first dimension (a scalar is one row). Each rank states a range of rows
that it needs. Rows that only one rank needs are read by that rank. Rows that several ranks need
are packed into units. Every reader reads an equal part of each unit, and the parts are exchanged::

    unit    | piece: rows of a tensor | piece | ... |   pieces at 256-byte boundaries
    parts   | rank 0    | rank 1    | rank 2    |       of equal size, in the unit's order

So the ranks that exchange read every byte once, whatever shards they take.
"""

from __future__ import annotations

import dataclasses
import itertools
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from ..layout import ARENA_ALIGNMENT

__all__ = [
    "Extent",
    "Key",
    "Piece",
    "Rows",
    "Unit",
    "pack",
    "part_bytes",
    "ranges_of",
    "segments",
    "split",
]

Rows = tuple[int, int, int]
"""Rows of a tensor: its number, the first row, and the row after the last."""

Key = tuple[int, int]
"""A region that a rank takes: the tensor's number, and the region's in its shard."""


class Extent(NamedTuple):
    """Position of a tensor in its file.

    Attributes:
        begin: file offset.
        rows: number of rows of its first dimension; 1 for a scalar.
        row_bytes: bytes of each.
    """

    begin: int
    rows: int
    row_bytes: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a tensor in a unit.

    Attributes:
        tensor: its number in the file.
        first: first row.
        last: row after the last.
        begin: file offset.
        nbytes: length.
        offset: in the unit.
    """

    tensor: int
    first: int
    last: int
    begin: int
    nbytes: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """Pieces that move together.

    Attributes:
        pieces: in file order.
        nbytes: from the begin of the first to the end of the last, gaps included.
    """

    pieces: tuple[Piece, ...]
    nbytes: int


def split(
    extents: Sequence[Extent],
    needs: Sequence[Sequence[int]],
    readers: Collection[int],
    numbers: Sequence[int] | None = None,
) -> tuple[list[list[Rows]], list[Rows]]:
    """Separate the rows that each rank reads alone from those that are exchanged.

    Args:
        extents: of the file's tensors.
        needs: for each rank, flat pairs (first row, row after the last) of every tensor; empty
            for a rank that needs everything.
        readers: ranks that can read the file.
        numbers: of the tensors that ``needs`` are of; None: all.

    Returns:
        For each rank the rows that no other rank needs and that it can read; and the rows to
        exchange. In file order, without overlap; together all rows that any rank needs.
    """
    alone: list[list[Rows]] = [[] for _ in needs]
    shared: list[Rows] = []
    ranks = range(len(needs))
    can_all = len(readers) == len(needs)
    for at, i in enumerate(range(len(extents)) if numbers is None else numbers):
        extent = extents[i]
        if extent.row_bytes == 0 or extent.rows == 0:
            continue
        whole = (0, extent.rows)
        wanted = [(n[2 * at], n[2 * at + 1]) if n else whole for n in needs]
        first = wanted[0]
        if can_all and len(needs) > 1 and wanted.count(first) == len(wanted):
            if first[0] < first[1]:  # the common case: all ranks need the same
                shared.append((i, *first))
            continue
        cuts = sorted({edge for begin, end in wanted if begin < end for edge in (begin, end)})
        for begin, end in itertools.pairwise(cuts):
            users = [r for r in ranks if wanted[r][0] <= begin and end <= wanted[r][1]]
            if len(users) == 1 and users[0] in readers:
                alone[users[0]].append((i, begin, end))
            elif users:
                shared.append((i, begin, end))
    return alone, shared


def pack(extents: Sequence[Extent], rows: Iterable[Rows], size: int) -> list[Unit]:
    """Pack rows into units of about ``size`` bytes, cutting tensors between rows.

    A unit holds at least one row, so it is larger than ``size`` where a single row is.
    """
    units: list[Unit] = []
    pieces: list[Piece] = []
    offset = end = 0
    for tensor, start, last in rows:
        extent, first = extents[tensor], start
        while first < last:
            room = (size - offset) // extent.row_bytes
            if room < 1 and pieces:
                units.append(Unit(tuple(pieces), end))
                pieces, offset = [], 0
                continue
            upto = min(last, first + max(room, 1))
            nbytes = (upto - first) * extent.row_bytes
            begin = extent.begin + first * extent.row_bytes
            pieces.append(Piece(tensor, first, upto, begin, nbytes, offset))
            end = offset + nbytes
            offset = -(-end // ARENA_ALIGNMENT) * ARENA_ALIGNMENT
            first = upto
    if pieces:
        units.append(Unit(tuple(pieces), end))
    return units


def part_bytes(unit: Unit, readers: int) -> int:
    """Size of each reader's part of a unit; the last parts may reach past its end."""
    each = -(-unit.nbytes // readers)
    return -(-each // ARENA_ALIGNMENT) * ARENA_ALIGNMENT


def segments(unit: Unit, low: int, high: int) -> array[int]:
    """File segments of the bytes low..high of a unit.

    Returns:
        Flat triples (file offset, bytes, offset from ``low``), by file offset, neighbours merged.
    """
    found = array("Q")
    for piece in unit.pieces:
        begin = max(low, piece.offset)
        end = min(high, piece.offset + piece.nbytes)
        if begin >= end:
            continue
        at = piece.begin + begin - piece.offset
        if len(found) and found[-3] + found[-2] == at and found[-1] + found[-2] == begin - low:
            found[-2] += end - begin
        else:
            found.extend((at, end - begin, begin - low))
    return found


def ranges_of(extents: Sequence[Extent], rows: Iterable[Rows]) -> Iterator[tuple[int, int]]:
    """File ranges (begin, end) of some rows."""
    for tensor, first, last in rows:
        extent = extents[tensor]
        yield extent.begin + first * extent.row_bytes, extent.begin + last * extent.row_bytes
