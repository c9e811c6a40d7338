"""Makes sure that memory is there before the clock starts.

Hosts of virtual machines take free memory back within seconds (free page reporting) and give
it again when it is touched, on some at 0.2 GB/s. A load needs fresh memory for its tensors or
for the page cache; without this, what is timed is the host, and whichever loader happens to
get pages that another has just freed seems the faster one.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from pathlib import Path

from . import machine

BLOCK = 4 << 20
PAGE = 4096  # the smallest there is; where pages are larger each is touched more than once
SLACK = 256 << 20  # the process's own growth, read buffers, page tables


def memory(wanted: int) -> None:
    """Touch and free ``wanted`` bytes and some more, but at most half of what is available."""
    with contextlib.suppress(MemoryError):
        _touched(_allowed(wanted)).close()
    forget_peak()


def forget_peak() -> None:
    """What this process held until now does not count as its highest RSS any more."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Reserve:
    """Memory for the loads of other processes, kept while nothing is timed. A context manager.

    Freed for a load, and taken again right after it, it stays the machine's: 0.3 s a GiB, where
    getting it back from the host was seen to take 6 s. Takes ``wanted`` bytes and some more, but
    at most half of what is available.
    """

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._held: mmap.mmap | None = None
        self._taking: threading.Thread | None = None

    def __enter__(self) -> Reserve:
        self.take()
        return self

    def __exit__(self, *exc: object) -> None:
        self.free()

    def take(self) -> None:
        """Begin to take it, while the caller goes on."""
        if self._held is None and self._taking is None:
            self._taking = threading.Thread(target=self._take, daemon=True)
            self._taking.start()

    def free(self) -> None:
        """Free it, for who is timed next; waits until all of it had been there."""
        if self._taking is not None:
            self._taking.join()
            self._taking = None
        if self._held is not None:
            self._held.close()
            self._held = None

    def _take(self) -> None:
        with contextlib.suppress(MemoryError):
            self._held = _touched(_allowed(self._wanted))


def _allowed(wanted: int) -> int:
    nbytes = min(wanted + SLACK, machine.memory_available() // 2) // BLOCK * BLOCK
    return max(nbytes, BLOCK)


def _touched(nbytes: int) -> mmap.mmap:
    """Map so many bytes, all of them there. Raises MemoryError where there is no room."""
    try:
        held = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from error
    with contextlib.suppress(OSError):  # huge pages only make it quicker
        held.madvise(mmap.MADV_HUGEPAGE)
    ones = b"\1" * (BLOCK // PAGE)
    for begin in range(0, nbytes, BLOCK):
        held[begin : begin + BLOCK : PAGE] = ones
    return held
