"""Makes sure that memory is there before the clock starts.

Hosts of virtual machines take free memory back within seconds (free page reporting) and give
it again when it is touched, on some at 0.4 GB/s. A load needs fresh memory for its tensors or
for the page cache; without this, what is timed is the host, and whichever loader happens to
get pages that another has just freed seems the faster one.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

from . import machine

BLOCK = 4 << 20
SLACK = 256 << 20  # the process's own growth, read buffers, page tables


def memory(wanted: int) -> None:
    """Touch and free ``wanted`` bytes and some more, but at most half of what is available."""
    nbytes = min(wanted + SLACK, machine.memory_available() // 2) // BLOCK * BLOCK
    if nbytes <= 0:
        return
    ones = b"\1" * BLOCK
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory_map:
        with contextlib.suppress(OSError):  # huge pages only make it quicker
            memory_map.madvise(mmap.MADV_HUGEPAGE)
        for begin in range(0, nbytes, BLOCK):
            memory_map[begin : begin + BLOCK] = ones
    with contextlib.suppress(OSError):  # or it would count as this process's peak
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
