"""Makes sure that memory is there while the clock runs.

Hosts of virtual machines take free memory back within a second or two (free page reporting) and
give it again when it is touched, on some at 0.2 GB/s. A load needs fresh memory for its tensors
or for the page cache; without this, what is timed is the host, and whichever loader is quick
enough, or happens to get pages that another has just freed, seems the faster one.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import machine

BLOCK = 32 << 20
STEP = 4 << 20
PAGE = 4096  # the smallest there is; where pages are larger each is touched more than once
SLACK = 256 << 20  # the process's own growth, read buffers, page tables
FRESH = 3
"""Times the files' bytes: in the page cache, in buffers, in tensors. With less, loads of what is
not cached met memory that was not there (1.7 GB by stock: 4.0 s with 1, 1.6 with 2, 1.2 with 3)."""

AHEAD = 256 << 20  # free at any time; at 10 GB/s of use, what goes in five periods
PERIOD_S = 0.005
_ONES = b"\1" * (STEP // PAGE)


def forget_peak() -> None:
    """What this process held until now does not count as its highest RSS any more."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Reserve:
    """Memory for what is timed, in this process or in others. A context manager.

    It is held while nothing is timed, lent bit by bit to who is, and taken again afterwards while
    it is still there: 0.4 s a GiB, where getting it back from the host was seen to take 6 s.

    Args:
        wanted: bytes, to which some are added; at most half of what is available is taken.
    """

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._held: list[mmap.mmap] = []
        self._taking: threading.Thread | None = None

    def __enter__(self) -> Reserve:
        self._take_soon()
        return self

    def __exit__(self, *exc: object) -> None:
        self._await_taken()
        while self._held:
            self._held.pop().close()

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """Free memory as fast as it is used within the block, always some ahead.

        What has been free for a second is not the machine's any more, so that freeing it all at
        once would do for quick loads only.
        """
        self._await_taken()
        over = threading.Event()
        floor = _free() + AHEAD
        self._feed(floor)
        feeding = threading.Thread(target=self._keep_feeding, args=(floor, over), daemon=True)
        feeding.start()
        try:
            yield
        finally:
            over.set()
            feeding.join()
            self._take_soon()

    def _keep_feeding(self, floor: int, over: threading.Event) -> None:
        while self._held and not over.wait(PERIOD_S):
            self._feed(floor)

    def _feed(self, floor: int) -> None:
        missing = floor - _free()
        while missing > 0 and self._held:
            self._held.pop().close()
            missing -= BLOCK

    def _take_soon(self) -> None:
        self._taking = threading.Thread(target=self._take, daemon=True)
        self._taking.start()

    def _await_taken(self) -> None:
        if self._taking is not None:
            self._taking.join()
            self._taking = None

    def _take(self) -> None:
        held = len(self._held) * BLOCK
        allowed = min(self._wanted + SLACK, (machine.memory_available() + held) // 2)
        with contextlib.suppress(OSError):  # no room: what there is has to do
            while held + BLOCK <= allowed:
                self._held.append(_touched())
                held += BLOCK


def reserve_for(paths: Sequence[str]) -> Reserve:
    """Make one for loads of these files."""
    return Reserve(FRESH * sum(Path(path).stat().st_size for path in paths))


def _touched() -> mmap.mmap:
    """A block of memory, all of it there."""
    block = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Small pages, taken where the page cache will look for some: in what is left between larger
    # free blocks, first. Kept in huge pages, what is lent is not what others get.
    with contextlib.suppress(OSError):
        block.madvise(mmap.MADV_NOHUGEPAGE)
    for begin in range(0, BLOCK, STEP):  # so that other threads get their turn
        block[begin : begin + STEP : PAGE] = _ONES
    return block


def _free() -> int:
    """Bytes that nobody uses, not even the page cache."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1]) * 1024
    return 0
