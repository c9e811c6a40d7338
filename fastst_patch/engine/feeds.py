"""Files whose bytes a `Source` gives, as from a network: what the engine's threads call for them.

    engine's thread -> fst_feed_by_python -> Feed.fill -> Source.read_into -> the engine's memory

A thread of the engine takes the GIL for its call, and the source releases it while it waits. When
Python exits, no thread may be in such a call: Python would end it, and with it the load. So the
last handler before that ends all calls (`_end`).

The source of a feed may be cancelled while a handle on the file stays: by Ctrl-C, or by a fork, in
whose child no connection of the parent may be used. The next request opens another source then,
which must be of the same bytes.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..locks import Guard, interrupted
from ..sources.base import RemoteCancelledError, RemoteChangedError
from ._lib import ffi, keep_failure, lib

if TYPE_CHECKING:
    from ..sources.base import Source, SourceStats

__all__ = ["Feed"]

_feeds: weakref.WeakValueDictionary[int, Feed] = weakref.WeakValueDictionary()
"""By number. The engine knows numbers, and not objects: a call may begin when its feed is gone."""

_numbers = itertools.count(1)

_ended = False
"""Whether Python ends: no source is opened any more."""


class Feed:
    """What gives the engine the bytes of one file that is not local. Usable from any thread.

    Attributes:
        number: by which the engine names it.
        name: of the source, for messages and reports.
        scheme: of the source, the path in reports.
        size: bytes.
        identity: of the source.
        sequential: whether all reads share one stream: see `Source`.
    """

    def __init__(self, open_source: Callable[[], Source]) -> None:
        self._open = open_source
        self._guard = Guard()
        self._source: Source | None = None
        self._pid = os.getpid()
        self._closed: list[SourceStats] = []  # of sources that were used before
        self._told = (0, 0, 0.0, 0)  # see `take_traffic`
        self._link_measured = _link()[1]
        source = self._source = open_source()
        self.name: str = source.name
        self.scheme: str = source.scheme
        self.size: int = source.size
        self.identity = source.identity
        self.sequential: bool = source.sequential
        self.number = next(_numbers)
        _feeds[self.number] = self
        _end_at_exit()

    def fill(self, offset: int, into: Any) -> None:
        """Fill memory with the bytes from an offset on. Called by the engine's threads, too."""
        source = self._source
        if source is None or self._pid != os.getpid():
            raise self._cancelled()
        source.read_into(offset, into)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Some bytes. Raises what the source raises."""
        self.ready()
        result = bytearray(nbytes)
        self.fill(offset, result)
        return bytes(result)

    def ready(self) -> None:
        """Open a source where there is none any more. Called before bytes are asked for.

        Raises:
            RemoteChangedError: the file is another one by now.
            RemoteCancelledError: Python ends.
            RemoteError: it cannot be opened again.
        """
        if self._source is not None and self._pid == os.getpid():
            return
        if interrupted():
            self._ready()
            return
        with self._guard.lock(lambda: None):
            self._ready()

    def _ready(self) -> None:
        if self._pid != os.getpid():
            # Its connections and threads are the parent's: neither used here nor closed.
            _parents.append(self._source)
            self._source, self._pid = None, os.getpid()
        if self._source is None and not _ended:
            made = self._opened_again()
            if self._source is None:
                self._source = made
            else:  # code that interrupted this one has opened it, too
                made.close()
        if _ended:  # perhaps meanwhile
            self.interrupt()
            raise self._cancelled()

    def _opened_again(self) -> Source:
        source = self._open()
        if (source.size, source.identity) == (self.size, self.identity):
            return source
        source.close()
        host, _, path = self.name.partition("://")[2].partition("/")
        raise RemoteChangedError(
            host,
            path,
            "the file changed while it was read",
            tries=0,
            remedy="open it anew",
        )

    def interrupt(self) -> None:
        """Cancel what is in flight. `ready` opens the source again."""
        source = self._source
        if source is None or self._pid != os.getpid():
            return
        self._source = None
        source.close()
        self._closed.append(source.stats)

    close = interrupt
    """Nobody asks any more. Tensors that were read stay valid."""

    def take_traffic(self) -> tuple[int, int, float, int, int]:
        """Requests, retries among them, seconds waited between tries, and bytes, since last asked.

        And the bytes a second of the link, if they were measured since. Of several users of one
        file, each report has what happened before it.
        """
        found, source = list(self._closed), self._source
        if source is not None:
            found.append(source.stats)
        now = (
            sum(stats.requests for stats in found),
            sum(stats.retries for stats in found),
            sum(stats.waited for stats in found),
            sum(stats.bytes for stats in found),
        )
        before, self._told = self._told, now
        rate, measured = _link()
        link = rate if measured > self._link_measured else 0
        self._link_measured = measured
        return now[0] - before[0], now[1] - before[1], now[2] - before[2], now[3] - before[3], link

    def _cancelled(self) -> RemoteCancelledError:
        host, _, path = self.name.partition("://")[2].partition("/")
        if _ended:
            why = "Python ends"
        else:
            why = "interrupted" if self._pid == os.getpid() else "the process has forked since"
        return RemoteCancelledError(host, path, f"the read was cancelled: {why}", tries=0)


def _link() -> tuple[int, int]:
    """Bytes a second that the link gave when it was measured, and how often that was done."""
    stats = ffi.new("fst_pool_stats *")
    lib.fst_pool_get_stats(stats)
    return int(stats.link_rate), int(stats.link_measured)


_parents: list[Source | None] = []  # sources of the process that this one was forked from


def _answer(context: Any, offset: int, nbytes: int, into: Any) -> int:
    """What the engine calls: the bytes that were filled, or the number of a failure, negative."""
    try:
        feed = _feeds.get(int(ffi.cast("uintptr_t", context)))
        if feed is None:
            raise RemoteCancelledError("", "", "the file was closed", tries=0)
        feed.fill(offset, ffi.buffer(into, nbytes))
    except BaseException as error:  # the engine's thread has nobody to tell
        return -keep_failure(error)
    return nbytes


if ffi is not None:
    ffi.def_extern(name="fst_feed_by_python", error=-1)(_answer)


@functools.cache
def _end_at_exit() -> None:
    atexit.register(_end)


def _end() -> None:
    """End all calls of the engine's threads, before Python ends: then they would never return."""
    global _ended  # noqa: PLW0603 - of the process
    _ended = True  # before feeds are closed: a thread that reads one would open it again
    for feed in list(_feeds.values()):
        feed.close()
    if not sys.is_finalizing():
        lib.fst_feed_end()
