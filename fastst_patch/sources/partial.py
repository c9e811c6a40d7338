"""A remote file that is here in part: a sparse file, and a journal of the ranges that are in it.

::

    NAME.part       the bytes, at their offsets; holes where they are not here yet
    NAME.journal    what is here: magic, boot id, size; then a record for each range, appended
                    after its bytes were written

Many processes fill one pair together. Equal identities mean equal bytes, so it does no harm when
two write the same range. Each uses what the others have written: the journal is read again before
bytes are fetched.

Bytes that are in a pair stay in it. Who begins it anew makes new files, since on file systems whose
locks hold within a machine another one may be filling the old ones.

A killed process loses nothing that it recorded, because its writes are in the page cache. A crash
of the machine could lose bytes and keep their record. So the journal holds the id of the boot in
which it was begun, and in another boot the pair is begun anew.

Each user holds a shared lock on the journal. Who removes the pair needs an exclusive one.
"""

from __future__ import annotations

import bisect
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from contextlib import suppress

from ..locks import shared

__all__ = ["Partial", "open_for_all", "remove_unused"]

_HEADER = struct.Struct("<8s16sQ")
_RECORD = struct.Struct("<QQQ")  # begin, end, and both again: what was torn does not match
_MAGIC = b"fastst\0\1"
_CHECK = 0x9E3779B97F4A7C15
_SMALL = 128 << 10
"""Bytes here between bytes that are not, up to which one request fetches all of them."""


def _boot_id() -> bytes:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except (OSError, ValueError):
        return os.urandom(16)  # then a pair serves this process alone


_BOOT = _boot_id()


def open_for_all(path: str, flags: int = 0) -> int:
    """Open or make a file, which those may read and write who may do so with its folder."""
    mode = os.stat(os.path.dirname(path)).st_mode & 0o666
    return os.open(path, flags | os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)


class _Descriptor:
    """Closes itself with its last user, so that no thread uses a number that is another file's."""

    __slots__ = ("fd",)

    def __init__(self, path: str, flags: int = 0) -> None:
        self.fd = -1
        self.fd = open_for_all(path, flags)

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:
            _close(self.fd)


def _lock_alone(journal: _Descriptor) -> None:
    """Take the exclusive lock. Under the folder's lock, users alone can hold the shared one."""
    try:
        fcntl.flock(journal.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another machine, or another boot, is filling it") from None


class Partial:
    """An open pair. Its methods may be called from any thread.

    Opened and finished under the lock of the folder: see `cache`.

    Args:
        stem: path of both files, without their suffixes.
        size: bytes of the whole file.

    Attributes:
        stem: as given.
        size: as given.

    Raises:
        OSError: it cannot be opened or made, or another machine is filling it.
    """

    def __init__(self, stem: str, size: int) -> None:
        self.stem = stem
        self.size = size
        # Begins and ends of the ranges that are here, sorted, none touching another. Replaced as
        # one, so that a signal handler finds either the old or the new; what that loses comes again
        # from the journal.
        self._here: tuple[list[int], list[int]] = ([], [])
        self._seen = _HEADER.size  # bytes of the journal that were read
        header = _HEADER.pack(_MAGIC, _BOOT, size)
        part, journal = self._opened()
        try:
            known = os.pread(journal.fd, _HEADER.size, 0) == header
            if not known or os.fstat(part.fd).st_size != size:
                _lock_alone(journal)
                _unlink(stem)
                part, journal = self._opened()
                os.truncate(part.fd, size)
                os.write(journal.fd, header)
        except BaseException:
            # Frames of the exception keep the descriptor, and the next load would wait for it.
            with suppress(OSError):
                fcntl.flock(journal.fd, fcntl.LOCK_UN)
            raise
        self._open: tuple[_Descriptor, _Descriptor] | None = (part, journal)
        self.refresh()

    def _opened(self) -> tuple[_Descriptor, _Descriptor]:
        journal = _Descriptor(f"{self.stem}.journal", os.O_APPEND)
        fcntl.flock(journal.fd, fcntl.LOCK_SH)
        return _Descriptor(f"{self.stem}.part"), journal

    def _files(self) -> tuple[_Descriptor, _Descriptor]:
        """Both files, for a caller that keeps them until it is done."""
        if self._open is None:
            raise OSError(errno.EBADF, "the file is closed", f"{self.stem}.part")
        return self._open

    # ---- what is here ----

    def refresh(self) -> None:
        """Learn what other processes have recorded."""
        _, journal = self._files()
        begin = self._seen
        text = os.pread(journal.fd, max(0, os.fstat(journal.fd).st_size - begin), begin)
        whole = len(text) // _RECORD.size * _RECORD.size
        with shared:
            for first, last, check in _RECORD.iter_unpack(text[:whole]):
                if first < last <= self.size and check == first ^ last ^ _CHECK:
                    self._add(first, last)
            self._seen = max(self._seen, begin + whole)

    def _add(self, begin: int, end: int) -> None:
        begins, ends = self._here
        i = bisect.bisect_left(ends, begin)
        j = bisect.bisect_right(begins, end)
        if i < j:
            begin, end = min(begin, begins[i]), max(end, ends[j - 1])
        self._here = [*begins[:i], begin, *begins[j:]], [*ends[:i], end, *ends[j:]]

    @property
    def missing(self) -> int:
        """Bytes that are not here, as far as this process knows."""
        begins, ends = self._here
        return self.size - sum(ends) + sum(begins)

    def pieces(self, begin: int, end: int) -> list[tuple[int, int, bool]]:
        """A range in pieces that are here, or are not: begin, end, whether it is here."""
        begins, ends = self._here
        i, j = bisect.bisect_right(ends, begin), bisect.bisect_left(begins, end)
        here = list(zip(begins[i:j], ends[i:j], strict=True))
        found: list[tuple[int, int, bool]] = []
        at = begin
        for first, last in here:
            first, last = max(first, begin), min(last, end)  # noqa: PLW2901
            if last - first < min(_SMALL, end - begin):
                continue  # is fetched with what is around it
            if at < first:
                found.append((at, first, False))
            found.append((first, last, True))
            at = last
        if at < end:
            found.append((at, end, False))
        return found

    # ---- bytes ----

    def read_into(self, offset: int, into: memoryview) -> bool:
        """Fill memory from the file; False where that failed and the bytes must be fetched."""
        done = 0
        with suppress(OSError):
            part, _ = self._files()
            while done < len(into):
                count = os.preadv(part.fd, [into[done:]], offset + done)
                if count == 0:
                    break
                done += count
        return done == len(into)

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes, then record them.

        Raises:
            OSError: the disk is full, for example. What was recorded before stays valid.
        """
        part, journal = self._files()
        done = 0
        while done < len(data):
            done += os.pwrite(part.fd, data[done:], offset + done)
        begin, end = offset, offset + len(data)
        os.write(journal.fd, _RECORD.pack(begin, end, begin ^ end ^ _CHECK))
        with shared:
            self._add(begin, end)

    # ---- the end ----

    def sync(self) -> None:
        """Wait until the bytes are on the disk."""
        os.fdatasync(self._files()[0].fd)

    def finish(self, path: str) -> None:
        """Give the complete file, which was synced, its name, and remove the journal.

        Nothing happens where another process has done it, or has removed the pair.
        """
        name = f"{self.stem}.part"
        part, _ = self._files()
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(name), os.fstat(part.fd)):
                os.rename(name, path)
                os.unlink(f"{self.stem}.journal")

    def close(self) -> None:
        """Let go of both files and of the lock; may be repeated."""
        found, self._open = self._open, None
        if found is not None:
            with suppress(OSError):  # a forked child shares the lock, and may live longer
                fcntl.flock(found[1].fd, fcntl.LOCK_UN)


def remove_unused(stem: str) -> bool:
    """Remove a pair unless a process is using it. Under the lock of the folder."""
    try:
        journal = _Descriptor(f"{stem}.journal")
        fcntl.flock(journal.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _unlink(stem)
    except OSError:
        return False
    return True


def _unlink(stem: str) -> None:
    for suffix in (".part", ".journal"):
        with suppress(FileNotFoundError):
            os.unlink(stem + suffix)
