"""Makes sure that memory is there while the clock runs.

Hosts of virtual machines take free memory back within a second or two (free page reporting) and
give it again when it is touched, on some at 0.2 GB/s. A load needs fresh memory for its tensors
or for the page cache; without this, what is timed is the host, and whichever loader is quick
enough, or happens to get pages that another has just freed, seems the faster one.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from . import hardware

BLOCK = 32 << 20
PAGE = 4096  # the smallest there is; where pages are larger each is touched more than once
SLACK = 256 << 20  # the process's own growth, read buffers, page tables
AHEAD = 256 << 20  # of each kind, at any time; at 10 GB/s of use, what goes in five periods
AHEAD_BESIDE = 32 << 20  # beside its files' size, which bounds it too: a load takes no more at once
PERIOD_S = 0.005
SMALL, HUGE = mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE
KINDS = {SMALL: 3, HUGE: 2}
"""Pages, small and huge, and how many times the files' bytes of each.

The kernel gives small pages from what is left between larger free blocks, and huge ones from
those: with one kind alone, who wants the other gets memory that is not there. Of small ones more
is left lying about. 1.7 GB by stock, cold: 4.0 s with none, 1.6 with twice, 1.2 with thrice."""

POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, which `mmap` does not name: touched at once instead of page by page, small
pages 0.43 s a GiB instead of 0.48, huge ones 0.08 instead of 0.17 where memory is there."""

_USED = ("AnonPages:", "Cached:", "Buffers:", "Slab:", "PageTables:")
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def forget_peak() -> None:
    """What this process held until now does not count as its highest RSS any more."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Reserve:
    """Memory for what is timed, in this process or in others. A context manager.

    It is held while nothing is timed, lent bit by bit to who is, and taken again afterwards while
    it is still there: 0.4 s a GiB, where getting it back from the host was seen to take 6 s.

    Args:
        wanted: bytes that a load may read; ``kinds`` times that is taken, and some more, but at
            most half of what is available.
        kinds: of pages, and how many times ``wanted`` of each. With one kind alone, who wants the
            other waits for the host.
    """

    def __init__(self, wanted: int, kinds: Mapping[int, int] = KINDS) -> None:
        self._ahead = min(AHEAD, wanted + AHEAD_BESIDE)
        self._wanted = {kind: times * wanted + SLACK for kind, times in kinds.items()}
        self._held: dict[int, list[mmap.mmap]] = {kind: [] for kind in kinds}
        self._taken = dict.fromkeys(kinds, 0)  # blocks, when last all were there
        self._taking: threading.Thread | None = None

    def __enter__(self) -> Reserve:
        self._take_soon()
        return self

    def __exit__(self, *exc: object) -> None:
        self._await_taken()
        self._feed(sum(self._wanted.values()), self._held.keys())

    @property
    def held(self) -> int:
        """Bytes that are held now."""
        return BLOCK * sum(map(len, self._held.values()))

    @contextlib.contextmanager
    def lend(self, kinds: Collection[int] | None = None) -> Iterator[None]:
        """Free memory as fast as it is used within the block, always some ahead.

        Args:
            kinds: of pages; all that are held when None.

        What has been free for a second is not the machine's any more, so that freeing it all at
        once would do for quick loads only.
        """
        self._await_taken()
        had = _used() - self.held
        over = threading.Event()
        lent = self._held.keys() if kinds is None else kinds
        self._feed(self._ahead, lent)
        feeding = threading.Thread(target=self._keep_feeding, args=(had, over, lent), daemon=True)
        feeding.start()
        try:
            yield
        finally:
            over.set()
            feeding.join()
            self._take_soon()

    def _keep_feeding(self, had: int, over: threading.Event, kinds: Collection[int]) -> None:
        while self.held and not over.wait(PERIOD_S):
            self._feed(_used() - self.held - had + self._ahead, kinds)

    def _feed(self, nbytes: int, kinds: Collection[int]) -> None:
        """Free until so many bytes of each of some kinds have been freed since it was taken."""
        for kind in kinds:
            held = self._held[kind]
            while held and (self._taken[kind] - len(held)) * BLOCK < nbytes:
                held.pop().close()

    def _take_soon(self) -> None:
        self._taking = threading.Thread(target=self._take, daemon=True)
        self._taking.start()

    def _await_taken(self) -> None:
        if self._taking is not None:
            self._taking.join()
            self._taking = None
        self._taken = {kind: len(held) for kind, held in self._held.items()}

    def _take(self) -> None:
        allowed = (hardware.memory_available() + self.held) // 2
        with contextlib.suppress(OSError):  # no room: what there is has to do
            for kind, held in self._held.items():
                while len(held) * BLOCK < self._wanted[kind] and self.held + BLOCK <= allowed:
                    held.append(_touched(kind))


def reserve_for(paths: Sequence[str]) -> Reserve:
    """Make one for loads of these files."""
    return Reserve(sum(Path(path).stat().st_size for path in paths))


def _touched(kind: int) -> mmap.mmap:
    """A block of memory, all of it there."""
    block = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # where pages have one size alone
        block.madvise(kind)
    if not advise(block, 0, BLOCK, POPULATE_WRITE):  # before Linux 5.14
        block[::PAGE] = b"\1" * (BLOCK // PAGE)
    return block


def advise(memory: mmap.mmap, at: int, nbytes: int, advice: int) -> bool:
    """Call madvise; not by `mmap.madvise`, for whose time no other thread would run."""
    begin = ctypes.c_char.from_buffer(memory)  # it cannot be closed as long as this lives
    return bool(_libc.madvise(ctypes.addressof(begin) + at, nbytes, advice) == 0)


def _used() -> int:
    """Bytes in use, be it by the page cache.

    Not what is missing of the free ones: what the kernel is just giving back to the host counts
    as neither, and all of a reserve had been lent for it within 50 ms in which nobody took any.
    """
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = (line.split() for line in lines if line.startswith(_USED))
    return 1024 * sum(int(field[1]) for field in fields)
