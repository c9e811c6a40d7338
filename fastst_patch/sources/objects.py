"""Object stores, by obstore: S3 and what speaks like it, Google Cloud Storage, Azure.

obstore has their signatures and every way to get credentials. It repeats nothing here: `Attempts`
does, and obstore's own repeating would repeat refused certificates, too.

Objects of S3 come by `signed`, as a rule; the others, and all listings, by obstore's own requests.
Three things obstore does not let us do. Retry-After is not seen: requests wait by back-off. After a
fork it does not work: `loop` says so. It follows redirects by itself: to another host it sends no
signature, but a session token, which is worth nothing without its key, and the query of the URL as
Referer, which holds Azure's SAS where one is used. No option of its client forbids that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from ..errors import OptionError
from . import loop
from .base import Entry, RemotePermissionError
from .retry import Failure, Flight, Limits, of_status
from .transport import Answer, Place

__all__ = ["CLIENT_OPTIONS", "ObjectTransport", "asked", "list_objects", "make_store"]

_STORES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}

CLIENT_OPTIONS = frozenset(
    (
        *("allow_http", "allow_invalid_certificates", "connect_timeout", "default_headers"),
        *("http1_only", "http2_keep_alive_interval", "http2_keep_alive_timeout"),
        *("http2_keep_alive_while_idle", "http2_only", "pool_idle_timeout"),
        *("pool_max_idle_per_host", "proxy_url", "proxy_ca_certificate", "proxy_excludes"),
        *("randomize_addresses", "read_timeout", "root_certificate", "timeout", "user_agent"),
    )
)
"""obstore's keys of the client. Among those of the store they leave the environment's in force."""

_NOT_OF_STORES = frozenset(("default_headers", "root_certificate"))
"""Those that may not stand there."""

_CHUNK = 1 << 18
"""Bytes that obstore collects for a piece. A body that brings fewer in `stall` seconds stalls."""

_STATUS = re.compile(r"^\s+inner: Status \{\n\s+status: ([0-9]{3}),$", re.MULTILINE)


def make_store(scheme: str, bucket: str, options: Mapping[str, object]) -> Any:
    """A store of obstore for a bucket.

    Args:
        scheme: "s3", "gs" or "az".
        bucket: its name; of Azure the container.
        options: keys of obstore's store and of its client, ``credential_provider``, and a mapping
            ``client_options``. What is not given comes from obstore's variables of the environment.

    Raises:
        OptionError: obstore refuses an option.
        ImportError: obstore is not installed.
    """
    try:
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise ImportError(
            f"{scheme}:// URLs take the package obstore: pip install 'fastst-patch[remote]'",
            name="obstore",
        ) from None
    config = dict(options)
    provider = config.pop("credential_provider", None)
    given = config.pop("client_options", None) or {}
    if not isinstance(given, Mapping):
        raise OptionError("option client_options of storage_options: allowed is a mapping")
    client: dict[str, Any] = dict(given)
    client.update({name: config.pop(name) for name in list(config) if name in CLIENT_OPTIONS})
    # Our own limits end a request; obstore's would end a slow one in the middle.
    client.setdefault("timeout", "1h")
    made: dict[str, Any] = {"retry_config": {"max_retries": 0, "retry_timeout": timedelta(0)}}
    if _NOT_OF_STORES & set(client):
        made["client_options"] = client  # in place of all that the environment says of the client
    else:
        config.update(client)
    made["config"] = config
    if provider is not None:
        made["credential_provider"] = provider
    failed = None
    try:
        return getattr(obstore.store, _STORES[scheme])(bucket, **made)
    except obstore.exceptions.BaseError as error:
        # Its text may quote a value. What obstore says of a key is the key alone.
        failed = type(error).__name__
    except (TypeError, ValueError) as error:
        failed = type(error).__name__
    names = ", ".join(sorted(map(str, options))) or "none"
    raise OptionError(
        f"storage_options for {scheme}:// are refused by obstore ({failed}); those given: {names}."
        f" Its documentation of {_STORES[scheme]} names what is allowed"
    )


class ObjectTransport:
    """One object in a store.

    Args:
        store: of obstore.
        key: of the object.
        place: for errors.
    """

    def __init__(self, store: Any, key: str, place: Place) -> None:
        loop.acquire()
        self._store: Any = store
        self._key = key
        self._place = place

    @property
    def place(self) -> Place:
        """Where the object is."""
        return self._place

    def get(
        self, span: tuple[int, int] | None, if_match: str | None, flight: Flight, limits: Limits
    ) -> ObjectBody:
        """Send one request: see `Transport`.

        obstore compares Content-Range with what was asked for, and refuses an answer of 200 to a
        request for a range.
        """
        import obstore

        options: Any = {}
        if span is not None:
            options["range"] = span
        if if_match is not None:
            options["if_match"] = if_match
        store = self._store
        if store is None:
            raise Failure("cancelled")

        async def ask() -> Any:
            return await obstore.get_async(store, self._key, options=options)

        try:
            result = asked(ask, flight, limits.stall, "no answer in time")
        except _RangeRefusedError:
            if if_match is not None:
                raise Failure(
                    "the whole file came, and a part of it was asked for", status=200, retry=True,
                    remedy="the server or a proxy before it serves ranges only sometimes",
                ) from None  # fmt: skip
            return self.get(None, None, flight, limits)
        return ObjectBody(result, span, flight, limits)

    def close(self) -> None:
        """Let go of obstore's store, with its connections, and of the thread."""
        if self._store is not None:
            self._store = None
            loop.release()


class _RangeRefusedError(Failure):
    """200 came for a range."""


class ObjectBody:
    """The body of an answer: see `Body`."""

    def __init__(
        self, result: Any, span: tuple[int, int] | None, flight: Flight, limits: Limits
    ) -> None:
        meta = result.meta
        encoding = str(result.attributes.get("Content-Encoding", "identity")).strip().lower()
        if encoding not in ("", "identity"):
            raise Failure(
                f"the object is stored compressed ({encoding[:20]}), so its bytes cannot be"
                " counted",
                remedy="store it without Content-Encoding",
            )
        modified: datetime | None = meta["last_modified"]
        stamp = modified.timestamp() if modified is not None else 0.0
        self._answer = Answer(
            meta["size"],
            span is None,
            meta["e_tag"],
            modified.isoformat() if modified is not None and stamp else None,
        )
        begin, stop = result.range
        self._left = stop - begin
        self._stream: Any = result.stream(min_chunk_size=_CHUNK)
        self._piece: Any = None  # what obstore has brought and nobody has taken yet
        self._taken = 0
        self._flight = flight
        self._limits = limits

    @property
    def answer(self) -> Answer:
        """What the server says of the object."""
        return self._answer

    def attach(self, flight: Flight) -> None:
        """Let another read go on with it."""
        self._flight = flight

    def readinto(self, view: memoryview) -> int:
        """Read at least one byte; 0 at the end."""
        if self._piece is None or self._taken == len(self._piece):
            self._piece, self._taken = self._next(), 0
            if self._piece is None:
                return 0
        count = min(len(view), len(self._piece) - self._taken)
        # NumPy copies without the GIL.
        piece = np.frombuffer(self._piece, np.uint8, count, self._taken)
        np.frombuffer(view, np.uint8, count)[:] = piece
        self._taken += count
        return count

    def _next(self) -> Any:
        """The next piece that is not empty; None at the end."""
        stream = self._stream
        if stream is None:
            return None

        async def step() -> Any:
            async for piece in stream:
                if len(piece):
                    return np.frombuffer(piece, np.uint8)
            return None

        piece = asked(step, self._flight, self._limits.stall, "the body stalled")
        if piece is None:
            self._stream = None
            if self._left:
                raise Failure(f"the body ended {self._left} bytes early", retry=True)
            return None
        self._left -= len(piece)
        if self._left < 0:
            raise Failure("the body is longer than it was to be", retry=True)
        return piece

    def finish(self) -> None:
        """Make sure that nothing follows."""
        if self._next() is not None:
            raise Failure("the body is longer than it was to be", retry=True)

    def close(self) -> None:
        """Drop obstore's stream, which ends the request where it is not over."""
        self._stream = self._piece = None


def list_objects(
    store: Any, prefix: str, url: Any, limits: Limits, flight: Flight
) -> Sequence[Entry]:
    """The objects below a prefix, sorted by name.

    Args:
        store: of obstore.
        prefix: ends with "/", or is empty.
        url: makes the URL of a key.
        limits: of the requests.
        flight: through which another thread ends them.

    Raises:
        Failure: the store refused.
    """
    import obstore

    async def ask() -> Any:
        return await obstore.list(store, prefix=prefix.rstrip("/") or None).collect_async()

    found = asked(ask, flight, limits.deadline, "no answer in time")
    entries = []
    for meta in found:
        name = meta["path"][len(prefix) :] if meta["path"].startswith(prefix) else ""
        if name and ".." not in name.split("/"):
            identity = ("etag", meta["e_tag"], meta["size"]) if meta["e_tag"] else None
            entries.append(Entry(name, meta["size"], url(meta["path"]), identity))
    return sorted(entries, key=lambda entry: entry.name)


def asked(work: Any, flight: Flight, seconds: float, late: str) -> Any:
    """What obstore answers.

    Args:
        work: makes the coroutine.
        flight: through which another thread ends it.
        seconds: after which it is cancelled.
        late: what the failure says then.

    Raises:
        Failure: it raised; of its exception, which may hold the whole URL, nothing is left.
    """
    import obstore.exceptions

    failure = None
    try:
        return loop.wait_for(work, flight, seconds, late)
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        failure = _explained(error)
    raise failure


_CHECK_NETWORK = "check the network"
_CHECK_ENDPOINT = "check the endpoint, the region and the network"
_RANGES = "the server or a proxy before it does not serve ranges rightly"
_NO_CREDENTIALS: dict[str, Any] = {
    "reason": "no credentials were found, and the cloud's metadata service does not answer",
    "remedy": "give credentials by obstore's variables of the environment or by storage_options,"
    " or skip_signature=True for a public bucket",
    "kind": RemotePermissionError,
}
_MARKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/latest/api/token", _NO_CREDENTIALS),
    ("/latest/meta-data", _NO_CREDENTIALS),
    ("computeMetadata", _NO_CREDENTIALS),
    ("metadata/identity", _NO_CREDENTIALS),
    ("UnexpectedRange", {"reason": "other bytes came than were asked for (Content-Range)",
                         "status": 206, "retry": True, "remedy": _RANGES}),
    ("ContentRange", {"reason": "the answer does not say which bytes it holds (Content-Range)",
                      "status": 206, "retry": True, "remedy": _RANGES}),
    ("MissingContentLength", {"reason": "the answer has no Content-Length", "retry": True}),
    ("InvalidCertificate", {"reason": "the server's certificate is not accepted", "remedy":
     "name the file of your authority in SSL_CERT_FILE, or pass root_certificate"}),
    ("BadScheme", {"reason": "the endpoint is http, which is not allowed",
                   "remedy": "pass allow_http=True for it"}),
    ("TooManyRedirects", {"reason": "redirected too often", "remedy": _CHECK_ENDPOINT}),
    ("BareRedirect", {"reason": "redirected to nowhere", "remedy": _CHECK_ENDPOINT}),
    ("ConnectionRefused", {"reason": "cannot connect: connection refused", "retry": True,
                           "remedy": "check that the server runs, and the endpoint"}),
    ("ConnectionReset", {"reason": "the connection was reset", "retry": True,
                         "remedy": _CHECK_NETWORK}),
    ("dns error", {"reason": "the host's name cannot be resolved", "retry": True,
                   "remedy": _CHECK_ENDPOINT}),
    ("kind: Timeout", {"reason": "no answer in time", "retry": True, "remedy": _CHECK_NETWORK}),
    ("kind: Connect", {"reason": "cannot connect", "retry": True, "remedy": _CHECK_NETWORK}),
    ("HttpError", {"reason": "the connection broke off", "retry": True,
                   "remedy": _CHECK_NETWORK}),
)  # fmt: skip
"""What obstore's debug text holds, and what it means; the first that is found counts."""

_CLASSES = {
    "FileNotFoundError": 404,
    "PermissionDeniedError": 403,
    "PreconditionError": 412,
    "UnauthenticatedError": 401,
}


def _explained(error: Exception) -> Failure:
    """What an exception of obstore's means; only its debug text has the status.

    That text escapes line ends of what the server sent, so a body cannot pretend to be a status.
    """
    text = str(error).rpartition("\n\nDebug source:\n")[2]
    found = _STATUS.search(text)
    status = int(found[1]) if found else _CLASSES.get(type(error).__name__)
    if status is not None:
        return of_status(status)
    if "RangeNotSupported" in text or "NotPartial" in text:
        return _RangeRefusedError("the server gives no ranges", status=200)
    for mark, meaning in _MARKS:
        if mark in text:
            return Failure(**meaning)
    return Failure(
        "the request cannot be made", remedy="check the credentials, the region and the endpoint"
    )
