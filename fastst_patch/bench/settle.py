"""Makes sure that memory is there before anything is timed.

A virtual machine's host may back the guest's memory only when it is first touched, at under
0.5 GB/s on some. Whichever run happens to get such pages, for tensors or for the page cache,
would be timed with the host's work; touched once, they are alike for every later run.
"""

from __future__ import annotations

import mmap

from . import machine

BLOCK = 4 << 20


def memory(wanted: int) -> int:
    """Touch ``wanted`` bytes, but at most half of what is available; returns how many."""
    nbytes = min(wanted, machine.memory_available() // 2) // BLOCK * BLOCK
    if nbytes <= 0:
        return 0
    ones = b"\1" * BLOCK
    with mmap.mmap(-1, nbytes) as memory_map:
        for begin in range(0, nbytes, BLOCK):
            memory_map[begin : begin + BLOCK] = ones
    return nbytes
