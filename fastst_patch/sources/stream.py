"""One stream of a whole file, shared by all its reads, where a server gives no ranges."""

from __future__ import annotations

import collections

from ..locks import Guard, here, interrupted
from .attempts import Progress
from .retry import Failure, Flight
from .transport import Answer, Body, Transport, same_file

__all__ = ["Stream"]

_PIECE = 1 << 20
_KEPT = 64 << 20
"""Bytes of what a read skipped that are kept: reads of several threads come out of order."""


class Stream:
    """A position in the body of a whole file. One read at a time moves it.

    A read before it takes bytes that were kept, or starts the body again.
    """

    def __init__(self, transport: Transport, first: Answer, size: int) -> None:
        self._transport = transport
        self._first = first
        self._size = size
        self._guard = Guard()
        self._body: Body | None = None
        self._at = 0
        self._kept: collections.deque[tuple[int, bytes]] = collections.deque()

    def read(self, offset: int, view: memoryview, flight: Flight, progress: Progress) -> None:
        """Fill a view, from where `progress` is on.

        Raises:
            Failure: the body failed; the next read starts it again.
        """
        if interrupted():  # a signal handler, maybe in a read of this thread: by another body
            other = Stream(self._transport, self._first, self._size)
            try:
                other._fill(offset, view, flight, progress)
            finally:
                other.close()
            return
        with self._guard.lock(self._abandon):
            here.inside = True
            try:
                progress.restart()
                self._fill(offset, view, flight, progress)
            except BaseException:
                self._drop()
                raise
            finally:
                here.inside = False

    def _abandon(self) -> object:
        old, self._body, self._at = self._body, None, 0
        self._kept = collections.deque()
        return old

    def close(self) -> None:
        """Let go of the body. No read is in progress."""
        self._drop()
        self._kept.clear()

    def _drop(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()

    def _fill(self, offset: int, view: memoryview, flight: Flight, progress: Progress) -> None:
        if flight.aborted:
            raise Failure("cancelled")
        self._take_kept(offset, view, progress)
        if progress.done == len(view):
            return
        body = self._reach(offset + progress.done, flight, progress)
        while progress.done < len(view):
            progress.add(self._next(body, view[progress.done :]))
        if self._at == self._size:
            body.finish()
            self._drop()

    def _reach(self, position: int, flight: Flight, progress: Progress) -> Body:
        """The body at a position: the one that is open, or a new one."""
        if self._body is None or self._at > position:
            self._drop()
            body = self._transport.get(None, None, flight, progress.limits)
            self._body, self._at = body, 0
            same_file(self._first, body.answer)
        else:
            body = self._body
            body.attach(flight)
        while self._at < position:
            piece = bytearray(min(_PIECE, position - self._at))
            begin, filled = self._at, 0
            with memoryview(piece) as rest:
                while filled < len(piece):
                    count = self._next(body, rest[filled:])
                    filled += count
                    progress.arrived += count
                    progress.check()
            self._keep(begin, bytes(piece))
            progress.restart()
        return body

    def _next(self, body: Body, view: memoryview) -> int:
        count = body.readinto(view)
        if not count:
            raise Failure(f"the body ended {self._size - self._at} bytes early", retry=True)
        self._at += count
        return count

    def _keep(self, begin: int, piece: bytes) -> None:
        self._kept.append((begin, piece))
        while len(self._kept) * _PIECE > _KEPT:
            self._kept.popleft()

    def _take_kept(self, offset: int, view: memoryview, progress: Progress) -> None:
        for begin, piece in self._kept:
            at = offset + progress.done
            if begin <= at < begin + len(piece):
                part = memoryview(piece)[at - begin :][: len(view) - progress.done]
                view[progress.done : progress.done + len(part)] = part
                progress.done += len(part)
