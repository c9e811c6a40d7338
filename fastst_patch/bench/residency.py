"""Puts files into a known page-cache state, and proves that they are in it. No root needed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fastst_patch import engine

SMALL_PAGES = "cold, small pages"
"""Cold, and of free memory only what was small pages before is lent: huge pages have to come from
the host, as on a machine whose host has taken back what was free."""

COLD_AT_MOST = 0.005  # of the bytes
WARM_AT_LEAST = 0.995

_ATTEMPTS = 4
_READ_BYTES = 1 << 20
_PAUSE_S = 0.2
_NO_PROBES = frozenset({"none", "unknown", ""})


@dataclass(frozen=True)
class CacheState:
    """What the kernel said of the files just before a process started."""

    cache: str  # what was asked for: "cold", `SMALL_PAGES` or "warm"
    fraction: float | None  # of the bytes, in the page cache; None: cannot be told
    probe: str

    @property
    def verified(self) -> bool | None:
        """None when the kernel does not tell."""
        return None if self.fraction is None else satisfies(self.cache, self.fraction)


def weakest(verdicts: Iterable[bool | None]) -> bool | None:
    """Combine verdicts: False if any is, else None if any is, else True."""
    return min(verdicts, key=(False, None, True).index, default=True)


def verdict(prepared: CacheState, inside: float | None) -> bool | None:
    """Tell whether the state held, by what the timed process saw, too, if it could be told."""
    seen = True if inside is None else satisfies(prepared.cache, inside)
    return weakest([prepared.verified, seen])


def satisfies(cache: str, fraction: float) -> bool:
    """Tell whether a resident fraction counts as cold, or as warm."""
    return fraction < COLD_AT_MOST if is_cold(cache) else fraction >= WARM_AT_LEAST


def is_cold(cache: str) -> bool:
    """Whether a state of the cache is a cold one, whatever the state of memory."""
    return cache in ("cold", SMALL_PAGES)


def prepare(cache: str, paths: Sequence[str]) -> CacheState:
    """Evict or read all files, and ask the kernel whether that worked."""
    make = evict if is_cold(cache) else warm
    for attempt in range(_ATTEMPTS):
        for path in paths:
            make(path)
        fraction, probe = resident_fraction(paths)
        state = CacheState(cache, fraction, probe)
        if state.verified is not False:
            break
        # Pages in flight, or on another CPU's list, cannot be evicted just now.
        time.sleep(_PAUSE_S * attempt)
    return state


def resident_fraction(paths: Sequence[str]) -> tuple[float | None, str]:
    """Return the fraction over all files; None as soon as one cannot be probed.

    Asking changes nothing: both probes, cachestat and mincore, read no file.
    """
    found = [engine.residency(path) for path in paths]
    probes = sorted({str(one.probe).lower() for one in found if one.total_bytes})
    if not probes or not _NO_PROBES.isdisjoint(probes):
        return None, "unknown"
    total = sum(one.total_bytes for one in found)
    return sum(one.resident_bytes for one in found) / total, "+".join(probes)


def evict(path: str) -> None:
    """Drop the file's clean pages, after making them all clean."""
    with _opened(path) as fd:
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS, errno.EBADF):
                raise
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: str) -> None:
    """Read the file through."""
    buffer = bytearray(_READ_BYTES)
    with _opened(path) as fd:
        while os.readv(fd, [buffer]):
            pass


@contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
