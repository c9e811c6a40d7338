"""Open files, their headers, and how much of them is in the page cache."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from ..errors import Fallback
from ..layout import FileLayout, LayoutCache
from ._lib import ffi, lib, place_for, raise_
from .feeds import Feed

if TYPE_CHECKING:
    from ..sources.base import Source

_PROBES = ("none", "cachestat", "mincore")


class File:
    """An open regular file, its header and its size.

    Attributes:
        path: as given to `open_file`.
        size: bytes.
        fd: descriptor, valid as long as this object.
        fs_magic: the file system's type as in statfs(2).
        feed: what gives the bytes of a file that is not local; None for local files.
    """

    __slots__ = ("_at", "fd", "fs_magic", "handle", "key", "path", "size")

    feed: Feed | None = None

    def __init__(self, path: str, at: Any, info: Any) -> None:
        self.path = path
        self._at = at
        self.handle = at[0]
        self.size: int = info.size
        self.fd: int = info.fd
        self.fs_magic: int = info.fs_magic
        self.key: tuple[Hashable, ...] = (info.dev, info.ino, info.size)

    def residency(self, offset: int, nbytes: int) -> tuple[int, str]:
        """Bytes of an extent in the page cache, and the probe that found out (or ``"none"``).

        For local files only.
        """
        resident, probe = ffi.new("uint64_t *"), ffi.new("int *")
        lib.fst_file_residency(self.handle, offset, nbytes, resident, probe)
        return resident[0], _PROBES[probe[0]]

    def read_exactly(self) -> None:
        """Keep jobs that read through the page cache from reading the bytes behind extents."""
        lib.fst_file_read_exactly(self.handle)


def open_files() -> int:
    """Descriptors held now by handles, slices and running jobs."""
    return int(lib.fst_open_files())


def path_bytes(path: str) -> int:
    """Size of the regular file at a path, in a third of the time of ``os.stat``.

    Returns:
        -1 for anything else, and for a path that the engine does not take.
    """
    try:
        return int(lib.fst_path_bytes(path.encode()))
    except UnicodeEncodeError:
        return -1


def open_file(path: str) -> File:
    """Open a regular file for reading.

    Raises:
        Fallback: it is not a regular file, or its path is not UTF-8.
        OSError: it cannot be opened.
    """
    out, info, err = place_for("file"), ffi.new("fst_file_info *"), ffi.new("fst_error *")
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        raise Fallback("the path is not UTF-8") from None
    if b"\0" in encoded:
        raise Fallback("the path holds a NUL")
    if lib.fst_file_open(encoded, out, info, err):
        raise_(err, path)
    return File(path, out, info)


class FedFile(File):
    """A file whose bytes a source gives. It can be read, and has no descriptor and no map.

    Dropping it cancels what is in flight.
    """

    __slots__ = ("feed",)

    def __init__(self, feed: Feed, at: Any, info: Any) -> None:
        super().__init__(feed.name, at, info)
        self.feed = feed
        self.key = (feed.name, feed.identity, feed.size)

    def __del__(self, _at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        # When Python exits, all feeds are closed already. An interrupted __init__ leaves no feed.
        feed: Feed | None = None if _at_exit() else getattr(self, "feed", None)
        if feed is not None:
            feed.close()


def feed_file(open_source: Callable[[], Source], most: int) -> FedFile:
    """Open a file that is not local.

    Args:
        open_source: opens its source; called again after an interrupt, and in a forked child.
        most: most requests at a time.

    Raises:
        Exception: what ``open_source`` raises.
        MemoryError: no memory for it.
    """
    feed = Feed(open_source)
    try:
        out, info, err = place_for("file"), ffi.new("fst_file_info *"), ffi.new("fst_error *")
        name = feed.name.encode("utf-8", "replace").replace(b"\0", b"?")
        most = 1 if feed.sequential else most
        context = ffi.cast("void *", feed.number)
        if lib.fst_file_feed(
            name, feed.size, most, lib.fst_feed_by_python, context, out, info, err
        ):
            raise_(err)
        return FedFile(feed, out, info)
    except BaseException:
        feed.close()
        raise


_layouts = LayoutCache()


def read_layout(file: File) -> FileLayout:
    """Read, parse and validate a file's header.

    Raises:
        Fallback: stock may judge the header differently; ask stock.
        OSError, MemoryError: reading it failed.
    """
    if file.feed is not None:
        file.feed.ready()
    cached = _layouts.get(file.key)
    known: Any = cached.owner[0] if cached is not None else ffi.NULL
    out, view, err = place_for("layout"), ffi.new("fst_layout_view *"), ffi.new("fst_error *")
    code = lib.fst_layout_read(file.handle, known, out, view, err)
    if code == lib.FST_PENDING and cached is not None:
        return cached
    if code != lib.FST_OK:
        raise_(err, file.path)
    layout = _file_layout(out, view, file.size)
    _layouts.put(file.key, layout)
    return layout


def _file_layout(owner: Any, view: Any, file_bytes: int) -> FileLayout:
    count = view.count
    names: tuple[str, ...] = ()
    records, dims = memoryview(b"").cast("Q"), memoryview(b"").cast("q")
    if count:
        text = bytes(ffi.buffer(view.names, view.names_bytes)).decode("utf-8")
        names = tuple(text.split("\0")[:count])
        record_bytes = ffi.sizeof("fst_tensor") * count
        records = memoryview(ffi.buffer(view.tensors, record_bytes)).cast("Q")
        if view.dims_count:
            dims = memoryview(ffi.buffer(view.dims, 8 * view.dims_count)).cast("q")
    index = dict(zip(names, range(count), strict=True))
    if len(index) != count:
        raise Fallback("a tensor name occurs twice in the header")
    find_metadata = None
    if view.metadata != ffi.NULL:
        find_metadata = functools.partial(_decoded, owner, view.metadata, view.metadata_bytes)
    return FileLayout(
        names=names,
        index=index,
        data_begin=view.data_begin,
        data_bytes=file_bytes - view.data_begin,
        find_metadata=find_metadata,
        dtypes=view.dtypes,
        odd_f4=bool(view.odd_f4),
        owner=owner,
        _records=records,
        _dims=dims,
        view=view,
    )


def header_of(layout: FileLayout) -> bytes:
    """The header, without its length, that a layout was parsed from."""
    return bytes(ffi.buffer(layout.view.header, layout.view.header_bytes))


def _decoded(owner: Any, text: Any, nbytes: int) -> dict[str, str]:
    """The metadata. The header's parser made sure that it is an object of strings to strings.

    The parser accepts no escape, character or surrogate that stock refuses, so this cannot fail.

    Args:
        owner: keeps the text.
        text: its address.
        nbytes: its length.
    """
    found: dict[str, str] = json.loads(bytes(ffi.buffer(text, nbytes)))
    return found


def parse_header(header: bytes, file_bytes: int) -> FileLayout:
    """Parse a header that is already in memory, without its length (probes and tests).

    Raises:
        Fallback: stock may judge it differently.
    """
    out, view, err = place_for("layout"), ffi.new("fst_layout_view *"), ffi.new("fst_error *")
    if lib.fst_layout_parse(header, len(header), file_bytes, out, view, err):
        raise_(err)
    return _file_layout(out, view, file_bytes)


@dataclasses.dataclass(frozen=True)
class Residency:
    """How much of a file is in the page cache.

    Attributes:
        resident_bytes: cached.
        total_bytes: the file's size.
        probe: ``cachestat``, ``mincore``, or ``none``: no probe worked.
    """

    resident_bytes: int
    total_bytes: int
    probe: str


def residency(path: str) -> Residency:
    """Look how much of a file is in the page cache, without reading it.

    Raises:
        OSError: the file cannot be opened.
        Fallback: it is not a regular file.
    """
    file = open_file(os.fspath(path))
    resident, probe = file.residency(0, file.size)
    return Residency(resident, file.size, probe)
