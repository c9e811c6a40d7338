"""``http://`` and ``https://`` URLs."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import OptionError, warn_caller
from .attempts import Attempts, Progress
from .base import RemoteError, RemoteWarning, Source
from .dial import Dialer, tls_context
from .http import HttpTransport
from .ranged import RangedSource
from .retry import LIMITS, Flight, Limits, limits_of
from .transport import Place
from .urls import HttpUrl, parse_http

__all__ = ["list_files", "local_path", "open_http", "open_source", "read_page", "warn_unprotected"]

_NAMES = (
    "allow_http",
    "allow_invalid_certificates",
    "default_headers",
    "proxy_excludes",
    "proxy_url",
    "root_certificate",
    "user_agent",
)
"""Options, named as obstore's for its HTTP client."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OURS = ("Accept-Encoding", "Host", "If-Match", "Range")
_SIGNED = re.compile(r"sig|token|key|credential|auth|secret|passw", re.IGNORECASE)
"""What a query that works like a password holds."""

_warned: dict[str, object] = {}  # `setdefault` tells one thread alone that it is the first


def local_path(url: str, options: dict[str, object]) -> None:
    """Nothing: what a server has is not here."""


def open_source(url: str, options: dict[str, object], head_bytes: int) -> Source:
    """Open an ``http(s)://`` URL; see `base.open_source`."""
    return open_http(parse_http(url), options, head_bytes)


def list_files(url: str, options: dict[str, object]) -> NoReturn:
    """Refuse: HTTP has no listings.

    Raises:
        RemoteError: always.
    """
    place = parse_http(url).place()
    raise RemoteError(
        place.host, place.path, "web servers do not list their files", tries=0,
        remedy="name the files, or the model.safetensors.index.json that names them",
    )  # fmt: skip


def open_http(
    url: HttpUrl,
    options: dict[str, object],
    head_bytes: int,
    headers: Mapping[str, str] | None = None,
    place: Place | None = None,
) -> Source:
    """Open a URL.

    Args:
        url: of the file.
        options: of the user.
        head_bytes: see `base.open_source`.
        headers: for the URL's own host, beside those of the options.
        place: the file's place, where it is not the URL's.
    """
    transport, limits = _transport(url, options, headers, place)
    return RangedSource.open(transport, limits, head_bytes)


def read_page(url: str, options: Mapping[str, object], most: int) -> bytes:
    """A page that may be written for this request: its size need not be known before.

    Args:
        url: of the page.
        options: of the user.
        most: bytes after which it is cut.

    Raises:
        RemoteError: it cannot be read, or not before the deadline.
    """
    transport, limits = _transport(parse_http(url), options, None, None)

    def ask(flight: Flight, progress: Progress) -> bytes:
        progress.done = 0
        body = transport.get(None, None, flight, progress.limits)
        page, into = bytearray(), bytearray(1 << 16)
        try:
            while len(page) < most and (count := body.readinto(memoryview(into))):
                page += into[:count]
                progress.add(count)
        finally:
            body.close()
        return bytes(page[:most])

    try:
        return Attempts(transport.place, limits).run(0, ask)
    finally:
        transport.close()


def _transport(
    url: HttpUrl,
    options: Mapping[str, object],
    headers: Mapping[str, str] | None,
    place: Place | None,
) -> tuple[HttpTransport, Limits]:
    """What sends requests for a URL; see `open_http`."""
    options = dict(options)
    limits = limits_of(options)
    client = options.pop("client_options", None) or {}
    if not isinstance(client, Mapping):
        raise OptionError("option client_options of storage_options: allowed is a mapping")
    options.update(client)
    unknown = sorted(set(options) - set(_NAMES))
    if unknown:
        raise OptionError(
            f"unknown option {unknown[0]!r} of storage_options: allowed for http(s):// are"
            f" {', '.join((*LIMITS, *_NAMES))}"
        )
    sent = {**(headers or {}), **_headers(options.get("default_headers"))}
    if url.scheme == "http":
        if not _flag(options, "allow_http", True):
            raise OptionError("option allow_http=False of storage_options forbids this http:// URL")
        if sent or url.authorization is not None or _SIGNED.search(url.query):
            warn_unprotected(url.netloc)
    transport = HttpTransport(
        url, sent, _agent(options), _dialer(options), place or url.place()
    )  # fmt: skip
    return transport, limits


def warn_unprotected(host: str) -> None:
    """Warn, once for a host, that credentials are sent without TLS."""
    mine = object()
    if _warned.setdefault(host, mine) is mine:
        warn_caller(
            f"{host}: credentials are sent over http, where others on the network can read them;"
            " use https",
            RemoteWarning,
        )


# ---- options ------------------------------------------------------------


def _dialer(options: Mapping[str, object]) -> Dialer:
    certificate = options.get("root_certificate")
    if isinstance(certificate, bytes):
        certificate = certificate.decode("ascii", "replace")
    verify = not _flag(options, "allow_invalid_certificates", False)
    proxy, excludes = _text(options, "proxy_url"), _text(options, "proxy_excludes")
    if certificate is not None:
        legible = isinstance(certificate, str)
        try:
            tls_context(certificate, verify)
        except (ssl.SSLError, TypeError, ValueError):
            legible = False
        if not legible:
            raise OptionError(
                "option root_certificate of storage_options: allowed are certificates in PEM"
            )
    return Dialer(_text({"it": certificate}, "it"), verify, proxy, excludes)


def _agent(options: Mapping[str, object]) -> str:
    agent = _text(options, "user_agent") or "fastst-patch"
    if not agent.isprintable() or not agent.isascii():
        raise OptionError("option user_agent of storage_options: allowed is printable ASCII")
    return agent


def _headers(value: object) -> dict[str, str]:
    if value is None:
        return {}
    allowed = "option default_headers of storage_options: allowed is a mapping of names to texts"
    if not isinstance(value, Mapping):
        raise OptionError(allowed)
    found = {}
    for name, content in value.items():
        text = content.decode("latin-1") if isinstance(content, bytes) else content
        # The value is often a secret, so it is not quoted.
        if not isinstance(name, str) or not _TOKEN.fullmatch(name) or not isinstance(text, str):
            raise OptionError(allowed)
        if any(ord(sign) < 32 or not ord(sign) < 256 for sign in text):
            raise OptionError(f"{allowed}; that of {name} holds other signs")
        if name.title() in _OURS:
            raise OptionError(f"{allowed}; {name} is set for each request")
        found[name.title()] = text
    return found


def _flag(options: Mapping[str, Any], name: str, default: bool) -> bool:
    value = options.get(name, default)
    words = {"true": True, "1": True, "false": False, "0": False}
    found = words.get(str(value).strip().lower())
    if found is None:
        raise OptionError(f"option {name}={value!r} of storage_options: allowed are True and False")
    return found


def _text(options: Mapping[str, object], name: str) -> str | None:
    value = options.get(name)
    if value is not None and not isinstance(value, str):
        raise OptionError(f"option {name} of storage_options: allowed is a text")
    return value
