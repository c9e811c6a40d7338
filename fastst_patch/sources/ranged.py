"""A remote file as a `Source`, over any `Transport`."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING

from ..errors import warn_caller
from .attempts import Attempts, Progress
from .base import RemoteWarning, SourceStats
from .retry import Failure, Flight, Limits
from .stream import Stream
from .transport import Answer, Transport, same_file

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["RangedSource"]


class RangedSource:
    """An open remote file: see `Source`. Made by `RangedSource.open`."""

    def __init__(
        self, transport: Transport, attempts: Attempts, answer: Answer, size: int, head: bytearray
    ) -> None:
        self._transport = transport
        self._attempts = attempts
        self._answer = answer
        self._head = head
        self._stream = Stream(transport, answer, size) if answer.whole else None
        self._size = size
        _open.add(self)

    @classmethod
    def open(cls, transport: Transport, limits: Limits, head_bytes: int) -> RangedSource:
        """Ask for the first bytes, and so for everything else that has to be known.

        Raises:
            RemoteError: the file cannot be opened.
        """
        attempts = Attempts(transport.place, limits)
        opening = _Opening(transport, max(head_bytes, 1))
        try:
            answer = attempts.run(0, opening.ask)
        except BaseException:
            transport.close()
            raise
        assert answer.size is not None
        source = cls(transport, attempts, answer, answer.size, opening.head)
        if answer.whole and answer.size:
            warn_caller(
                f"{source.name}: the server gives no ranges, so the whole file is read in one"
                " stream, also for parts of it",
                RemoteWarning,
            )
        return source

    # ---- what it is -----------------------------------------------------

    @property
    def scheme(self) -> str:
        """The path in reports."""
        return self._transport.place.scheme

    @property
    def name(self) -> str:
        """The URL without user info and query."""
        return self._transport.place.name

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def identity(self) -> Hashable:
        """Equal for equal bytes."""
        return self._answer.identity

    @property
    def sequential(self) -> bool:
        """The server gives no ranges."""
        return self._stream is not None

    @property
    def stats(self) -> SourceStats:
        """What it did so far."""
        return self._attempts.stats

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, {self.size} bytes>"

    # ---- reading --------------------------------------------------------

    def read(self, offset: int, nbytes: int) -> bytearray:
        """Exactly these bytes: see `Source.read`."""
        self._check(offset, nbytes)
        into = bytearray(nbytes)
        self.read_into(offset, into)
        return into

    def read_into(self, offset: int, into: Buffer) -> None:
        """Fill memory with the bytes from an offset on: see `Source.read_into`."""
        view = memoryview(into).cast("B")
        self._check(offset, len(view))
        kept = min(len(self._head) - offset, len(view))
        if kept > 0 and not self._attempts.cancelled:
            view[:kept] = self._head[offset : offset + kept]
            offset, view = offset + kept, view[kept:]
        if not len(view) and not self._attempts.cancelled:
            return
        try:
            self._attempts.run(
                offset, lambda flight, progress: self._fetch(offset, view, flight, progress)
            )
        finally:
            if self._attempts.cancelled and not self._attempts.busy:
                self._let_go()  # the connection that this read came by

    def cancel(self) -> None:
        """End the reads in flight, and all later ones."""
        self._attempts.cancel()

    def close(self) -> None:
        """Cancel, and let go of connections."""
        self._attempts.cancel()
        if not self._attempts.busy:
            self._let_go()
        _open.discard(self)

    # ---- one request ----------------------------------------------------

    def _check(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self._size:
            raise ValueError(
                f"{self.name}: bytes {offset} to {offset + nbytes} are not within its {self._size}"
            )

    def _fetch(self, offset: int, view: memoryview, flight: Flight, progress: Progress) -> None:
        if self._stream is not None:
            self._stream.read(offset, view, flight, progress)
            return
        begin = progress.done
        span = offset + begin, offset + len(view)
        body = self._transport.get(span, self._answer.if_match, flight, progress.limits)
        try:
            same_file(self._answer, body.answer)
            if body.answer.whole:
                raise Failure(
                    "the whole file came, and a part of it was asked for", status=200, retry=True,
                    remedy="the server or a proxy before it serves ranges only sometimes",
                )  # fmt: skip
            while progress.done < len(view):
                count = body.readinto(view[progress.done :])
                if not count:
                    missing = len(view) - progress.done
                    raise Failure(f"the body ended {missing} bytes early", retry=True)
                progress.add(count)
            try:
                body.finish()
            except Failure:
                progress.done = begin  # a body of another length than it said is not trusted
                raise
        finally:
            body.close()

    def _let_go(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._transport.close()


class _Opening:
    """The first request: what is to be known of a file, and its first bytes."""

    def __init__(self, transport: Transport, head_bytes: int) -> None:
        self._transport = transport
        self._head_bytes = head_bytes
        self.head = bytearray()

    def ask(self, flight: Flight, progress: Progress) -> Answer:
        """One try."""
        progress.done = 0
        span = (0, self._head_bytes)
        try:
            body = self._transport.get(span, None, flight, progress.limits)
        except Failure as failure:
            if failure.status != 416:
                raise
            # An empty file has no first byte. A body of the whole file tells for certain.
            body = self._transport.get(None, None, flight, progress.limits)
        try:
            answer = body.answer
            if answer.size is None:
                raise Failure(
                    "the server does not tell the file's size",
                    remedy="it has to send Content-Length, or Content-Range with the whole length",
                )
            self.head = bytearray(min(self._head_bytes, answer.size))
            with memoryview(self.head) as view:
                while progress.done < len(view):
                    count = body.readinto(view[progress.done :])
                    if not count:
                        raise Failure("the body ended early", retry=True)
                    progress.add(count)
            if not answer.whole or len(self.head) == answer.size:
                body.finish()
            return answer
        finally:
            body.close()


_open: weakref.WeakSet[RangedSource] = weakref.WeakSet()


@atexit.register
def _cancel_all() -> None:
    """Threads of the engine that wait for a server would keep the interpreter from ending."""
    for source in list(_open):
        source.cancel()
