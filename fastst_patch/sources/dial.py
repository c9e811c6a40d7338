"""Connections to an HTTP server: addresses, TLS, proxies. Another thread can end each wait."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import os
import socket
import ssl
import time
import urllib.parse
import urllib.request
from typing import Any

from .retry import Failure, Flight, Limits
from .urls import HttpUrl

__all__ = ["Connection", "Dialer", "Incoming", "explained", "tls_context"]


_ENDED = (ssl.SSLEOFError, ssl.SSLZeroReturnError)  # the server closed the connection


class Connection:
    """An open connection, and the process that opened it."""

    __slots__ = ("_pid", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._pid = os.getpid()

    @property
    def own(self) -> bool:
        """Whether this process opened it. A forked child must not speak on its parent's."""
        return self._pid == os.getpid()

    def abort(self) -> None:
        """Wake the thread that waits for this connection."""
        if not self.own:
            return  # `shutdown` in a forked child would end the connection of its parent
        with contextlib.suppress(OSError):  # it is not connected any more, or closed
            # Not `SSLSocket.shutdown`, which takes TLS away from under the thread that waits.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it, without a word to the server."""
        self.sock.close()


class Incoming(io.RawIOBase):
    """What comes by a socket, for `http.client`, up to a time limit.

    The socket's own timeout is for one piece. A server that sends a byte now and then, of a header
    that never ends, would never exceed it.
    """

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock = sock
        self._seconds = seconds
        self.again()

    def again(self) -> None:
        """Begin the time limit anew."""
        self._limit = time.monotonic() + self._seconds

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client.HTTPResponse` calls of a socket; closing it leaves the socket open."""
        return io.BufferedReader(self, 8192)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, into: Any) -> int:
        """Receive once."""
        if time.monotonic() > self._limit:
            raise TimeoutError
        return self._sock.recv_into(into)


@functools.lru_cache(maxsize=8)
def tls_context(certificate: str | None, verify: bool) -> ssl.SSLContext:
    """The system's authorities, or those of ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``.

    Args:
        certificate: more of them, in PEM.
        verify: False accepts every certificate.

    Raises:
        ssl.SSLError: the certificate is illegible.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if certificate is not None:
        context.load_verify_locations(cadata=certificate)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Dialer:
    """Opens connections, directly or through a proxy.

    Args:
        certificate: see `tls_context`.
        verify: see `tls_context`.
        proxy: URL of the proxy for all; None takes those of the environment (``http_proxy``,
            ``https_proxy``, ``no_proxy``).
        excludes: hosts that are not reached through ``proxy``, separated by commas.
    """

    def __init__(
        self,
        certificate: str | None = None,
        verify: bool = True,
        proxy: str | None = None,
        excludes: str | None = None,
    ) -> None:
        self._certificate = certificate
        self._verify = verify
        self._proxy = proxy
        self._excludes = excludes
        self._addresses: dict[tuple[str, int], list[Any]] = {}
        self._proxies: dict[tuple[str, str, int], HttpUrl | None] = {}

    def proxy_for(self, url: HttpUrl) -> HttpUrl | None:
        """The proxy on the way to a URL, as it was when it was first asked for.

        Raises:
            Failure: it is not one that speaks HTTP.
        """
        if url.origin not in self._proxies:
            self._proxies[url.origin] = self._find_proxy(url)
        return self._proxies[url.origin]

    def _find_proxy(self, url: HttpUrl) -> HttpUrl | None:
        if self._proxy is not None:
            proxies = {"no": self._excludes or ""}
            if urllib.request.proxy_bypass_environment(url.host, proxies):  # type: ignore[attr-defined]
                return None
            found: str | None = self._proxy
        else:
            if urllib.request.proxy_bypass(url.host):
                return None
            found = urllib.request.getproxies().get(url.scheme)
        if not found:
            return None
        if "://" not in found:
            found = f"http://{found}"
        if not found.lower().startswith("http://"):
            raise Failure(
                f"proxies of the kind {found.partition('://')[0]} are not supported",
                remedy="name one by http://host:port in https_proxy or proxy_url",
            )
        try:
            parts = urllib.parse.urlsplit(found)
            host, port = parts.hostname, parts.port or 80
            user, password = parts.username, parts.password
        except ValueError:
            host = None
        if host is None:
            raise Failure("the proxy's URL is illegible", remedy="write it as http://host:port")
        token = None
        if user is not None:
            pair = ":".join(urllib.parse.unquote(one or "") for one in (user, password))
            token = f"Basic {base64.b64encode(pair.encode()).decode('ascii')}"
        return HttpUrl("http", host, port, "/", "", token)

    def connect(
        self, url: HttpUrl, proxy: HttpUrl | None, flight: Flight, limits: Limits
    ) -> Connection:
        """Connect to the host of a URL, with TLS for ``https``.

        Raises:
            Failure: it cannot be reached, or is not who it says.
        """
        over = proxy or url
        connection = self._reach(over.host, over.port, flight, limits)
        during = "the proxy cannot be used" if proxy else "cannot connect"
        try:
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sock.settimeout(limits.stall)
            if url.scheme == "https":
                if proxy is not None:
                    _tunnel(connection.sock, url, proxy, limits.stall)
                during = "TLS failed"
                context = tls_context(self._certificate, self._verify)
                sock = context.wrap_socket(
                    connection.sock, server_hostname=url.host, do_handshake_on_connect=False
                )
                connection.sock = sock  # before the handshake: `abort` has to reach it
                sock.do_handshake()
        except BaseException as error:
            connection.close()
            if not isinstance(error, (OSError, http.client.HTTPException, ValueError)):
                raise
            failure = explained(error, during)
            if isinstance(error, ssl.SSLError) and not isinstance(error, _ENDED):
                failure.retry = False  # another handshake would not go otherwise
        else:
            return connection
        raise failure

    def _reach(self, host: str, port: int, flight: Flight, limits: Limits) -> Connection:
        """Connect to the address that answered last time, or to the first that does."""
        failure = None
        addresses = self._resolved(host, port)
        for address in addresses:
            family, kind, protocol, _, where = address
            connection = Connection(socket.socket(family, kind, protocol))
            try:
                flight.on_abort(connection.abort)
                connection.sock.settimeout(limits.connect)
                connection.sock.connect(where)
            except BaseException as error:
                connection.close()
                if not isinstance(error, OSError):
                    raise
                failure = explained(error, "cannot connect")
                if flight.aborted:
                    break
            else:
                self._addresses[host, port] = [address, *(a for a in addresses if a != address)]
                return connection
        self._addresses.pop((host, port), None)  # it may have moved
        assert failure is not None
        raise failure

    def _resolved(self, host: str, port: int) -> list[Any]:
        # Resolved once: nothing can end the wait for a name server from another thread.
        found = self._addresses.get((host, port))
        if found:
            return found
        failure = None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            failure = explained(error, "cannot connect")
        if not found:
            raise failure or Failure("the host has no address")
        return found


def _tunnel(raw: socket.socket, url: HttpUrl, proxy: HttpUrl, seconds: float) -> None:
    """Ask a proxy for a connection to the host of a URL."""
    host = f"[{url.host}]" if ":" in url.host else url.host
    lines = [f"CONNECT {host}:{url.port} HTTP/1.1", f"Host: {host}:{url.port}"]
    if proxy.authorization is not None:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    raw.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    incoming: Any = Incoming(raw, seconds)  # has the one method of a socket that is called
    with http.client.HTTPResponse(incoming, method="CONNECT") as response:
        response.begin()
        if response.status != 200:
            raise Failure(
                "the proxy refused", status=response.status, retry=response.status >= 500,
                remedy="check the proxy's URL, user and password",
            )  # fmt: skip


def explained(error: Exception, during: str) -> Failure:
    """What an exception of the system, of ``ssl`` or of ``http.client`` means for a request.

    Args:
        error: the exception.
        during: what did not work, in words.
    """
    if isinstance(error, ssl.SSLError):
        return _of_tls(error, during)
    if isinstance(error, socket.gaierror):
        return Failure(
            f"the host's name cannot be resolved ({error.strerror})",
            retry=error.errno == socket.EAI_AGAIN,
            remedy="check the name and the network",
        )
    if isinstance(error, TimeoutError):
        return Failure(f"{during}: no answer in time", retry=True, remedy="check the network")
    if isinstance(error, OSError):
        text = (error.strerror or "the connection was closed").lower()
        return Failure(f"{during}: {text}", retry=True, remedy="check that the server runs")
    # Texts of http.client's exceptions may quote what was sent or received.
    return Failure(f"{during}: the answer is not HTTP ({type(error).__name__})", retry=True)


def _of_tls(error: ssl.SSLError, during: str) -> Failure:
    if isinstance(error, ssl.SSLCertVerificationError):
        return Failure(
            f"the server's certificate is not accepted: {error.verify_message}",
            remedy="name the file of your authority in SSL_CERT_FILE, or pass root_certificate",
        )
    if isinstance(error, _ENDED):
        return Failure(f"{during}: the connection was closed", retry=True)
    return Failure(
        f"{during}: {error.reason or 'the server does not speak TLS'}",
        retry=True,
        remedy="check that the server serves https at this port",
    )
