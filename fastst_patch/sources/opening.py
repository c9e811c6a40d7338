"""Which module serves which scheme. Another source is a module and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from .base import Entry, Source, UnknownSchemeError, scheme_of
from .urls import hidden

__all__ = ["list_files", "local_path", "open_source"]

_MODULES = {
    "az": "buckets",
    "file": "local",
    "gs": "buckets",
    "hf": "hub",
    "http": "web",
    "https": "web",
    "s3": "buckets",
}


def _module(url: str) -> Any:
    """The module for a URL; its library is imported when the URL is opened."""
    scheme = scheme_of(url)
    if scheme not in _MODULES:
        host, _, path = hidden(url).partition("://")[2].partition("/")
        raise UnknownSchemeError(
            host, path, f"no such file, and no source for {scheme}://", tries=0,
            remedy=f"URLs begin with one of {', '.join(f'{one}://' for one in _MODULES)}",
        )  # fmt: skip
    return importlib.import_module(f"{__package__}.{_MODULES[scheme]}")


def local_path(url: str, options: Mapping[str, object] | None) -> str | None:
    """See `base.local_path`."""
    found: str | None = _module(url).local_path(url, dict(options or {}))
    return found


def open_source(url: str, options: Mapping[str, object] | None, *, head_bytes: int) -> Source:
    """See `base.open_source`."""
    source: Source = _module(url).open_source(url, dict(options or {}), head_bytes)
    return source


def list_files(url: str, options: Mapping[str, object] | None) -> Sequence[Entry]:
    """See `base.list_files`."""
    entries: Sequence[Entry] = _module(url).list_files(url, dict(options or {}))
    return entries
