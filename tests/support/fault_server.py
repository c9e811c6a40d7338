"""An HTTP server on loopback that does to a client whatever a network does.

It serves files from memory, by ranges, with ETags and If-Match. A fault is a function that takes an
`Exchange` and answers it in its own way; `FaultServer.faults` says which requests get one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import functools
import gzip
import hashlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

LAST_MODIFIED = 1_700_000_000


@dataclasses.dataclass
class Remote:
    """A file on the server."""

    content: bytes
    modified: int = LAST_MODIFIED

    @functools.cached_property
    def etag(self) -> str:
        return f'"{hashlib.sha1(self.content).hexdigest()[:16]}"'


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client sent."""

    number: int
    method: str
    target: str
    headers: Mapping[str, str]  # names in lower case

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


@dataclasses.dataclass
class Exchange:
    """A request, the answer that a healthy server gives, and the connection."""

    server: FaultServer
    request: Request
    sock: socket.socket
    status: int
    headers: dict[str, str]
    body: bytes

    def send_head(self, status: int | None = None, **headers: str | None) -> None:
        """Send the head of the healthy answer; None for a header leaves it out."""
        changed = {name.replace("_", "-"): value for name, value in headers.items()}
        merged: dict[str, str | None] = {**self.headers, **changed}
        lines = [f"HTTP/1.1 {status or self.status} Some Reason"]
        lines += [f"{name}: {value}" for name, value in merged.items() if value is not None]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def answer(self) -> None:
        """Answer as a healthy server does."""
        self.send_head()
        self.sock.sendall(self.body)

    def hang_up(self) -> None:
        """Close the connection in order."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Close the connection with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionResetError  # `_serve` closes it


Fault = Callable[[Exchange], None]


class FaultServer:
    """Serves files until it is stopped; a context manager.

    Attributes:
        files: what it has, by path.
        faults: the fault of a request by its number, counted from 0; None for a healthy answer.
        requests: all that came, in order.
        sent: bytes of the bodies of healthy answers to them.
        etags, last_modified, if_match: what it offers and honours.
        mute: it takes connections, and says nothing.
    """

    def __init__(
        self,
        files: Mapping[str, bytes] | None = None,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.files = {path: Remote(content) for path, content in (files or {}).items()}
        self.faults: Callable[[Request], Fault | None] = lambda _: None
        self.requests: list[Request] = []
        self.sent = 0
        self.etags = self.last_modified = self.if_match = True
        self.mute = False
        self.stopping = threading.Event()
        self._tls = tls
        self._lock = threading.Lock()
        self._socks: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self.port = self._listener.getsockname()[1]
        self.netloc = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._accepting = self._start(self._accept)

    def url(self, path: str) -> str:
        return f"{'https' if self._tls else 'http'}://{self.netloc}{path}"

    def __enter__(self) -> FaultServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close everything, and wait for all threads."""
        self.stopping.set()
        self.stop_listening()
        self._accepting.join(10)
        with self._lock:
            socks, threads = list(self._socks), list(self._threads)
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(10)
                assert not thread.is_alive()

    def stop_listening(self) -> None:
        """Refuse new connections from now on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def drop_connections(self) -> None:
        """Close those that are open, as a server does with kept ones that are idle."""
        with self._lock:
            socks = list(self._socks)
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    # ---- connections ----------------------------------------------------

    def _start(self, work: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=args, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
            )  # head and body are two sends
            with self._lock:  # before its thread, which `stop` waits for
                self._socks.add(sock)
            self._start(self._serve, sock)

    def _serve(self, raw: socket.socket) -> None:
        sock = raw
        try:
            if self.mute:
                self.stopping.wait(60)
                return
            if self._tls is not None:
                sock = self._tls.wrap_socket(raw, server_side=True)
                with self._lock:
                    self._socks.add(sock)
            with sock.makefile("rb") as reader:
                if reader.peek(1)[:1] == b"\x16":  # TLS, to a server without
                    sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                    return
                for request in self._read_requests(reader):
                    if request.method == "CONNECT":
                        self._tunnel(sock, request)
                        return
                    exchange = self._exchange(request, sock)
                    (self.faults(request) or Exchange.answer)(exchange)
        except (OSError, ValueError):
            pass  # the client went away, or a fault closed the connection
        finally:
            with self._lock:
                self._socks -= {raw, sock}
            sock.close()
            raw.close()

    def _read_requests(self, reader: Any) -> Iterator[Request]:
        while line := reader.readline():
            method, target, _ = line.decode("latin-1").split()
            headers = {}
            while (field := reader.readline().decode("latin-1").strip()) != "":
                name, _, value = field.partition(":")
                headers[name.strip().lower()] = value.strip()
            with self._lock:
                request = Request(len(self.requests), method, target, headers)
                self.requests.append(request)
            yield request

    def _tunnel(self, sock: socket.socket, request: Request) -> None:
        """Be a proxy for TLS."""
        host, _, port = request.target.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port))) as far:
            sock.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            self._start(_pump, far, sock)
            _pump(sock, far)

    # ---- a healthy answer -----------------------------------------------

    def _exchange(self, request: Request, sock: socket.socket) -> Exchange:
        path = request.path
        if path.startswith("http://"):  # to a proxy
            path = "/" + path.split("/", 3)[3]
        status, headers, body = self._healthy(path, request)
        headers["Content-Length"] = str(len(body))
        if request.method == "HEAD":
            body = b""
        with self._lock:
            self.sent += len(body)
        return Exchange(self, request, sock, status, headers, body)

    def _healthy(self, path: str, request: Request) -> tuple[int, dict[str, str], bytes]:
        remote = self.files.get(path)
        if remote is None:
            return 404, {}, b"no such file"
        size, headers = len(remote.content), {"Accept-Ranges": "bytes"}
        if self.etags:
            headers["ETag"] = remote.etag
        if self.last_modified:
            headers["Last-Modified"] = email.utils.formatdate(remote.modified, usegmt=True)
        wanted = request.headers.get("if-match")
        if self.if_match and wanted not in (None, remote.etag):
            return 412, {}, b"it changed"
        span = request.headers.get("range")
        if span is None:
            return 200, headers, remote.content
        first, _, last = span.removeprefix("bytes=").partition("-")
        begin, stop = int(first), min(int(last) + 1 if last else size, size)
        if begin >= size:
            return 416, {"Content-Range": f"bytes */{size}"}, b"no such range"
        headers["Content-Range"] = f"bytes {begin}-{stop - 1}/{size}"
        return 206, headers, remote.content[begin:stop]


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


# ---- which requests get a fault -----------------------------------------


def at(number: int, fault: Fault) -> Callable[[Request], Fault | None]:
    """One request gets it, and no other."""
    return lambda request: fault if request.number == number else None


def since(number: int, fault: Fault) -> Callable[[Request], Fault | None]:
    """Every request from one on gets it."""
    return lambda request: fault if request.number >= number else None


# ---- faults -------------------------------------------------------------


def reset_mid_body(exchange: Exchange) -> None:
    exchange.send_head()
    exchange.sock.sendall(exchange.body[: len(exchange.body) // 2])
    exchange.reset()


def reset_at_once(exchange: Exchange) -> None:
    exchange.reset()


def hang_up(exchange: Exchange) -> None:
    """Close without an answer."""
    exchange.hang_up()


def truncated(exchange: Exchange) -> None:
    exchange.send_head()
    exchange.sock.sendall(exchange.body[:-1])
    exchange.hang_up()


def stalled(exchange: Exchange) -> None:
    exchange.send_head()
    exchange.sock.sendall(exchange.body[: len(exchange.body) // 2])
    exchange.server.stopping.wait(60)


def silent(exchange: Exchange) -> None:
    """Take the request, and never answer."""
    exchange.server.stopping.wait(60)


def slow(exchange: Exchange) -> None:
    """Send everything, in pieces with pauses."""
    exchange.send_head()
    step = max(1, len(exchange.body) // 8)
    for begin in range(0, len(exchange.body), step):
        exchange.sock.sendall(exchange.body[begin : begin + step])
        exchange.server.stopping.wait(0.02)


def dripping(exchange: Exchange) -> None:
    """Send a byte now and then: it never stalls, and never ends."""
    exchange.send_head()
    for begin in range(len(exchange.body)):
        exchange.sock.sendall(exchange.body[begin : begin + 1])
        if exchange.server.stopping.wait(0.05):
            return


def dripping_chunks(exchange: Exchange) -> None:
    """As `dripping`, of a page whose length nobody knows before."""
    exchange.send_head(Content_Length=None, Transfer_Encoding="chunked")
    while not exchange.server.stopping.wait(0.05):
        exchange.sock.sendall(b"1\r\nx\r\n")


def dripping_head(exchange: Exchange) -> None:
    """Send a header that never ends, a byte now and then."""
    exchange.sock.sendall(b"HTTP/1.1 206 Partial Content\r\nX-Endless: ")
    while not exchange.server.stopping.wait(0.05):
        exchange.sock.sendall(b"x")


def whole_file(exchange: Exchange) -> None:
    """200 instead of 206."""
    remote = exchange.server.files[exchange.request.path]
    exchange.send_head(200, Content_Range=None, Content_Length=str(len(remote.content)))
    exchange.sock.sendall(remote.content)


def other_range(exchange: Exchange) -> None:
    """206 with bytes one further than were asked for."""
    remote = exchange.server.files[exchange.request.path]
    first, _, rest = exchange.headers["Content-Range"].removeprefix("bytes ").partition("-")
    last = int(rest.partition("/")[0])
    begin, size = int(first) + 1, len(remote.content)
    body = remote.content[begin : last + 2]
    span = f"bytes {begin}-{begin + len(body) - 1}/{size}"
    exchange.send_head(Content_Range=span, Content_Length=str(len(body)))
    exchange.sock.sendall(body)


def no_content_range(exchange: Exchange) -> None:
    exchange.send_head(Content_Range=None)
    exchange.sock.sendall(exchange.body)


def shorter(exchange: Exchange) -> None:
    """A Content-Length that does not fit Content-Range."""
    exchange.send_head(Content_Length=str(len(exchange.body) - 3))
    exchange.sock.sendall(exchange.body[:-3])


def longer(exchange: Exchange) -> None:
    """More bytes than Content-Range says."""
    exchange.send_head(Content_Length=str(len(exchange.body) + 3))
    exchange.sock.sendall(exchange.body + b"abc")


def gzipped(exchange: Exchange) -> None:
    """As some proxies do: compressed, for a client that did not ask for it."""
    body = gzip.compress(exchange.body)
    exchange.send_head(
        200, Content_Encoding="gzip", Content_Range=None, Content_Length=str(len(body))
    )
    exchange.sock.sendall(body)


def gzipped_part(exchange: Exchange) -> None:
    """Labelled as compressed, with the length of what was asked for."""
    exchange.send_head(Content_Encoding="gzip")
    exchange.sock.sendall(exchange.body)


def chunked(exchange: Exchange) -> None:
    """A body in chunks, which is allowed."""
    exchange.send_head(Content_Length=None, Transfer_Encoding="chunked")
    for begin in range(0, len(exchange.body), 5000):
        piece = exchange.body[begin : begin + 5000]
        exchange.sock.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
    exchange.sock.sendall(b"0\r\n\r\n")


def chunked_longer(exchange: Exchange) -> None:
    exchange.body += b"abc"
    chunked(exchange)


def chunked_broken(exchange: Exchange) -> None:
    exchange.send_head(Content_Length=None, Transfer_Encoding="chunked")
    exchange.sock.sendall(b"%x\r\n%s" % (len(exchange.body), exchange.body[:-1]))
    exchange.hang_up()


def until_closed(exchange: Exchange) -> None:
    """A body that ends with its connection, as HTTP/1.0 has it."""
    exchange.send_head(Content_Length=None, Connection="close")
    exchange.sock.sendall(exchange.body)
    exchange.hang_up()


def garbage(exchange: Exchange) -> None:
    exchange.sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    exchange.hang_up()


def status(code: int, **headers: str) -> Fault:
    def fault(exchange: Exchange) -> None:
        body = b'<Error>status: 200, {"secret":"none"}</Error>'
        exchange.headers = {}
        exchange.send_head(code, Content_Length=str(len(body)), **headers)
        exchange.sock.sendall(body)

    return fault


def redirect(code: int, location: str) -> Fault:
    return status(code, Location=location)


def replaced(exchange: Exchange) -> None:
    """The file gets other content, of the same size, before this request is answered."""
    server, request = exchange.server, exchange.request
    remote = server.files[request.path]
    if not remote.modified > LAST_MODIFIED:
        content = bytes(255 - byte for byte in remote.content)
        server.files[request.path] = Remote(content, LAST_MODIFIED + 60)
    server._exchange(request, exchange.sock).answer()


def cut(exchange: Exchange) -> None:
    """The file becomes one byte shorter before this request is answered."""
    server, request = exchange.server, exchange.request
    remote = server.files[request.path]
    server.files[request.path] = Remote(remote.content[:-1], remote.modified)
    server._exchange(request, exchange.sock).answer()


def vanishing(exchange: Exchange) -> None:
    """The server goes away: this connection is closed, and others are refused."""
    exchange.server.stop_listening()
    exchange.server.drop_connections()
