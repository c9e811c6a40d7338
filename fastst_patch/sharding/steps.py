"""How a file that is not taken from its map is moved: who exchanges it, in which steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from .exchange import Step, Subgroup
from .groups import Group
from .requests import Request, cast
from .schedule import Key, Rows, pack, split
from .source import Source
from .spec import Region

__all__ = ["circle_of", "steps_of"]


def circle_of(source: Source, group: Group, read_once: str) -> Subgroup:
    """Who exchanges a file: our node, or everybody where a node cannot see it or that is wanted."""
    nodes = {group.nodes[rank] for rank in source.readers}
    everybody = read_once == "job" or len(nodes) < len(set(group.nodes))
    ranks = list(range(group.size)) if everybody else group.node_ranks
    return Subgroup(group, ranks, [rank for rank in source.readers if rank in ranks])


def steps_of(
    source: Source, circle: Subgroup, request: Request, parts: Mapping[Key, Region], size: int
) -> tuple[list[Step], bool]:
    """This rank's steps, in their order; the shared ones are the same on all of the circle.

    Also whether the plan leaves out some of the file: nobody of the circle wants it.

    Args:
        source: the file.
        circle: who exchanges it.
        request: what is wanted of it.
        parts: of this rank.
        size: of a unit, in bytes; the same on all ranks.
    """
    readers = [circle.ranks.index(rank) for rank in circle.readers]
    needs = [request.needs[rank] for rank in circle.ranks]
    alone, shared = split(source.extents, needs, readers, request.numbers)
    own: list[Rows] = []
    rest: list[Rows] = []
    for row in alone[circle.ranks.index(circle.group.rank)]:
        kind = source.describe(row[0])[1]
        single = (row[0], 1) not in parts and parts[row[0], 0].contiguous
        straight = single and cast(kind, request.dtype) == kind
        (own if straight else rest).append(row)
    steps = [
        *(Step("shared", unit) for unit in pack(source.extents, shared, size)),
        *(Step("own", unit) for unit in pack(source.extents, own, size)),
        *(Step("alone", unit) for unit in pack(source.extents, rest, size)),
    ]
    if request.numbers is not None:
        return steps, False  # what is not wanted now may be the next to be asked for
    rows = itertools.chain(shared, *alone)
    wanted = sum((last - first) * source.extents[i].row_bytes for i, first, last in rows)
    return steps, wanted < source.layout.data_bytes
