"""What every way to reach a server offers to `RangedSource`, and what an answer has to say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable
from typing import Protocol

from .base import RemoteChangedError
from .retry import Failure, Flight, Limits

__all__ = ["Answer", "Body", "Place", "Transport", "check_range", "same_file"]

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a file is, without anything secret.

    Attributes:
        scheme: as the report names the path.
        host: as in `RemoteError`.
        path: as in `RemoteError`.
        name: the URL without user info and query.
    """

    scheme: str
    host: str
    path: str
    name: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server says of a file, together with some or all of its bytes.

    Attributes:
        size: of the whole file in bytes; None where the server does not tell.
        whole: the body is the whole file, whatever was asked for.
        etag: as the server wrote it, with quotes; None without one.
        modified: Last-Modified, as the transport has it; None without one.
    """

    size: int | None
    whole: bool
    etag: str | None
    modified: str | None

    @property
    def if_match(self) -> str | None:
        """The ETag for an If-Match header; None where it is a weak one, which matches nothing."""
        return None if self.etag is None or self.etag.startswith("W/") else self.etag

    @property
    def identity(self) -> Hashable:
        """Equal for equal bytes; see `Source`."""
        if self.etag is not None:
            return ("etag", self.etag, self.size)
        return ("modified", self.modified, self.size)


class Body(Protocol):
    """The body of an answer. Used by one thread; `Flight.abort` of another one ends it."""

    @property
    def answer(self) -> Answer:
        """What the server says of the file."""
        ...

    def attach(self, flight: Flight) -> None:
        """Let another read go on with it: from now on its flight ends it."""
        ...

    def readinto(self, view: memoryview) -> int:
        """Read at least one byte and at most a view; 0 at the end of the body.

        Raises:
            Failure: the connection broke, stalled, or ended before the announced length.
        """
        ...

    def finish(self) -> None:
        """Make sure that nothing follows, and keep the connection for another request.

        Raises:
            Failure: the body is longer than it was to be.
        """
        ...

    def close(self) -> None:
        """Let go of the body, and of its connection where it is not finished."""
        ...


class Transport(Protocol):
    """Sends requests for one file. Its methods may be called from any thread."""

    @property
    def place(self) -> Place:
        """Where the file is."""
        ...

    def get(
        self,
        span: tuple[int, int] | None,
        if_match: str | None,
        flight: Flight,
        limits: Limits,
    ) -> Body:
        """Send one request, and check that the answer is one to it.

        Args:
            span: first byte and byte behind the last one; the file may end before. None asks for
                the whole file.
            if_match: ETag that the file has to have.
            flight: through which another thread ends the request and the body.
            limits: time limits of the connection.

        Raises:
            Failure: there is no such answer.
        """
        ...

    def close(self) -> None:
        """Let go of all connections that are not in use."""
        ...


def check_range(header: str | None, span: tuple[int, int], length: int | None) -> int | None:
    """Check that a partial answer holds the bytes that were asked for.

    Args:
        header: its Content-Range.
        span: first byte that was asked for, and byte behind the last one.
        length: its Content-Length; None without one.

    Returns:
        The size of the file; None where the server does not tell.

    Raises:
        Failure: it holds others, or is not as long as it says.
    """
    found = _CONTENT_RANGE.fullmatch(header.strip()) if header is not None else None
    if found is None:
        raise Failure(
            "the answer does not say which bytes it holds (Content-Range)", status=206, retry=True,
            remedy="the server or a proxy before it does not serve ranges rightly",
        )  # fmt: skip
    first, last = int(found[1]), int(found[2])
    size = None if found[3] == "*" else int(found[3])
    stop = span[1] if size is None else min(span[1], size)
    if (first, last + 1) != (span[0], stop):
        raise Failure(
            f"bytes {span[0]} to {stop - 1} were asked for, and {first} to {last} came"
            " (Content-Range)",
            status=206,
            retry=True,
            remedy="the server or a proxy before it does not serve ranges rightly",
        )
    if length is not None and length != stop - span[0]:
        raise Failure(
            f"the answer has {length} bytes, and says it has {stop - span[0]}", status=206,
            retry=True, remedy="the server or a proxy before it does not serve ranges rightly",
        )  # fmt: skip
    return size


def same_file(first: Answer, part: Answer) -> None:
    """Check that a later answer is about the file that the first one was about.

    By the ETag where both have one, else by Last-Modified; by the size always. Servers that ignore
    If-Match are caught here.

    Raises:
        Failure: it is not.
    """
    what = None
    if part.size is not None and part.size != first.size:
        what = f"its size was {first.size} bytes and is {part.size}"
    elif first.etag is not None and part.etag is not None:
        what = "its ETag is another one" if part.etag != first.etag else None
    elif first.modified != part.modified and None not in (first.modified, part.modified):
        what = "its Last-Modified is another one"
    if what is not None:
        raise Failure(
            f"the file changed while it was read: {what}", kind=RemoteChangedError,
            remedy="load it again",
        )  # fmt: skip
