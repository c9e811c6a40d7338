"""Stripes of a file, read ahead in turn by the processes of a machine that share its page cache."""

from __future__ import annotations

from collections.abc import Iterable

from ..runs import Runs

__all__ = ["LAG", "STRIPE", "in_turn"]

STRIPE = 8 << 20
"""Bytes that one rank reads ahead for all ranks before the next rank's turn: large enough for
huge pages, small enough that ranks that read the file together do not wait for each other."""

LAG = 8
"""How many turns a rank waits before it checks the stripes of its peers."""


def in_turn(
    alone: Iterable[tuple[int, int]], shared: Iterable[tuple[int, int]], turn: int, turns: int
) -> Runs:
    """Ranges that one of several ranks reads ahead, in order. The ranks do not communicate.

    A rank reads its own stripes first, and the stripes of its peers `LAG` turns later. By then
    they are cached, and reading them costs only a look at the cache. Where a peer is missing,
    fails, or reads on another node, they are read here: no stripe is left unread.

    Args:
        alone: file ranges (begin, end) that, as a rule, only this rank needs.
        shared: file ranges that its peers are likely to need, too.
        turn: this rank's number among the ranks that share the reading.
        turns: how many ranks share the reading.
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
