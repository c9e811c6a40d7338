"""URLs taken apart: what a server needs, and what people may see."""

from __future__ import annotations

import base64
import dataclasses
import re
import urllib.parse

from .base import RemoteError, RemoteNotFoundError
from .transport import Place

__all__ = ["HttpUrl", "bucket_place", "hidden", "parse_http"]

_PORTS = {"http": 80, "https": 443}
_SAFE = "/:@!$&'()*+,;=-._~%?[]"  # of path and query: what a server is to see as it stands
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f]")


@dataclasses.dataclass(frozen=True)
class HttpUrl:
    """An ``http`` or ``https`` URL.

    Attributes:
        scheme: "http" or "https".
        host: name or address, without brackets.
        port: given or the scheme's.
        path: percent-encoded; begins with "/".
        query: with its "?"; often a signature, so never shown.
        authorization: the header that the user info stands for, or None.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str = dataclasses.field(repr=False)
    authorization: str | None = dataclasses.field(default=None, repr=False)

    @property
    def origin(self) -> tuple[str, str, int]:
        """What credentials are for: they are sent to no other origin."""
        return self.scheme, self.host, self.port

    @property
    def target(self) -> str:
        """What a request names."""
        return self.path + self.query

    @property
    def netloc(self) -> str:
        """Host and, where it is not the scheme's, port, as a Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def name(self) -> str:
        """The URL for people: no user info, no query."""
        return f"{self.scheme}://{self.netloc}{self.path}"

    def place(self, scheme: str = "http") -> Place:
        """Where the file is, for reports and errors."""
        return Place(scheme, self.netloc, self.path, self.name)

    def joined(self, location: str) -> HttpUrl:
        """Where a redirect leads. User info in it is dropped.

        Raises:
            ValueError: to no ``http`` or ``https`` URL.
        """
        # Over the parts by hand: `urljoin` puts what it joins into the text of its errors.
        base = f"{self.scheme}://{self.netloc}{self.target}"
        found = _parsed(urllib.parse.urljoin(base, location.strip()))
        return dataclasses.replace(found, authorization=None)


def hidden(url: str) -> str:
    """Any URL without user info and query, for errors about those that cannot be parsed."""
    scheme, _, rest = url.partition("://")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    netloc, slash, path = rest.partition("/")
    return f"{scheme}://{netloc.rpartition('@')[2]}{slash}{path}"


def parse_http(url: str) -> HttpUrl:
    """Take an ``http(s)://`` URL apart.

    Raises:
        RemoteError: it is none, or names no host.
    """
    try:
        return _parsed(url)
    except ValueError:
        pass  # its text may hold what is secret
    place = hidden(url).partition("://")[2]
    host, _, path = place.partition("/")
    raise RemoteError(
        host, path, "this is no valid http(s) URL", tries=0,
        remedy="write it as https://host/path",
    )  # fmt: skip


def _parsed(url: str) -> HttpUrl:
    parts = urllib.parse.urlsplit(url)
    scheme = parts.scheme.lower()
    host = parts.hostname
    if scheme not in _PORTS or not host or _FORBIDDEN.search(host):
        raise ValueError("no http URL with a host")
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    authorization = None
    if parts.username is not None:
        user, password = (
            urllib.parse.unquote(one or "") for one in (parts.username, parts.password)
        )
        token = base64.b64encode(f"{user}:{password}".encode()).decode("ascii")
        authorization = f"Basic {token}"
    # Spaces and letters beyond ASCII are encoded; what is encoded already stays.
    path = urllib.parse.quote(parts.path or "/", safe=_SAFE.replace("?", ""))
    query = urllib.parse.quote(parts.query, safe=_SAFE)
    return HttpUrl(
        scheme, host, parts.port or _PORTS[scheme], path, f"?{query}" if query else "",
        authorization,
    )  # fmt: skip


def bucket_place(scheme: str, url: str, what: str) -> tuple[Place, str, str]:
    """Take ``scheme://bucket/key`` apart. The key is taken as it stands.

    Args:
        scheme: as the report names the path.
        url: the URL.
        what: what the first part is called: "bucket", "container".

    Returns:
        The place, the bucket, and the key.

    Raises:
        RemoteNotFoundError: the bucket or the key is missing.
        RemoteError: obstore takes no such key.
    """
    bucket, _, key = url.partition("://")[2].partition("/")
    key = key.lstrip("/")
    if not bucket or not key.rstrip("/"):
        missing = what if not bucket else "file"
        raise RemoteNotFoundError(
            bucket, key, f"the URL names no {missing}", tries=0,
            remedy=f"write it as {scheme}://{what}/path/of/the/file",
        )  # fmt: skip
    if {"", ".", ".."} & set(key.rstrip("/").split("/")):
        raise RemoteError(
            bucket, key, "a key with an empty part, '.' or '..' cannot be read", tries=0,
            remedy="store the file under another key",
        )  # fmt: skip
    return Place(scheme, bucket, "/" + key, f"{scheme}://{bucket}/{key}"), bucket, key
