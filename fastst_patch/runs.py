"""Runs of bytes in a file. Pure: no I/O."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

__all__ = ["Runs"]


class Runs:
    """File ranges in the order of use. A range that touches the one before is joined to it.

    Args:
        ranges: (begin, end) of each.

    Attributes:
        ranges: the same bytes, neighbours joined.
    """

    __slots__ = ("ranges",)

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.ranges: list[tuple[int, int]] = []
        first = last = -1
        for begin, end in ranges:  # of some 20,000: no call for each
            if first <= begin <= last:
                last = max(last, end)
                self.ranges[-1] = first, last
            else:
                self.ranges.append((begin, end))
                first, last = begin, end

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(end - begin for begin, end in self.ranges)

    @property
    def flat(self) -> array[int]:
        """As the engine takes extents: flat 64-bit triples (file offset, bytes, 0)."""
        return array("Q", [x for begin, end in self.ranges for x in (begin, end - begin, 0)])
