"""Sources in memory, which count what is asked of them."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping

from fastst_patch.sources.base import (
    Entry,
    RemoteCancelledError,
    RemoteNotFoundError,
    SourceStats,
    scheme_of,
)


class MemorySource:
    """A file in memory.

    Attributes:
        ranges: (offset, bytes) of each read, in order.
        closed: whether it was closed.
    """

    sequential = False

    def __init__(self, name: str, data: bytes, identity: Hashable = ("etag", '"1"', 0)) -> None:
        self.name = name
        self.scheme = scheme_of(name) or "memory"
        self.data = data
        self.size = len(data)
        self.identity = identity
        self.stats = SourceStats()
        self.ranges: list[tuple[int, int]] = []
        self.closed = False
        self._cancelled = False
        self._lock = threading.Lock()

    def read(self, offset: int, nbytes: int) -> bytearray:
        into = bytearray(nbytes)
        self.read_into(offset, into)
        return into

    def read_into(self, offset: int, into: object) -> None:
        view = memoryview(into).cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError("the range is not within the file")
        with self._lock:
            if self._cancelled:
                raise RemoteCancelledError("memory", self.name, "cancelled")
            self.ranges.append((offset, len(view)))
            self.stats.requests += 1
            self.stats.bytes += len(view)
        view[:] = self.data[offset : offset + len(view)]

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        self.cancel()
        self.closed = True


class Bucket:
    """URLs and what is behind them, in the place of `base.open_source`.

    Attributes:
        files: content by URL.
        version: of all files; part of their identity.
        opened: every source that was opened, in order.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.version = 1
        self.opened: list[MemorySource] = []

    def open_source(
        self, url: str, options: object = None, *, head_bytes: int = 1 << 20
    ) -> MemorySource:
        name = url.partition("?")[0]
        if name not in self.files:
            raise RemoteNotFoundError("memory", name, "there is no such file", status=404)
        data = self.files[name]
        source = MemorySource(name, data, ("etag", f'"{self.version}"', len(data)))
        self.opened.append(source)
        return source

    def list_files(self, url: str, options: object = None) -> list[Entry]:
        """As a bucket's listing: what begins with the URL."""
        start = url.rstrip("/") + "/"
        return [
            Entry(name[len(start) :], len(data), name, ("etag", f'"{self.version}"', len(data)))
            for name, data in sorted(self.files.items())
            if name.startswith(start)
        ]

    def read_page(self, url: str, options: object, most: int) -> bytes:
        """In the place of `web.read_page`."""
        return bytes(self.open_source(url).data[:most])

    def fetched(self) -> int:
        """Bytes that were read from all sources."""
        return sum(source.stats.bytes for source in self.opened)
