"""Ranges over HTTP/1.1, from the socket into the caller's memory.

The standard library's client is used and not obstore's, for reasons that were measured with obstore
0.12: on a redirect it sends the whole first URL, with the signature in its query, to the other host
(Referer); it hides Retry-After, and the status of a refused range; after a fork its requests never
end; and it took 1.2 to 1.7 s of CPU for a GB that takes 0.8 to 0.9 s here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import time
from collections.abc import Mapping
from typing import Any

from .dial import Connection, Dialer, Incoming, explained
from .retry import Failure, Flight, Limits, of_status, retry_after
from .transport import Answer, Place, check_range
from .urls import HttpUrl

__all__ = ["HttpTransport"]

_REDIRECTS = (301, 302, 303, 307, 308)
_HOPS = 10
_EXPIRED = (400, 401, 403, 404, 410)
"""What servers answer to a signed address, got by a redirect, after its time."""

_PIECE = 1 << 16  # of a chunked body, which http.client copies
_STALE = (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected)


class HttpTransport:
    """One file on an HTTP server.

    Args:
        url: of the file.
        headers: sent to the URL's own host, with every request; often credentials.
        agent: the User-Agent, for every host.
        dialer: opens connections.
        place: the file's place, where it is not the URL's.
    """

    def __init__(
        self,
        url: HttpUrl,
        headers: Mapping[str, str],
        agent: str,
        dialer: Dialer,
        place: Place | None = None,
    ) -> None:
        self._url = url
        self._headers = dict(headers)
        if url.authorization is not None:
            self._headers["Authorization"] = url.authorization
        self._agent = agent
        self._dialer = dialer
        self._place = place or url.place()
        self._moved: HttpUrl | None = None  # where redirects led the last time
        # A list's append and pop are single operations: threads need no lock around them.
        self._idle: dict[tuple[str, str, int], list[Connection]] = {}

    @property
    def place(self) -> Place:
        """Where the file is."""
        return self._place

    def get(
        self, span: tuple[int, int] | None, if_match: str | None, flight: Flight, limits: Limits
    ) -> HttpBody:
        """Send one request: see `Transport`. It follows redirects, without credentials elsewhere.

        Where they led is kept for the next request. A signed address that they led to expires: it
        is looked up again when it is refused.
        """
        asked = {"Accept-Encoding": "identity"}
        if span is not None:
            asked["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        if if_match is not None:
            asked["If-Match"] = if_match
        moved = self._moved
        if moved is not None:
            try:
                return self._follow(moved, span, asked, flight, limits)
            except Failure as failure:
                if failure.status in _EXPIRED or failure.retry:
                    self._moved = None
                if flight.aborted or failure.status not in _EXPIRED:
                    raise
        return self._follow(self._url, span, asked, flight, limits)

    def sign(self, url: HttpUrl) -> None:
        """Use another URL of the same file from now on: one with a new signature."""
        self._url, self._moved = url, None

    def close(self) -> None:
        """Close the connections that wait for another request."""
        for idle in list(self._idle.values()):
            while idle:
                idle.pop().close()

    # ---- requests -------------------------------------------------------

    def _follow(
        self,
        url: HttpUrl,
        span: tuple[int, int] | None,
        asked: Mapping[str, str],
        flight: Flight,
        limits: Limits,
    ) -> HttpBody:
        until = time.monotonic() + limits.deadline
        for _ in range(_HOPS + 1):
            left = until - time.monotonic()
            if left <= 0:
                raise Failure("redirected too slowly", remedy="check the URL and the network")
            reply = self._exchange(url, asked, flight, limits.within(left))
            if reply.response.status not in _REDIRECTS:
                body = reply.body(span)
                self._moved = None if url is self._url else url
                return body
            location = reply.response.headers.get("Location")
            status = reply.response.status
            reply.close()
            url = _next(url, location, status)
        raise Failure("redirected too often", remedy="check the URL")

    def _exchange(
        self, url: HttpUrl, asked: Mapping[str, str], flight: Flight, limits: Limits
    ) -> _Reply:
        """Send a request, on a connection that is open already where there is one."""
        proxy = self._dialer.proxy_for(url)
        idle = self._idle.setdefault(url.origin, [])
        while True:
            connection, kept = _reusable(idle), True
            if connection is None:
                connection, kept = self._dialer.connect(url, proxy, flight, limits), False
            flight.on_abort(connection.abort)
            failure = None
            try:
                connection.sock.settimeout(limits.stall)
                connection.sock.sendall(self._request(url, proxy, asked))
                incoming: Any = Incoming(connection.sock, limits.stall)  # in place of a socket
                response = http.client.HTTPResponse(incoming, method="GET")
                try:
                    response.begin()
                except BaseException:
                    response.close()
                    raise
                return _Reply(connection, incoming, response, idle, flight)
            except BaseException as error:
                connection.close()
                # The server may close a kept connection at any time: that was no answer.
                if kept and isinstance(error, _STALE) and not flight.aborted:
                    continue
                if not isinstance(error, (OSError, http.client.HTTPException, ValueError)):
                    raise
                failure = explained(error, "the request got no answer")
            raise failure

    def _request(self, url: HttpUrl, proxy: HttpUrl | None, asked: Mapping[str, str]) -> bytes:
        headers = {"Host": url.netloc, "User-Agent": self._agent, "Accept": "*/*", **asked}
        if url.origin == self._url.origin:
            headers.update(self._headers)
        target = url.target
        if proxy is not None and url.scheme == "http":
            target = f"http://{url.netloc}{target}"
            if proxy.authorization is not None:
                headers["Proxy-Authorization"] = proxy.authorization
        lines = [f"GET {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _reusable(idle: list[Connection]) -> Connection | None:
    while True:
        try:
            connection = idle.pop()
        except IndexError:
            return None
        if connection.own:
            return connection
        connection.close()  # of the process that forked this one, which goes on using it


def _next(url: HttpUrl, location: str | None, status: int) -> HttpUrl:
    """Where a redirect leads."""
    found = None
    if location is not None:
        with contextlib.suppress(ValueError):  # its text may hold what is secret
            found = url.joined(location)
    if found is None:
        raise Failure("redirected to nowhere", status=status, remedy="check the URL")
    if url.scheme == "https" and found.scheme == "http":
        raise Failure(
            f"redirected from https to http, to {found.netloc}", status=status,
            remedy="name the http URL itself if it is to be trusted",
        )  # fmt: skip
    return found


@dataclasses.dataclass
class _Reply:
    """The head of an answer, and the connection that its body comes by."""

    connection: Connection
    incoming: Incoming
    response: http.client.HTTPResponse
    idle: list[Connection]
    flight: Flight

    def close(self) -> None:
        self.flight.on_abort(None)
        self.response.close()
        self.connection.close()

    def body(self, span: tuple[int, int] | None) -> HttpBody:
        """The body, if it is what was asked for."""
        try:
            return HttpBody(self, self._answer(span))
        except BaseException:
            self.close()
            raise

    def _answer(self, span: tuple[int, int] | None) -> Answer:
        response = self.response
        headers = response.headers
        if response.status not in (200, 206):
            raise of_status(response.status, retry_after(headers.get("Retry-After")))
        encoding = headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise Failure(
                f"the server sends the file compressed ({encoding[:20]}), so its bytes cannot be"
                " counted",
                status=response.status,
                remedy="switch compression off for this file at the server",
            )
        etag, modified = headers.get("ETag"), headers.get("Last-Modified")
        if response.status == 200:
            return Answer(response.length, True, etag, modified)
        if span is None:
            raise Failure("a part came, and the whole file was asked for", status=206, retry=True)
        size = check_range(headers.get("Content-Range"), span, response.length)
        return Answer(size, False, etag, modified)


class HttpBody:
    """The body of an answer: see `Body`."""

    def __init__(self, reply: _Reply, answer: Answer) -> None:
        self._reply = reply
        self._answer = answer
        self._left = reply.response.length  # None: it ends where the chunks or the connection do
        self._open = True

    @property
    def answer(self) -> Answer:
        """What the server says of the file."""
        return self._answer

    def attach(self, flight: Flight) -> None:
        """Let another read go on with it."""
        self._reply.flight.on_abort(None)
        self._reply.flight = flight
        flight.on_abort(self._reply.connection.abort)

    def readinto(self, view: memoryview) -> int:
        """Read at least one byte; 0 at the end."""
        response, failure = self._reply.response, None
        self._reply.incoming.again()
        try:
            if response.chunked:
                piece = response.read1(min(len(view), _PIECE))
                count = len(piece)
                view[:count] = piece
                return count
            if self._left is None:
                return self._received(view)
            if self._left == 0:
                return 0
            count = self._received(view[: self._left])
            if count:
                self._left -= count
                return count
            failure = Failure(f"the body ended {self._left} bytes early", retry=True)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failure = _broken(error)
        raise failure

    def _received(self, view: memoryview) -> int:
        # One `recv` into the caller's memory. `HTTPResponse.readinto` would return when the view
        # is full, which lets nobody see that a body drips.
        body: Any = self._reply.response.fp
        return int(body.readinto1(view))

    def finish(self) -> None:
        """Make sure that nothing follows, and keep the connection."""
        response, reply, failure = self._reply.response, self._reply, None
        if self._left is None:
            try:
                if self.readinto(memoryview(bytearray(1))):
                    failure = Failure("the body is longer than it was to be", retry=True)
            except Failure as one:
                failure = one
        if failure is not None:
            raise failure
        reply.flight.on_abort(None)
        self._open = False
        response.close()
        if response.will_close or not reply.connection.own:
            reply.connection.close()
        else:
            reply.idle.append(reply.connection)

    def close(self) -> None:
        """Close the connection, where the body was not finished."""
        if self._open:
            self._open = False
            self._reply.close()


def _broken(error: Exception) -> Failure:
    if isinstance(error, TimeoutError):
        return Failure("the body stalled", retry=True, remedy="check the network")
    if isinstance(error, http.client.IncompleteRead):
        return Failure("the body ended early", retry=True)
    return explained(error, "the body broke off")
