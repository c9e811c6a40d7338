"""What a remote file is to the rest of the package, and how one is opened.

A `Source` has a size, an identity and ranges of bytes. Everything above speaks to this interface
only; which library moves the bytes is known in this package alone. Nothing here imports a library
before a URL is opened.
"""

from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import FaststError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "HEAD_BYTES",
    "Entry",
    "RemoteCancelledError",
    "RemoteChangedError",
    "RemoteError",
    "RemoteNotFoundError",
    "RemotePermissionError",
    "RemoteWarning",
    "Source",
    "SourceStats",
    "UnknownSchemeError",
    "list_files",
    "local_path",
    "looks_remote",
    "open_source",
    "scheme_of",
]

HEAD_BYTES = 1 << 20
"""Bytes of the first request: most headers are shorter, so one request opens a file."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


# ---- errors -------------------------------------------------------------


class RemoteError(FaststError, OSError):
    """A remote file could not be opened or read. No text or attribute holds a secret.

    Attributes:
        host: of the server, with its port where the URL has one; a bucket for object stores.
        path: of the file on that host, without the query of the URL.
        reason: what went wrong, in words.
        offset: first byte of the request that failed; None where it was not about bytes.
        status: of the server's answer; None where there was none, or none is known.
        tries: how many requests were made for these bytes; 0 where none could be.
        remedy: what to do about it; may be empty.
    """

    code = errno.EIO  # what `errno` says

    def __init__(
        self,
        host: str,
        path: str,
        reason: str,
        *,
        offset: int | None = None,
        status: int | None = None,
        tries: int = 1,
        remedy: str = "",
    ) -> None:
        super().__init__(reason)
        self.host = host
        self.path = path
        self.reason = reason
        self.offset = offset
        self.status = status
        self.tries = tries
        self.remedy = remedy
        self.errno = self.code

    def __str__(self) -> str:
        facts = [] if self.offset is None else [f"at byte {self.offset}"]
        if self.status is not None:
            facts.append(f"status {self.status}")
        if self.tries:
            facts.append("1 try" if self.tries == 1 else f"{self.tries} tries")
        text = f"{self.host}/{self.path.lstrip('/')}: {self.reason}"
        if facts:
            text += f" ({', '.join(facts)})"
        return f"{text}; {self.remedy}" if self.remedy else text

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: torch sends exceptions between processes."""
        return type(self), (self.host, self.path, self.reason), dict(vars(self))


class RemoteNotFoundError(RemoteError, FileNotFoundError):
    """There is no such file, bucket or repository (404)."""

    code = errno.ENOENT


class UnknownSchemeError(RemoteNotFoundError):
    """No source serves URLs of this scheme."""


class RemotePermissionError(RemoteError, PermissionError):
    """The server refused (401, 403): no credentials, wrong ones, or an expired signature."""

    code = errno.EACCES


class RemoteChangedError(RemoteError):
    """The file changed while it was read, so its bytes do not belong together."""


class RemoteCancelledError(RemoteError):
    """The read was cancelled by `Source.cancel` or `Source.close`."""

    code = errno.ECANCELED


class RemoteWarning(UserWarning):
    """Credentials go over an unprotected connection, or a server gives no ranges."""


# ---- a source -----------------------------------------------------------


@dataclasses.dataclass
class SourceStats:
    """What a source did so far. One thread writes, others may read at any time.

    Attributes:
        requests: that were sent, with repeated ones.
        retries: the repeated ones among them.
        waited: seconds spent between tries, summed over requests.
        bytes: of bodies that arrived, with those of failed requests.
    """

    requests: int = 0
    retries: int = 0
    waited: float = 0.0
    bytes: int = 0


class Source(Protocol):
    """A remote file, open for reading. Its methods may be called from any thread."""

    @property
    def scheme(self) -> str:
        """The path in reports: "http" (also for https), "s3", "gs", "az" or "hf"."""
        ...

    @property
    def name(self) -> str:
        """The URL without user info and query, for people and reports; holds no secret."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def identity(self) -> Hashable:
        """Equal identities of one URL mean equal bytes.

        An ETag, a generation or a version; else size and Last-Modified.
        """
        ...

    @property
    def sequential(self) -> bool:
        """The server gives no ranges. All reads share one stream of the whole file.

        It starts again for a read that goes back: ask in order, with few reads at a time.
        """
        ...

    @property
    def stats(self) -> SourceStats:
        """What it did so far: see `SourceStats`."""
        ...

    def read(self, offset: int, nbytes: int) -> Buffer:
        """Exactly these bytes, in memory of their own. Blocks.

        Args:
            offset: of the first byte in the file.
            nbytes: how many; all within the file.

        Raises:
            RemoteError: they did not arrive, or do not belong to the file that was opened.
            ValueError: the range is not within the file.
        """
        ...

    def read_into(self, offset: int, into: Buffer) -> None:
        """Fill ``into`` with the bytes from ``offset`` on. Blocks.

        This is what fills the engine's memory: pieces are copied as they arrive, without one
        buffer of the whole range in between. When it returns or raises, nothing writes to
        ``into`` any more; after an exception its content is undefined.

        Args:
            offset: of the first byte in the file.
            into: writable, contiguous memory of bytes, such as cffi's ``ffi.buffer``.

        Raises:
            RemoteError: they did not arrive, or do not belong to the file that was opened.
            ValueError: the range is not within the file.
        """
        ...

    def cancel(self) -> None:
        """End the reads in flight within a second, and all later ones: `RemoteCancelledError`."""
        ...

    def close(self) -> None:
        """Cancel, and let go of connections. The last source to be closed ends the thread."""
        ...


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file in a remote folder.

    Attributes:
        name: relative to the folder, with "/" between parts; never absolute, without "..".
        size: bytes.
        url: for `open_source`; may hold what the folder's URL held, so it is not for logs.
        identity: as the listing tells it; None where it does not.
    """

    name: str
    size: int
    url: str = dataclasses.field(repr=False)
    identity: Hashable | None = None


# ---- opening one --------------------------------------------------------


def scheme_of(path: object) -> str | None:
    """The scheme of a text of the form ``scheme://...``, in lower case; None for anything else."""
    found = _URL.match(path) if isinstance(path, str) else None
    return found[1].lower() if found else None


def looks_remote(path: object) -> bool:
    """Whether a path is a URL by its form alone, of whatever scheme.

    It imports nothing and asks nobody. A local file of that name goes first, as stock has it: the
    caller looks for one.
    """
    return scheme_of(path) is not None


def local_path(url: str, options: Mapping[str, object] | None = None) -> str | None:
    """The local file that a URL stands for; None where its bytes are elsewhere.

    A ``file://`` URL, and an ``hf://`` URL whose file is in huggingface_hub's cache. Callers ask
    this before `open_source`. It makes no request.

    Args:
        url: of any known scheme.
        options: as for `open_source`.

    Raises:
        UnknownSchemeError: no source serves this scheme.
        RemoteError: the URL has not the form that its scheme asks for.
    """
    from .opening import local_path

    return local_path(url, options)


def open_source(
    url: str, options: Mapping[str, object] | None = None, *, head_bytes: int = HEAD_BYTES
) -> Source:
    """Open a remote file with one request, which also reads its first bytes.

    Args:
        url: ``http://``, ``https://``, ``s3://bucket/key``, ``gs://``, ``az://container/key`` or
            ``hf://org/repo[@revision]/path``.
        options: of the transport (`storage_options`): obstore's keys of the store and of its
            client, and ours: ``max_tries``, and in seconds ``deadline``, ``stall``, ``backoff``.
        head_bytes: how many first bytes to keep; reads within them make no request.

    Returns:
        The source. The caller closes it.

    Raises:
        UnknownSchemeError: no source serves this scheme.
        RemoteNotFoundError: there is no such file.
        RemotePermissionError: the server refused.
        RemoteError: the file cannot be opened for any other reason.
        OptionError: an option has a bad name or value.
        ImportError: the library for this scheme is not installed; the message says which.
    """
    from .opening import open_source

    return open_source(url, options, head_bytes=head_bytes)


def list_files(url: str, options: Mapping[str, object] | None = None) -> Sequence[Entry]:
    """The files in a remote folder and in the folders below it, sorted by name.

    Args:
        url: of a folder, with or without a "/" at its end.
        options: as for `open_source`.

    Raises:
        RemoteError: there is no such folder, or ``http(s)://``, which has no listings.
        ImportError: the library for this scheme is not installed; the message says which.
    """
    from .opening import list_files

    return list_files(url, options)
