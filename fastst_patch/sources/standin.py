"""Stand-ins: local files in the place of remote weights, so that a local folder can be a model.

::

    8 bytes    length of the header, as in every safetensors file
    header     {"fastst_patch stand-in: <what to do>": <offsets that no file can have>,
                "__metadata__": {"fastst_patch": <URL, size, identity, seal>, <the real metadata>},
                <the real names, dtypes and shapes, with offsets behind the end of the file>}
    a hole     up to the size of the real file, where the file system has holes

Whoever reads it without us fails, and cannot get wrong bytes:

- stock safetensors, in every language, checks the offsets in their order. Ours come first, and its
  error names the tensor: that name is our text.
- programs that read headers by themselves find the real names, dtypes and shapes. Where they read
  tensors by themselves, too, they find no byte at these offsets.

Only those that this user made are followed, which the seal shows: a model of somebody else must not
have requests sent. The others are invalid files, for us as for stock.

A stand-in holds no secret. What opens the real file comes from the environment and the options of
the process that does; in the process that made it, also from the URL that it was made with.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from ..stock import SafetensorError
from .base import RemoteChangedError, RemoteError, Source
from .names import identity_text
from .seal import is_sealed, key_path, sealed

__all__ = [
    "StandIn",
    "find",
    "header_of",
    "is_one",
    "path_of",
    "refused",
    "remember",
    "resolved",
    "url_of",
    "write",
]

_TEXT = (
    "fastst_patch stand-in: this file holds no weights. They are at {url} and are streamed from"
    " there where safetensors is patched: call fastst_patch.patch() before they are loaded or"
    " start the program by fastst-patch run"
)
_BEGIN = b'{"fastst_patch stand-in: '
_RECORD = re.compile(
    rb'"[^"\\]*":\{[^{}]*\},"__metadata__":\{"fastst_patch":("(?:[^"\\]|\\.)*")', re.DOTALL
)
_LOOK = 64 << 10
"""Bytes at the beginning of a header in which our record ends: it holds little beside the URL."""

_SCHEME = "fastst-stand-in://"
_AGAIN = "make the folder again: fastst_patch.remote(url)"
_KEY = "fastst_patch"  # of our record, first in the metadata
_VERSION = 1
_MOST_HEADER = 100_000_000  # as in safetensors itself
_BLOCK = 512  # of st_blocks

_log = logging.getLogger("fastst_patch")


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What a stand-in says of the remote file.

    Attributes:
        url: without user info and query.
        size: bytes.
        identity: as text: see `identity_text`.
        cache: folder for its bytes; None: the option ``remote_cache`` alone counts.
    """

    url: str
    size: int
    identity: str
    cache: str | None = None

    @property
    def full_url(self) -> str:
        """The URL with what it was made with in this process, such as a signature."""
        return _full.get(self.url, self.url)

    def check(self, source: Source) -> None:
        """Raise RemoteChangedError unless a source is what this file stands for."""
        if source.size != self.size or identity_text(source.identity) != self.identity:
            raise RemoteChangedError(
                *_place(source.name), "the file has changed since its stand-in was made",
                remedy=_AGAIN,
            )  # fmt: skip


def _place(name: str) -> tuple[str, str]:
    host, _, path = name.partition("://")[2].partition("/")
    return host, path


_full: dict[str, str] = {}


def remember(name: str, url: str) -> None:
    """Keep a URL with all it holds, by the name that a stand-in has, for this process."""
    if url != name:
        _full[name] = url


# ---- reading ------------------------------------------------------------


def url_of(path: str) -> str:
    """The URL by which the file that a stand-in stands for is opened, with all that it records."""
    return _SCHEME + os.path.abspath(path)


def path_of(url: str) -> str | None:
    """The path of the stand-in, of such a URL; None of any other."""
    return url.removeprefix(_SCHEME) if url.startswith(_SCHEME) else None


def resolved(url: str) -> tuple[str, StandIn | None]:
    """The URL of the remote file, and the stand-in that led to it.

    Args:
        url: of a stand-in, see `url_of`, or any other.

    Raises:
        RemoteError: the stand-in is not there any more, or is none.
    """
    path = path_of(url)
    if path is None:
        return url, None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = find(fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        found = None
    if found is None:
        raise RemoteError("", path, "this is no stand-in any more", tries=0, remedy=_AGAIN)
    return found.full_url, found


def find(fd: int) -> StandIn | None:
    """What a file stands for; None where it is no stand-in. Asked when its header is invalid.

    Args:
        fd: of the file, open for reading; its position is not used.

    Raises:
        RemoteError: a newer version of this package has written it.
        OSError: it cannot be read.
    """
    if os.pread(fd, len(_BEGIN), 8) != _BEGIN:
        return None
    found = _RECORD.match(os.pread(fd, _LOOK, 9))
    record = None if found is None else _record(found[1])
    if record is None:
        return None
    if record["version"] > _VERSION:
        raise RemoteError(
            *_place(record["url"]),
            f"its stand-in is of version {record['version']}, and this package knows {_VERSION}",
            remedy=f"update fastst-patch, or {_AGAIN}",
        )
    return StandIn(record["url"], record["size"], record["identity"], record["cache"])


def is_one(path: str) -> bool:
    """Whether the file at a path is a stand-in, of a newer version of this package too."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # it may be a pipe
        try:
            return find(fd) is not None
        finally:
            os.close(fd)
    except RemoteError:
        return True
    except OSError:
        return False


def _record(text: bytes) -> dict[str, Any] | None:
    """Our record; None unless it has our seal."""
    try:
        record: dict[str, Any] = json.loads(json.loads(text))
        seal = record.pop("seal")
        if is_sealed(_told(record), seal):
            return record
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        pass  # whoever made the file may have made it to do harm
    _warn_of_others(key_path())
    return None


def _told(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


@functools.cache
def _warn_of_others(key: str) -> None:
    """Say once what a user would ask whose own stand-ins are refused."""
    _log.warning(
        "a file begins as a stand-in, and was not made with the key %s: it is left to stock, which"
        " refuses it; make stand-ins of your own by fastst-patch remote URL",
        key,
    )


# ---- writing ------------------------------------------------------------


def header_of(source: Source) -> dict[str, Any]:
    """The header of a remote safetensors file.

    Raises:
        SafetensorError: it is no safetensors file. The message says what it may be.
        RemoteError: it could not be read.
    """
    begin = bytes(source.read(0, min(source.size, 16)))
    nbytes = int.from_bytes(begin[:8], "little")
    header: Any = None
    if len(begin) > 8 and begin[8:9] == b"{" and nbytes <= min(_MOST_HEADER, source.size - 8):
        try:
            header = json.loads(bytes(source.read(8, nbytes)))
        except ValueError:
            header = None
    if not isinstance(header, dict) or not all(map(_plausible, header.items())):
        raise _refused(source.name, f"is not a safetensors file{_looks_like(begin)}")
    if _KEY in header.get("__metadata__", ()):
        raise refused(source.name)
    return header


def _plausible(item: tuple[str, Any]) -> bool:
    name, value = item
    if name == "__metadata__":
        return isinstance(value, dict)
    return (
        isinstance(value, dict)
        and {"dtype", "shape"} <= set(value)
        and isinstance(value.get("data_offsets"), list)
        and len(value["data_offsets"]) == 2
        and all(type(offset) is int for offset in value["data_offsets"])
    )


def _looks_like(begin: bytes) -> str:
    if begin.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return ", it is a pickle: convert the model, for example by save_pretrained()"
    if begin.lstrip()[:1] == b"<":
        return ", it is a web page: is the URL right, and does it need a login?"
    if begin.startswith(b"version https://"):
        return ", it is a pointer of Git LFS: upload the file itself"
    return ""


def refused(name: str) -> Exception:
    """The error for a stand-in in the place of a remote file."""
    return _refused(name, "is itself a stand-in, which was uploaded without its weights")


def _refused(name: str, why: str) -> Exception:
    return SafetensorError(f"Error while deserializing header: {name} {why}")


def write(path: str, source: Source, header: Mapping[str, Any], cache: str | None = None) -> None:
    """Write a stand-in for a remote file.

    Args:
        path: a new file.
        source: the remote file, open.
        header: its header.
        cache: folder for its bytes, absolute; None: none of its own.

    Raises:
        FileExistsError: there is such a file already.
        OSError: it, or the key for its seal, cannot be written.
    """
    text = _packed(source, header, cache)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        if source.size > 8 + len(text):
            _extend(file.fileno(), source.size, 8 + len(text))
        os.fsync(file.fileno())


def _packed(source: Source, header: Mapping[str, Any], cache: str | None) -> bytes:
    record: dict[str, Any] = {
        "version": _VERSION,
        "url": source.name,
        "size": source.size,
        "identity": identity_text(source.identity),
        "cache": cache,
    }
    record["seal"] = sealed(_told(record))
    tensors = {name: info for name, info in header.items() if name != "__metadata__"}
    dtype = next((info["dtype"] for info in tensors.values()), "U8")  # of programs that count them
    shown = re.sub(r"[^!#-&(-\[\]-_a-~]", _escaped, source.name)
    # No byte of the file lies at these offsets, whatever its size is.
    first = source.size + 8 + 2 * len(json.dumps(header)) + _LOOK
    content: dict[str, Any] = {
        _TEXT.format(url=shown): {"dtype": dtype, "shape": [0], "data_offsets": [1, 0]},
        "__metadata__": {
            _KEY: json.dumps(record),
            **header.get("__metadata__", {}),
        },
    }
    for name, info in tensors.items():
        begin, end = info["data_offsets"]
        content[name] = {**info, "data_offsets": [first + begin, first + end]}
    return json.dumps(content, separators=(",", ":")).encode()


def _escaped(character: re.Match[str]) -> str:
    """As in a URL: safetensors before 0.6 shows a name with Rust's escapes."""
    return "".join(f"%{byte:02X}" for byte in character[0].encode())


def _extend(fd: int, size: int, written: int) -> None:
    """Give a file its real size by a hole; where there are none, leave it as it is."""
    os.truncate(fd, size)
    if os.fstat(fd).st_blocks * _BLOCK > written + (1 << 20):
        os.truncate(fd, written)
