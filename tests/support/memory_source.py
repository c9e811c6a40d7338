"""Remote files without a network: a `Source` over bytes, which waits and fails as a test says."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any
from unittest import mock

from fastst_patch.files import remote
from fastst_patch.sources.base import (
    Entry,
    RemoteCancelledError,
    RemoteNotFoundError,
    Source,
    SourceStats,
)

SCHEME = "memory"


class Store:
    """Files by URL without its query, and what happens when they are read.

    Attributes:
        files: the bytes of each.
        versions: the identity of each; 1 where there is none.
        before: called with offset and bytes before a read is answered; may raise.
        reads: offset and bytes of every read so far.
        opened: every source so far.
        most: reads at a time, so far.
        sequential: see `Source`.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.versions: dict[str, Hashable] = {}
        self.before: Callable[[int, int], None] = lambda offset, nbytes: None
        self.reads: list[tuple[int, int]] = []
        self.opened: list[MemorySource] = []
        self.most = 0
        self.sequential = False
        self.gate = threading.Event()  # while it is not set, reads wait
        self.gate.set()
        self.inside = 0
        self._changed = threading.Condition()

    def open_source(self, url: str, options: object = None, **_: Any) -> Source:
        """As the package's."""
        name = remote.without_secrets(url)
        if name not in self.files:
            raise RemoteNotFoundError("here", name, "no such file", status=404)
        found = MemorySource(self, name)
        self.opened.append(found)
        return found

    def list_files(self, url: str, options: object = None) -> list[Entry]:
        """As the package's."""
        prefix = url.rstrip("/") + "/"
        return [
            Entry(name[len(prefix) :], len(content), name)
            for name, content in sorted(self.files.items())
            if name.startswith(prefix)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes that were read."""
        return sum(nbytes for _, nbytes in self.reads)

    def wait(self, inside: int) -> None:
        """Wait until so many reads wait at the gate."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.inside >= inside, 30)

    def enter(self, source: MemorySource) -> None:
        """Wait at the gate; a source that is closed gets no further."""
        with self._changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._changed.notify_all()
        try:
            while not self.gate.wait(0.005):
                if source.cancelled:
                    break
        finally:
            with self._changed:
                self.inside -= 1
        if source.cancelled:
            raise RemoteCancelledError("here", source.name, "cancelled")


class MemorySource:
    """One open file of a store."""

    scheme = SCHEME

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name
        self.size = len(store.files[name])
        self.identity: Hashable = store.versions.get(name, 1)
        self.sequential = store.sequential
        self.stats = SourceStats()
        self.cancelled = False

    def read(self, offset: int, nbytes: int) -> bytes:
        result = bytearray(nbytes)
        self.read_into(offset, result)
        return bytes(result)

    def read_into(self, offset: int, into: Any) -> None:
        view = memoryview(into)
        nbytes = len(view)
        assert offset >= 0
        assert offset + nbytes <= self.size
        self.store.reads.append((offset, nbytes))
        self.stats.requests += 1
        self.store.enter(self)
        self.store.before(offset, nbytes)
        view[:] = self.store.files[self.name][offset : offset + nbytes]
        self.stats.bytes += nbytes

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.cancel()


@contextlib.contextmanager
def served(files: Mapping[str, bytes]) -> Iterator[Store]:
    """Let ``memory://`` URLs lead to files, in a ``with`` block. At its end nothing may be held."""
    store = Store(files)
    with (
        mock.patch.object(remote, "open_source", store.open_source),
        mock.patch.object(remote, "list_files", store.list_files),
        mock.patch.object(remote, "local_path", return_value=None),
    ):
        yield store
        store.gate.set()
