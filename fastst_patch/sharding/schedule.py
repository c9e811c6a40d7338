"""Who reads which rows, and what is exchanged. Pure: no I/O, no torch, no process group.

A tensor counts as rows of its first dimension (a scalar as one row), and each rank says from
which row to which it needs it. Rows that one rank alone needs it reads alone. Rows that several
need are packed into units; of each unit every reader reads an equal part, and the parts are
exchanged::

    unit    | piece: rows of a tensor | piece | ... |   pieces at 256-byte boundaries
    parts   | rank 0    | rank 1    | rank 2    |       of equal size, by place in the unit

So every byte is read once by the ranks that exchange, whatever pattern they take it in.
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
"""Rows of a tensor: its number, the first row, and the row behind the last."""

Key = tuple[int, int]
"""A part that a rank takes: the tensor's number, and which of its parts."""


class Extent(NamedTuple):
    """Where a tensor lies in its file.

    Attributes:
        begin: file offset.
        rows: of its first dimension; 1 for a scalar.
        row_bytes: of each.
    """

    begin: int
    rows: int
    row_bytes: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a tensor in a unit.

    Attributes:
        tensor: its number in the file.
        first: row.
        last: row behind them.
        begin: file offset.
        nbytes: length.
        offset: place in the unit.
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
        nbytes: from the begin of the first to the end of the last, with what lies between.
    """

    pieces: tuple[Piece, ...]
    nbytes: int


def split(
    extents: Sequence[Extent],
    needs: Sequence[Sequence[int]],
    readers: Collection[int],
    numbers: Sequence[int] | None = None,
) -> tuple[list[list[Rows]], list[Rows]]:
    """Tell what each rank reads alone from what is exchanged.

    Args:
        extents: of the file's tensors.
        needs: for each rank, flat pairs (first row, row behind the last) of every tensor; empty
            for a rank that needs everything.
        readers: ranks that can read the file.
        numbers: of the tensors that ``needs`` are of; None: all.

    Returns:
        For each rank the rows that nobody else needs and that it can read; and the rows to be
        exchanged. In file order, without overlap; together all rows that anybody needs.
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
            if first[0] < first[1]:  # the common case: all of them the same
                shared.append((i, *first))
            continue
        cuts = sorted({edge for begin, end in wanted if begin < end for edge in (begin, end)})
        for begin, end in itertools.pairwise(cuts):
            takers = [r for r in ranks if wanted[r][0] <= begin and end <= wanted[r][1]]
            if len(takers) == 1 and takers[0] in readers:
                alone[takers[0]].append((i, begin, end))
            elif takers:
                shared.append((i, begin, end))
    return alone, shared


def pack(extents: Sequence[Extent], rows: Iterable[Rows], size: int) -> list[Unit]:
    """Pack rows into units of about ``size`` bytes, cutting tensors between rows.

    A unit holds one row at least: it is larger than ``size`` where a single row is.
    """
    units: list[Unit] = []
    pieces: list[Piece] = []
    place = end = 0
    for tensor, start, last in rows:
        extent, first = extents[tensor], start
        while first < last:
            room = (size - place) // extent.row_bytes
            if room < 1 and pieces:
                units.append(Unit(tuple(pieces), end))
                pieces, place = [], 0
                continue
            upto = min(last, first + max(room, 1))
            nbytes = (upto - first) * extent.row_bytes
            begin = extent.begin + first * extent.row_bytes
            pieces.append(Piece(tensor, first, upto, begin, nbytes, place))
            end = place + nbytes
            place = -(-end // ARENA_ALIGNMENT) * ARENA_ALIGNMENT
            first = upto
    if pieces:
        units.append(Unit(tuple(pieces), end))
    return units


def part_bytes(unit: Unit, readers: int) -> int:
    """Size of each reader's part of a unit; the last ones may reach behind its end."""
    each = -(-unit.nbytes // readers)
    return -(-each // ARENA_ALIGNMENT) * ARENA_ALIGNMENT


def segments(unit: Unit, low: int, high: int) -> array[int]:
    """What to read for the bytes low..high of a unit.

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
