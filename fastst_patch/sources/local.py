"""``file://`` URLs: local files by another name."""

from __future__ import annotations

import os
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import NoReturn

from .base import Entry, RemoteError

__all__ = ["list_files", "local_path", "open_source"]


def local_path(url: str, options: dict[str, object]) -> str:
    """The path that a ``file://`` URL names.

    Raises:
        RemoteError: it names a file of another machine.
    """
    host, _, path = url.partition("://")[2].partition("/")
    if host not in ("", "localhost"):
        raise RemoteError(
            host, path, "a file:// URL names a file of this machine", tries=0,
            remedy="write it as file:///path, with three slashes",
        )  # fmt: skip
    return urllib.parse.unquote(f"/{path}")


def open_source(url: str, options: dict[str, object], head_bytes: int) -> NoReturn:
    """Refuse: local files have a faster way.

    Raises:
        RemoteError: always.
    """
    path = local_path(url, options)
    raise RemoteError("", path, "this is a local file", tries=0, remedy="open it by its path")


def list_files(url: str, options: dict[str, object]) -> Sequence[Entry]:
    """The files in a local folder and in those below it.

    Raises:
        OSError: it cannot be listed.
    """
    top = local_path(url, options).rstrip("/") or "/"
    found = []
    for entry in os.scandir(top):
        inner = urllib.request.pathname2url(entry.path)
        if entry.is_dir():
            below = list_files(f"file://{inner}", options)
            found += [Entry(f"{entry.name}/{one.name}", one.size, one.url) for one in below]
        else:
            found.append(Entry(entry.name, entry.stat().st_size, f"file://{inner}"))
    return sorted(found, key=lambda one: one.name)
