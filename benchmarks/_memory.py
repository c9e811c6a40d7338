"""States of free memory in which a load is timed: what the kernel has to give, and how fast.

=============  ================================================================================
state          what is free while the clock runs
=============  ================================================================================
``lent``       small and huge pages, as `fastst-patch bench` lends them: the kindest state
``huge``       huge pages only; who wants small ones splits them
``small``      small pages only, lent alone. Neighbours among them join into huge ones when they
               are freed; `fastst-patch bench` holds huge blocks beside, and is stricter
``fragmented`` no free block of 2 MiB: a host after weeks of use. A huge page takes compaction
=============  ================================================================================
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

from fastst_patch.bench import hardware
from fastst_patch.bench.failures import BenchError
from fastst_patch.bench.settle import HUGE, KINDS, POPULATE_WRITE, SMALL, Reserve, advise

STATES = ("lent", "huge", "small", "fragmented")

HUGE_PAGE = 2 << 20
BLOCK = 64 << 20
LEFT = 512 << 20  # for everybody else while the rest is held
FEW_BLOCKS = 16  # free ones of 2 MiB: no load gets far with them
HOLE_EVERY = 3  # pages; what lies between keeps free pages from joining


class Fragmented:
    """Holds all memory but for holes of one page each. A context manager.

    Args:
        wanted: bytes of holes that a load needs.
    """

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._held: list[mmap.mmap] = []
        self._whole = 0  # free blocks that could not be taken

    def __enter__(self) -> Fragmented:
        self._fill()
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.clear()

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """Let what runs in the block find holes only.

        Raises:
            BenchError: compaction joins them faster than a load takes them.
        """
        allowed = self._whole + self._wanted // 10 // HUGE_PAGE
        if free_blocks() > allowed:
            self._held.clear()
            self._fill()
        if free_blocks() > allowed:
            raise BenchError(f"{free_blocks()} blocks of 2 MiB are free still, not {allowed}")
        yield

    def _fill(self) -> None:
        """Take all there is, punch the holes, and then take what is still whole."""
        made = 0
        while hardware.meminfo("MemFree") > LEFT + BLOCK and self._take(BLOCK, SMALL):
            pass
        if len(self._held) * BLOCK < HOLE_EVERY * self._wanted:
            raise BenchError("there is too little memory to make holes for this load")
        for held in self._held:
            for at in range(0, BLOCK, HOLE_EVERY * mmap.PAGESIZE):
                advise(held, at, mmap.PAGESIZE, mmap.MADV_DONTNEED)
                made += mmap.PAGESIZE
            if made >= self._wanted:
                break
        for _ in range(free_blocks() - FEW_BLOCKS):  # those below the watermarks stay
            before = free_blocks()
            if not self._take(HUGE_PAGE, HUGE) or free_blocks() >= before:
                break
        self._whole = free_blocks()

    def _take(self, nbytes: int, kind: int) -> bool:
        held = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held.madvise(kind)
        taken = advise(held, 0, nbytes, POPULATE_WRITE)
        if taken:
            self._held.append(held)
        return taken


def free_blocks() -> int:
    """How many free blocks of 2 MiB the kernel has, in pairs and more counted each."""
    found = 0
    for line in Path("/proc/buddyinfo").read_text(encoding="ascii").splitlines():
        counts = [int(field) for field in line.split("zone", 1)[1].split()[1:]]
        found += sum(count << (order - 9) for order, count in enumerate(counts) if order >= 9)
    return found


def reserve(state: str, wanted: int) -> Reserve | Fragmented:
    """Memory for a load of so many bytes, in one of the `STATES`."""
    kinds = {"lent": KINDS, "huge": {HUGE: 4}, "small": {SMALL: 5}}
    return Reserve(wanted, kinds[state]) if state in kinds else Fragmented(wanted + LEFT)
