"""Stripes of a file, read ahead in turn by the processes of a machine that share its page cache."""

from __future__ import annotations

from collections.abc import Iterable

from ..runs import Runs

__all__ = ["LAG", "STRIPE", "in_turn"]

STRIPE = 8 << 20
"""Bytes that one rank reads ahead of what several need, before it is the next one's turn: large
enough for huge pages, small enough that ranks that walk the file together wait for nobody."""

LAG = 8
"""Turns by which a rank that does not know what the others do reads ahead of making sure."""


def in_turn(
    alone: Iterable[tuple[int, int]], shared: Iterable[tuple[int, int]], turn: int, turns: int
) -> Runs:
    """What one of ``turns`` ranks reads ahead that cannot ask the others, in order.

    First its own stripes; and `LAG` turns behind, those of the others, which are cached by then
    and cost a look, unless nobody came for them. So nothing is left unread whoever is missing,
    fails, or reads on another node.

    Args:
        alone: file ranges (begin, end) that hardly anybody else needs.
        shared: those that the others are likely to need, too.
        turn: this rank's number among those that share the reading.
        turns: how many they are.
    """
    found: list[tuple[int, int, int]] = []  # when, and the range
    for ranges, certain in ((alone, True), (shared, False)):
        for begin, end in ranges:
            for stripe in range(begin // STRIPE, -(-end // STRIPE)):
                mine = certain or stripe % turns == turn
                when = stripe // turns + (0 if mine else LAG)
                bounds = max(begin, stripe * STRIPE), min(end, (stripe + 1) * STRIPE)
                found.append((when, *bounds))
    return Runs((begin, end) for _, begin, end in sorted(found))
