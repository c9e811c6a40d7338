"""Remote files kept in a local folder: the option ``remote_cache``.

What streams past is also written to a sparse file. When all of it is there, the file gets its
name, and the next load is one of a local file.

::

    KEY.part, KEY.journal    being filled: see `partial`
    KEY.safetensors          complete; it was on the disk before it got this name
    KEY.json                 URL, identity and size; its modification is the file's last use
    .lock                    held while files are begun, finished or removed

KEY is made of the URL without its secrets, and of the identity. A file that changes has another
identity, so it is another file here. Whether it has changed is asked at each opening by one small
request; there is none where the URL names a revision that cannot change, or offline.

Nothing that fails here fails a load: the bytes are then streamed, and the reason is logged.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ..config import Config, hub_is_offline
from . import base, standin
from .base import HEAD_BYTES, RemoteError, Source, SourceStats
from .names import identity_text, is_weak, public_url
from .partial import Partial, remove_unused
from .standin import StandIn

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["CachedSource", "RemoteCache", "find_local", "open_kept"]

_log = logging.getLogger("fastst_patch")

_PINNED = re.compile(r"hf://(?:[^@]+)@[0-9a-f]{40}/")

FRESH = 600.0
"""Seconds after its last use in which a file is not removed to make room for another. Else a model
that is larger than the limit would push out its first files for its last ones at every load."""

_BLOCK = 512  # of st_blocks
_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# A cache of remote weights, made by fastst_patch. It can be removed at any time.\n"
)


def find_local(url: str, config: Config) -> str | None:
    """The local file with the bytes of a remote one; None where its bytes have to be fetched.

    Args:
        url: as for `base.open_source`, or of a stand-in: see `standin.url_of`.
        config: options in force.

    Raises:
        RemoteChangedError: the file is another one than the stand-in was made for.
        RemoteError, OptionError, ImportError: as `base.open_source`.
    """
    url, stands = standin.resolved(url)
    local = base.local_path(url, config.storage_options)
    cache = _cache_for(config, stands)
    if local is not None or cache is None:
        return local
    found = cache.complete(url, None if stands is None else stands.identity)
    if found is None or _is_fixed(url, config):
        return found
    source = _opened(url, config, stands, head_bytes=1)
    try:
        return cache.complete(url, identity_text(source.identity))
    finally:
        source.close()


def open_kept(url: str, config: Config) -> Source:
    """Open a remote file; what is read of it is kept where the options say so.

    Args:
        url: as for `find_local`.
        config: options in force.

    Returns:
        A source, which the caller closes.

    Raises as `find_local`.
    """
    url, stands = standin.resolved(url)
    cache = _cache_for(config, stands)
    source = _opened(url, config, stands)
    if cache is None:
        return source
    try:
        return cache.keep(url, source)
    except BaseException:
        source.close()
        raise


def _cache_for(config: Config, stands: StandIn | None) -> RemoteCache | None:
    folder = config.remote_cache or (None if stands is None else stands.cache)
    return None if folder is None else RemoteCache(folder, config.remote_cache_bytes)


def _is_fixed(url: str, config: Config) -> bool:
    """Whether nobody asks if a file has changed: its URL names a revision, or we are offline."""
    if _PINNED.match(url) or config.remote_offline:
        return True
    return base.scheme_of(url) == "hf" and hub_is_offline()


def _opened(
    url: str, config: Config, stands: StandIn | None, head_bytes: int = HEAD_BYTES
) -> Source:
    source = base.open_source(url, config.storage_options, head_bytes=head_bytes)
    try:
        if stands is not None:
            stands.check(source)
    except BaseException:
        source.close()
        raise
    return source


class _Here(threading.local):
    """Whether a thread holds the lock of a folder."""

    locked = False


_here = _Here()


class RemoteCache:
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
            if os.stat(path).st_size != size:
                return None
        except (OSError, ValueError, KeyError):
            return None
        with suppress(OSError):  # a folder that others fill
            os.utime(f"{entry.stem}.json")
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

    def keep(self, url: str, source: Source) -> Source:
        """A source that also writes down what is read, over the given one.

        Itself, where it is not kept: it is complete already, or there is a reason, which is logged.
        """
        reason: object = "the server does not tell when it changes"
        if not is_weak(source.identity):
            try:
                partial = self._begin(url, source)
                if partial.missing:
                    return CachedSource(source, partial, self)
                partial.close()
                return source  # it was complete when nobody looked any more
            except RemoteError:
                raise
            except OSError as error:
                reason = error
        _log.warning("%s is streamed and not kept in %s: %s", source.name, self.folder, reason)
        return source

    def _stem(self, url: str, identity: str | None) -> str:
        last = "" if identity is None else _key(identity)
        return os.path.join(self.folder, f"{_key(public_url(url))}-{last}")

    # ---- filling ----

    def _begin(self, url: str, source: Source) -> Partial:
        identity = identity_text(source.identity)
        stem = self._stem(url, identity)
        record = {"url": source.name, "identity": identity, "size": source.size}
        self._make_folder()
        with self._lock():
            if not os.path.exists(f"{stem}.part"):
                self._make_room(source.size)
            with open(f"{stem}.json.new", "w", encoding="utf-8") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{stem}.json.new", f"{stem}.json")
            return Partial(stem, source.size)

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
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(os.path.join(self.folder, ".lock"), flags, 0o600)
        _here.locked = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            # Not by closing alone: a child that was forked meanwhile shares the lock.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)
            _here.locked = False

    # ---- room ----

    def _entries(self) -> list[_Entry]:
        """What is kept, that which was used last at the end."""
        found: dict[str, _Entry] = {}
        with os.scandir(self.folder) as files:
            for file in files:
                stem, suffix = os.path.splitext(file.path)
                if suffix in (".safetensors", ".part", ".json", ".journal"):
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
        for suffix in (".safetensors", ".json"):
            with suppress(FileNotFoundError):
                os.unlink(self.stem + suffix)
        return True


def _key(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


# ---- a source whose bytes are kept --------------------------------------


class CachedSource:
    """A source that takes what is here from the disk, and writes down what it fetches.

    The first bytes, which opening the source has fetched, are written down at once.
    """

    def __init__(self, source: Source, partial: Partial, cache: RemoteCache) -> None:
        self._source = source
        self._partial = partial
        self._cache = cache
        self._writes = True
        self._finished = False  # or going to be
        self._finishing = False
        self._closed = False
        self.read_into(0, bytearray(min(HEAD_BYTES, source.size)))

    @property
    def scheme(self) -> str:
        """As of the source, as are all properties."""
        return self._source.scheme

    @property
    def name(self) -> str:
        """See `scheme`."""
        return self._source.name

    @property
    def size(self) -> int:
        """See `scheme`."""
        return self._source.size

    @property
    def identity(self) -> Hashable:
        """See `scheme`."""
        return self._source.identity

    @property
    def sequential(self) -> bool:
        """See `scheme`."""
        return self._source.sequential

    @property
    def stats(self) -> SourceStats:
        """See `scheme`. What comes from the disk does not count."""
        return self._source.stats

    def read(self, offset: int, nbytes: int) -> Buffer:
        """See `Source.read`."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise ValueError(f"bytes {offset} to {offset + nbytes} of a file of {self.size}")
        data = bytearray(nbytes)
        self.read_into(offset, data)
        return data

    def read_into(self, offset: int, into: Buffer) -> None:
        """See `Source.read_into`."""
        whole = memoryview(into).cast("B")
        with suppress(OSError):  # closed: the source raises what a closed one does
            self._partial.refresh()
        for begin, end, here in self._partial.pieces(offset, offset + len(whole)):
            piece = whole[begin - offset : end - offset]
            if not here or not self._partial.read_into(begin, piece):
                self._fetch(begin, piece)

    def _fetch(self, offset: int, into: memoryview) -> None:
        self._source.read_into(offset, into)
        if not self._writes:
            return
        try:
            self._partial.write(offset, into)
        except OSError as error:
            if self._writes:
                self._writes = False
                _log.warning("%s is not kept any more: %s", self.name, error)
        if not self._partial.missing:
            self._finish()

    def _finish(self) -> None:
        """Name the file once it is on the disk, in a thread: nobody has to wait for the disk.

        A program that ends waits for the thread.
        """
        if self._finished:
            return
        self._finished = self._finishing = True
        try:
            threading.Thread(target=self._finish_now, name="fastst-cache").start()
        except RuntimeError:  # the interpreter is ending: the next process that opens it does it
            self._finishing = False

    def _finish_now(self) -> None:
        try:
            self._cache.finish(self._partial)
        except OSError as error:
            _log.warning("%s was not kept: %s", self.name, error)
        finally:
            self._finishing = False
            if self._closed:
                self._partial.close()

    def cancel(self) -> None:
        """See `Source.cancel`."""
        self._source.cancel()

    def close(self) -> None:
        """See `Source.close`."""
        self._source.close()
        self._closed = True
        if not self._finishing:  # else the thread closes it
            self._partial.close()
