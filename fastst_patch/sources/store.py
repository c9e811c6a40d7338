"""The folder in which remote files are kept.

::

    KEY.part, KEY.journal    being filled: see `partial`
    KEY.safetensors          complete; it was on the disk before it got this name
    KEY.json                 URL, identity and size; its modification is the file's last use
    .lock                    held while files are begun, finished or removed

KEY is made of the URL without its secrets, and of the identity. A file that changes has another
identity, so it is another file here.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from .base import Source
from .names import identity_text, public_url
from .partial import Partial, open_for_all, remove_unused

__all__ = ["Store"]

FRESH = 600.0
"""Seconds after its last use in which a file is not removed to make room for another. Else a model
that is larger than the limit would push out its first files for its last ones at every load."""

_SUFFIXES = (".safetensors", ".part", ".json", ".journal")
_STEM = re.compile(r"[0-9a-f]{24}-[0-9a-f]{24}")
"""Names of ours. Other files in the folder are neither counted nor removed."""

_BLOCK = 512  # of st_blocks
_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# A cache of remote weights, made by fastst_patch. It can be removed at any time.\n"
)


class _Here(threading.local):
    """Whether a thread holds the lock of a folder."""

    locked = False


_here = _Here()


class Store:
    """A folder of remote files. Usable by any number of processes and threads.

    Args:
        folder: made when the first file is kept.
        limit: most bytes of all files in it; None: all of the disk but a twentieth.
    """

    def __init__(self, folder: str, limit: int | None = None) -> None:
        self.folder = os.path.abspath(os.path.expanduser(folder))
        self.limit = limit

    # ---- finding ----

    def complete(self, url: str, identity: str | None = None) -> str | None:
        """The path of a complete file; None where there is none.

        Args:
            url: of the remote file.
            identity: as text; None: that which was used last.
        """
        with suppress(OSError):  # there is no folder yet
            start = self._stem(url, identity)
            for entry in reversed(self._entries()):
                if entry.stem == start or (identity is None and entry.stem.startswith(start)):
                    found = self._complete(entry)
                    if found is not None:
                        return found
        return None

    def _complete(self, entry: _Entry) -> str | None:
        path = f"{entry.stem}.safetensors"
        try:
            with open(f"{entry.stem}.json", encoding="utf-8") as file:
                size = json.load(file)["size"]
            if not entry.complete and entry.size:
                self._finish_left(entry.stem, size)
            with ExitStack() as stack:
                with suppress(OSError):  # a folder that others fill, or this thread has the lock
                    stack.enter_context(self._lock())
                # Under the lock, so that nobody removes it who has seen an earlier use of it.
                if not _is_whole(path, size):
                    return None
                with suppress(OSError):
                    os.utime(f"{entry.stem}.json")
                    os.unlink(f"{entry.stem}.journal")  # there is one where a process was killed
        except (OSError, ValueError, KeyError):
            return None
        return path

    def _finish_left(self, stem: str, size: int) -> None:
        """Finish what a killed process has fetched and not finished."""
        with self._lock():
            partial = Partial(stem, size)
        try:
            if not partial.missing:
                self.finish(partial)
        finally:
            partial.close()

    def _stem(self, url: str, identity: str | None) -> str:
        last = "" if identity is None else _key(identity)
        return os.path.join(self.folder, f"{_key(public_url(url))}-{last}")

    # ---- filling ----

    def begin(self, url: str, source: Source) -> Partial | None:
        """Begin a file, or go on with what is here of it.

        Args:
            url: of the remote file.
            source: the file, open.

        Returns:
            The file, which the caller closes; None where all of it is here meanwhile.

        Raises:
            OSError: there is no room, the folder cannot be written, or another machine fills it.
        """
        identity = identity_text(source.identity)
        stem = self._stem(url, identity)
        record = {"url": source.name, "identity": identity, "size": source.size}
        self._make_folder()
        with self._lock():
            if _is_whole(f"{stem}.safetensors", source.size):
                return None
            if not os.path.exists(f"{stem}.part"):
                self._make_room(source.size)
            with open(f"{stem}.json.new", "w", encoding="utf-8") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{stem}.json.new", f"{stem}.json")
            partial = Partial(stem, source.size)
        if partial.missing:
            return partial
        partial.close()
        return None

    def finish(self, partial: Partial) -> None:
        """Name a file of which all is here.

        Raises:
            OSError: the disk failed.
        """
        partial.sync()
        with self._lock():
            partial.finish(f"{partial.stem}.safetensors")
            folder = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _make_folder(self) -> None:
        if not os.path.isdir(self.folder):
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            with suppress(FileExistsError):
                tag = os.path.join(self.folder, "CACHEDIR.TAG")  # backups leave such folders out
                with open(tag, "x", encoding="utf-8") as file:
                    file.write(_TAG)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the folder's lock.

        Raises:
            OSError: this thread holds it: a signal handler, or a finalizer, has interrupted it.
        """
        if _here.locked:
            raise OSError(errno.EDEADLK, "it interrupts another load that is being kept")
        fd = open_for_all(os.path.join(self.folder, ".lock"))
        _here.locked = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Not by closing alone: a child that was forked meanwhile shares the lock.
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)
            _here.locked = False

    # ---- room ----

    def _entries(self) -> list[_Entry]:
        """What is kept, that which was used last at the end."""
        found: dict[str, _Entry] = {}
        with os.scandir(self.folder) as files:
            for file in files:
                stem, suffix = os.path.splitext(file.path)
                if suffix in _SUFFIXES and _STEM.fullmatch(os.path.basename(stem)):
                    with suppress(FileNotFoundError):
                        found.setdefault(stem, _Entry(stem)).add(suffix, file.stat())
        return sorted(found.values(), key=lambda entry: entry.used)

    def _make_room(self, nbytes: int) -> None:
        """Remove what was not used for longest until a new file fits. Under the lock.

        Raises:
            OSError: it does not fit.
        """
        entries = self._entries()
        room = self._room(entries)
        before = time.time() - FRESH
        old = [entry for entry in entries if entry.used < before]
        if room + sum(entry.size for entry in old) >= nbytes:
            for entry in old:
                if room < nbytes and entry.remove():
                    room += entry.size
        if room < nbytes:
            what = "the disk" if self.limit is None else f"remote_cache_bytes={self.limit}"
            raise OSError(
                f"{what} leaves {max(room, 0)} bytes, and the file has {nbytes}"
                f" (files that were used in the last {FRESH / 60:.0f} minutes stay)"
            )

    def _room(self, entries: list[_Entry]) -> int:
        if self.limit is not None:
            return self.limit - sum(entry.size for entry in entries)
        disk = os.statvfs(self.folder)
        unwritten = sum(entry.size - entry.on_disk for entry in entries)
        return disk.f_bavail * disk.f_frsize - disk.f_blocks * disk.f_frsize // 20 - unwritten


@dataclasses.dataclass
class _Entry:
    """One remote file in the folder.

    Attributes:
        stem: its path without suffixes.
        size: bytes that it has, or will have.
        on_disk: bytes that it takes now.
        used: when it was used last, in seconds since the epoch.
        complete: whether all of it is here.
    """

    stem: str
    size: int = 0
    on_disk: int = 0
    used: float = 0.0
    complete: bool = False

    def add(self, suffix: str, status: os.stat_result) -> None:
        """Count one of its files."""
        if suffix in (".safetensors", ".part"):
            self.size += status.st_size
            self.on_disk += min(status.st_size, status.st_blocks * _BLOCK)
            self.complete = self.complete or suffix == ".safetensors"
        self.used = max(self.used, status.st_mtime)

    def remove(self) -> bool:
        """Remove it unless it is being filled. Maps of a complete file stay valid."""
        if not remove_unused(self.stem):
            return False
        for suffix in (".safetensors", ".json", ".json.new"):
            with suppress(FileNotFoundError):
                os.unlink(self.stem + suffix)
        return True


def _is_whole(path: str, size: int) -> bool:
    """Whether a complete file can be read and has its size."""
    return os.access(path, os.R_OK) and os.stat(path).st_size == size


def _key(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
