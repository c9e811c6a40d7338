"""Names that hold no secret: of URLs, of identities, and of files in a folder that we write."""

from __future__ import annotations

import json
from collections.abc import Hashable

from .base import RemoteError, scheme_of
from .urls import hidden, parse_http

__all__ = ["identity_text", "is_inside", "is_weak", "public_url"]


def public_url(url: str) -> str:
    """A URL as the name of its source: without user info and query, which may hold secrets.

    Keys of object stores are taken as they stand, whatever characters are in them.
    """
    if scheme_of(url) not in ("http", "https"):
        return url
    try:
        return parse_http(url).name
    except RemoteError:  # no server is asked for it
        return hidden(url)


def identity_text(identity: Hashable) -> str:
    """The identity of a source as text that is the same in every process."""
    return identity if isinstance(identity, str) else json.dumps(identity, default=repr)


def is_weak(identity: Hashable) -> bool:
    """Whether an identity tells nothing but the size: the server gave no ETag and no date."""
    return isinstance(identity, tuple) and None in identity


def is_inside(name: str) -> bool:
    """Whether a relative name leads to a place inside the folder that it is relative to."""
    return not (
        "\0" in name
        or "\\" in name  # separates folders for some programs
        or any(part in ("", ".", "..") for part in name.split("/"))
    )
