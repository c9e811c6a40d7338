"""Remote files kept in a local folder: the option ``remote_cache``.

What streams past is also written to a sparse file. When all of it is there, the file gets its
name, and the next load is one of a local file. Whether the remote file has changed is asked before
by one small request; there is none where the URL names a revision that cannot change, or offline.

Nothing that fails here fails a load: the bytes are then streamed, and the reason is logged.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

from ..config import Config, hub_is_offline
from . import base, standin
from .base import HEAD_BYTES, RemoteError, Source, SourceStats
from .names import identity_text, is_weak
from .partial import Partial
from .standin import StandIn
from .store import Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["CachedSource", "find_local", "open_kept"]

OpenSource: TypeAlias = Callable[..., Source]

_log = logging.getLogger("fastst_patch")

_PINNED = re.compile(r"hf://(?:[^@]+)@[0-9a-f]{40}/")


def find_local(url: str, config: Config, opening: OpenSource | None = None) -> str | None:
    """A complete file in the folder; None where there is none, or it has changed.

    Args:
        url: as for `base.open_source`, or of a stand-in: see `standin.url_of`.
        config: options in force.
        opening: in the place of `base.open_source`.

    Raises:
        RemoteChangedError: the file is another one than the stand-in was made for.
        RemoteError, OptionError, ImportError: as `base.open_source`.
    """
    url, stands = standin.resolved(url)
    store = _store_for(config, stands)
    if store is None:
        return None
    found = store.complete(url, None if stands is None else stands.identity)
    if found is None or _is_fixed(url, config):
        return found
    source = _opened(opening, url, config, stands, head_bytes=1)
    try:
        return store.complete(url, identity_text(source.identity))
    finally:
        source.close()


def open_kept(url: str, config: Config, opening: OpenSource | None = None) -> Source:
    """Open a remote file; what is read of it is kept where the options say so.

    Args:
        url: as for `find_local`.
        config: options in force.
        opening: as for `find_local`.

    Returns:
        A source, which the caller closes.

    Raises as `find_local`.
    """
    url, stands = standin.resolved(url)
    store = _store_for(config, stands)
    source = _opened(opening, url, config, stands)
    if store is None:
        return source
    try:
        return _kept(url, source, store)
    except BaseException:
        source.close()
        raise


def _store_for(config: Config, stands: StandIn | None) -> Store | None:
    folder = config.remote_cache or (None if stands is None else stands.cache)
    return None if folder is None else Store(folder, config.remote_cache_bytes)


def _is_fixed(url: str, config: Config) -> bool:
    """Whether nobody asks if a file has changed: its URL names a revision, or we are offline."""
    if _PINNED.match(url) or config.remote_offline:
        return True
    return base.scheme_of(url) == "hf" and hub_is_offline()


def _opened(
    opening: OpenSource | None,
    url: str,
    config: Config,
    stands: StandIn | None,
    head_bytes: int = HEAD_BYTES,
) -> Source:
    source = (opening or base.open_source)(url, config.storage_options, head_bytes=head_bytes)
    try:
        if stands is not None:
            stands.check(source)
    except BaseException:
        source.close()
        raise
    return source


def _kept(url: str, source: Source, store: Store) -> Source:
    """A source that also writes down what is read, over the given one.

    Itself, where it is not kept: it is complete already, or there is a reason, which is logged.
    """
    reason: object = "the server does not tell when it changes"
    if not is_weak(source.identity):
        try:
            partial = store.begin(url, source)
            return source if partial is None else CachedSource(source, partial, store)
        except RemoteError:
            raise
        except OSError as error:
            reason = error
    _log.warning("%s is streamed and not kept in %s: %s", source.name, store.folder, reason)
    return source


class CachedSource:
    """A source that takes what is here from the disk, and writes down what it fetches.

    The first bytes, which opening the source has fetched, are written down at once.
    """

    def __init__(self, source: Source, partial: Partial, store: Store) -> None:
        self._source = source
        self._partial = partial
        self._store = store
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
            self._store.finish(self._partial)
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
