"""The only importer of the native extension: files, arenas, jobs, and what errors become.

Objects here own native handles and give them back when collected. Error map:

=====================  =====================================================================
native code            Python
=====================  =====================================================================
FST_DOUBT              `Doubt`: the caller asks stock
FST_E_SYS              OSError with errno, file and offset (a cancelled load: see `Job.wait`)
FST_E_NOMEM            MemoryError
FST_E_TRUNCATED        safetensors.SafetensorError
FST_E_INVALID, other   FaststError (a bug of ours)
=====================  =====================================================================
"""

from __future__ import annotations

import dataclasses
import json
import os
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from .errors import Doubt, FaststError
from .layout import FileLayout, LayoutCache

try:
    from ._native import ffi as _ffi
    from ._native import lib as _lib

    _native_error: str | None = None
except ImportError as error:  # no compiler at install time, or another platform
    _ffi = _lib = None
    _native_error = f"the native extension cannot be loaded: {error}"

_WAIT_MS = 100
"""A wait returns to Python this often, so that Ctrl-C is seen."""

_PROBES = ("none", "cachestat", "preadv2", "mincore")


def native_error() -> str | None:
    """Why the native engine cannot be used here; None when it can."""
    return _native_error


def native_file() -> str | None:
    """Path of the loaded extension."""
    if _native_error is not None:
        return None
    from . import _native

    return str(_native.__file__)


def _raise(err: Any, filename: str | None = None) -> None:
    code, message = err.code, _ffi.string(err.message).decode("utf-8", "replace")
    if code == _lib.FST_DOUBT:
        raise Doubt(message)
    if code == _lib.FST_E_SYS:
        raise OSError(err.sys_errno, message, filename)
    if code == _lib.FST_E_NOMEM:
        raise MemoryError(message)
    if code == _lib.FST_E_TRUNCATED:
        from safetensors import SafetensorError

        raise SafetensorError(message)
    raise FaststError(message)


# ---- files and layouts ----


class File:
    """An open regular file, its header and its size.

    Attributes:
        path: as given to `open_file`.
        size: bytes.
        fd: descriptor, valid as long as this object.
        fs_magic: the file system's type as in statfs(2).
    """

    __slots__ = ("fd", "fs_magic", "handle", "key", "path", "size")

    def __init__(self, path: str, handle: Any, info: Any) -> None:
        self.path = path
        self.handle = handle
        self.size: int = info.size
        self.fd: int = info.fd
        self.fs_magic: int = info.fs_magic
        self.key = (info.dev, info.ino, info.size)

    def residency(self, offset: int, nbytes: int) -> tuple[int, str]:
        """Bytes of an extent in the page cache, and the probe that told (or ``"none"``)."""
        resident, probe = _ffi.new("uint64_t *"), _ffi.new("int *")
        _lib.fst_file_residency(self.handle, offset, nbytes, resident, probe)
        return resident[0], _PROBES[probe[0]]


def open_files() -> int:
    """Descriptors held now by handles, slices and running jobs."""
    return int(_lib.fst_open_files())


def open_file(path: str) -> File:
    """Open a regular file for reading.

    Raises:
        Doubt: it is not a regular file, or its path is not UTF-8.
        OSError: it cannot be opened.
    """
    out, info, err = _ffi.new("fst_file **"), _ffi.new("fst_file_info *"), _ffi.new("fst_error *")
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        raise Doubt("the path is not UTF-8") from None
    if b"\0" in encoded:
        raise Doubt("the path holds a NUL")
    if _lib.fst_file_open(encoded, out, info, err):
        _raise(err, path)
    return File(path, _ffi.gc(out[0], _lib.fst_file_release), info)


_layouts = LayoutCache()


def read_layout(file: File) -> FileLayout:
    """Read, parse and validate a file's header.

    Raises:
        Doubt: stock might see it differently; ask stock.
        OSError, MemoryError: reading it failed.
    """
    cached = _layouts.get(file.key)
    known: Any = cached.owner if cached is not None else _ffi.NULL
    out, view, err = (
        _ffi.new("fst_layout **"),
        _ffi.new("fst_layout_view *"),
        _ffi.new("fst_error *"),
    )
    code = _lib.fst_layout_read(file.handle, known, out, view, err)
    if code == _lib.FST_PENDING and cached is not None:
        return cached
    if code != _lib.FST_OK:
        _raise(err, file.path)
    layout = _file_layout(_ffi.gc(out[0], _lib.fst_layout_release), view, file.size)
    _layouts.put(file.key, layout)
    return layout


def _file_layout(owner: Any, view: Any, file_bytes: int) -> FileLayout:
    count = view.count
    names: tuple[str, ...] = ()
    records, dims = memoryview(b"").cast("Q"), memoryview(b"").cast("q")
    if count:
        text = bytes(_ffi.buffer(view.names, view.names_bytes)).decode("utf-8")
        names = tuple(text.split("\0")[:count])
        record_bytes = _ffi.sizeof("fst_tensor") * count
        records = memoryview(_ffi.buffer(view.tensors, record_bytes)).cast("Q")
        if view.dims_count:
            dims = memoryview(_ffi.buffer(view.dims, 8 * view.dims_count)).cast("q")
    index = dict(zip(names, range(count), strict=True))
    if len(index) != count:
        raise Doubt("a tensor name occurs twice in the header")
    metadata = None
    if view.metadata != _ffi.NULL:
        metadata = json.loads(bytes(_ffi.buffer(view.metadata, view.metadata_bytes)))
    return FileLayout(
        names=names,
        index=index,
        data_begin=view.data_begin,
        data_bytes=file_bytes - view.data_begin,
        metadata=metadata,
        dtypes=view.dtypes,
        odd_f4=bool(view.odd_f4),
        owner=owner,
        _records=records,
        _dims=dims,
    )


# ---- arenas ----


class Arena:
    """Memory that tensors live in; the tensors keep it alive after this object is gone.

    Attributes:
        nbytes: its size.
        keep: whoever owns borrowed memory.
    """

    __slots__ = ("handle", "keep", "nbytes")

    def __init__(self, handle: Any) -> None:
        self.keep: object = None
        self.handle = _ffi.gc(handle, _lib.fst_arena_release)
        self.nbytes: int = _lib.fst_arena_bytes(handle)


def _arena(create: Callable[[Any, Any], int], filename: str | None = None) -> Arena:
    out, err = _ffi.new("fst_arena **"), _ffi.new("fst_error *")
    if create(out, err):
        _raise(err, filename)
    return Arena(out[0])


def map_arena(file: File) -> Arena:
    """Map a whole file privately: writes to it never reach the file.

    Raises:
        MemoryError, OSError: the map was refused.
    """
    return _arena(lambda out, err: _lib.fst_arena_map(file.handle, out, err), file.path)


def alloc_arena(nbytes: int) -> Arena:
    """Anonymous memory, in huge pages where the system allows them.

    Raises:
        MemoryError: it was refused.
    """
    return _arena(lambda out, err: _lib.fst_arena_alloc(nbytes, out, err))


def borrow_arena(address: int, nbytes: int, owner: object) -> Arena:
    """Memory that belongs to ``owner``, which is kept as long as the arena or a job on it."""
    base = _ffi.cast("void *", address)
    arena = _arena(lambda out, err: _lib.fst_arena_borrow(base, nbytes, out, err))
    arena.keep = owner
    return arena


# ---- jobs ----


@dataclasses.dataclass(frozen=True)
class JobStats:
    """Counters of a job, in bytes; see ``fst_job_stats`` in native/fst.h."""

    bytes_total: int
    bytes_done: int
    bytes_cold: int
    bytes_skipped: int
    bytes_direct: int
    direct_errno: int
    done: bool


class Job:
    """Work in progress. Releasing or collecting an unfinished read cancels and drains it.

    The object exists before the native job does, and holds what the job works on: at no
    moment can an interrupt leave workers writing into memory that is about to be freed.
    """

    __slots__ = ("_at", "_keep")

    def __init__(self, keep: object) -> None:
        self._keep = keep
        self._at = _ffi.gc(_ffi.new("fst_job **"), _lib.fst_job_release_at)

    def __del__(self) -> None:
        self.release()  # before what it works on goes

    def start(self, call: Any, *arguments: Any) -> None:
        """Let a native function create the job; raises what it reports."""
        err = _ffi.new("fst_error *")
        try:
            code = call(*arguments, self._at, err)
        except BaseException:
            self.release()
            raise
        if code:
            _raise(err)

    def release(self) -> None:
        """Let go of the job; of a read, nothing is in flight afterwards."""
        _ffi.release(self._at)

    def wait(self, on_progress: Callable[[JobStats], None] | None = None) -> JobStats:
        """Wait until all bytes are there; an interrupt cancels and drains the job.

        Raises:
            OSError, MemoryError, SafetensorError: as the table at the top says.
        """
        err = _ffi.new("fst_error *")
        try:
            while (code := _lib.fst_job_wait(self._at[0], _WAIT_MS, err)) == _lib.FST_PENDING:
                if on_progress is not None:
                    on_progress(self.stats())
        except BaseException:
            self.release()
            raise
        if code != _lib.FST_OK:
            _raise(err)
        stats = self.stats()
        if on_progress is not None:
            on_progress(stats)
        return stats

    def cancel(self) -> None:
        """Start nothing more; what is in flight still lands."""
        _lib.fst_job_cancel(self._at[0])

    def stats(self) -> JobStats:
        """Counters as of now."""
        out = _ffi.new("fst_job_stats *")
        _lib.fst_job_get_stats(self._at[0], out)
        return JobStats(
            out.bytes_total,
            out.bytes_done,
            out.bytes_cold,
            out.bytes_skipped,
            out.bytes_direct,
            out.direct_errno,
            bool(out.done),
        )


def _segments(flat: array[int]) -> tuple[Any, int]:
    if not len(flat):
        return _ffi.NULL, 0
    return _ffi.from_buffer("fst_segment[]", flat), len(flat) // 3


def prefetch(
    file: File,
    arena: Arena,
    segments: array[int],
    *,
    threads: int,
    chunk_bytes: int,
    reserve_bytes: int,
) -> Job:
    """Start pulling extents of a mapped file into memory, in the order given.

    Args:
        file: whose map ``arena`` is.
        arena: the map; read-ahead ends when nobody uses it any more.
        segments: flat 64-bit triples (file offset, bytes, ignored).
        threads: most workers.
        chunk_bytes: bytes one worker handles at a time.
        reserve_bytes: stop when less memory than this is left.
    """
    options = _ffi.new(
        "fst_job_options *",
        [_ffi.sizeof("fst_job_options"), threads, chunk_bytes, 0, 0, reserve_bytes],
    )
    pointer, count = _segments(segments)
    job = Job(arena)
    job.start(_lib.fst_job_prefetch, file.handle, arena.handle, pointer, count, options)
    return job


def read(
    file: File,
    arena: Arena,
    segments: array[int],
    *,
    threads: int,
    chunk_bytes: int,
    direct: bool,
    drop_cache: bool,
) -> Job:
    """Start reading extents into an arena.

    Args:
        file: to read from.
        arena: to read into.
        segments: flat 64-bit triples (file offset, bytes, arena offset), by file offset.
        threads: most workers.
        chunk_bytes: bytes one worker handles at a time.
        direct: with O_DIRECT; where that is refused, through the page cache after all.
        drop_cache: leave nothing of them in the page cache.
    """
    mode = _lib.FST_READ_DIRECT if direct else _lib.FST_READ_BUFFERED
    options = _ffi.new(
        "fst_job_options *",
        [_ffi.sizeof("fst_job_options"), threads, chunk_bytes, mode, int(drop_cache), 0],
    )
    pointer, count = _segments(segments)
    job = Job(arena)
    job.start(_lib.fst_job_read, file.handle, arena.handle, pointer, count, options)
    return job


# ---- tensors ----


@dataclasses.dataclass(frozen=True)
class DlDtype:
    """How torch takes one dtype through DLPack."""

    code: int = 0
    bits: int = 0
    as_bytes: bool = False
    known: bool = False


def dl_table(entries: Sequence[DlDtype]) -> Any:
    """Native form of a table with one entry per ``DTYPE_NAMES``."""
    rows = [[e.code, e.bits, int(e.as_bytes), int(e.known)] for e in entries]
    return _ffi.new("fst_dl_dtype[]", rows)


def import_tensors(
    arena: Arena,
    layout: FileLayout,
    table: Any,
    importer: tuple[int, int],
    *,
    tensors: array[int] | None = None,
    offsets: array[int] | None = None,
) -> list[Any]:
    """Make torch tensors over an arena in one native call.

    Args:
        arena: holds the bytes.
        layout: describes the tensors.
        table: from `dl_table`.
        importer: addresses of torch's DLPack exchange API (or 0) and of the callable that
            takes a ``dltensor`` capsule (or 0).
        tensors: their numbers; all when None.
        offsets: where each begins in the arena; as in the file when None.

    Raises:
        Doubt: this torch cannot hold one of the dtypes.
        MemoryError: no memory to describe them.
    """
    result: list[Any] = []
    err = _ffi.new("fst_error *")
    code = _lib.fst_tensors_import(
        arena.handle,
        layout.owner,
        _ffi.NULL if tensors is None else _ffi.from_buffer("uint64_t[]", tensors),
        len(layout.names) if tensors is None else len(tensors),
        _ffi.NULL if offsets is None else _ffi.from_buffer("uint64_t[]", offsets),
        layout.data_begin,
        table,
        importer[0],
        importer[1],
        id(result),
        err,
    )
    if code == _lib.FST_E_PYTHON:
        raise Doubt(_ffi.string(err.message).decode("utf-8", "replace"))
    if code:
        _raise(err)
    return result


def parse_header(header: bytes, file_bytes: int) -> FileLayout:
    """Parse a header that is already in memory, without its length (probes and tests).

    Raises:
        Doubt: stock might see it differently.
    """
    out, view, err = (
        _ffi.new("fst_layout **"),
        _ffi.new("fst_layout_view *"),
        _ffi.new("fst_error *"),
    )
    if _lib.fst_layout_parse(header, len(header), file_bytes, out, view, err):
        _raise(err)
    return _file_layout(_ffi.gc(out[0], _lib.fst_layout_release), view, file_bytes)


# ---- machine and measuring ----


@dataclasses.dataclass(frozen=True)
class Residency:
    """How much of a file is in the page cache.

    Attributes:
        resident_bytes: cached.
        total_bytes: the file's size.
        probe: ``cachestat``, ``preadv2``, ``mincore``, or ``none``: nothing could tell.
    """

    resident_bytes: int
    total_bytes: int
    probe: str


def residency(path: str) -> Residency:
    """Look how much of a file is in the page cache, without reading it.

    Raises:
        OSError: the file cannot be opened.
        Doubt: it is not a regular file.
    """
    file = open_file(os.fspath(path))
    resident, probe = file.residency(0, file.size)
    return Residency(resident, file.size, probe)


def touch(address: int, nbytes: int) -> int:
    """Read every byte once; returns an order-sensitive 64-bit checksum."""
    return int(_lib.fst_touch(_ffi.cast("void *", address), nbytes))


def read_ceiling(path: str, *, direct: bool, threads: int, chunk_bytes: int) -> tuple[int, float]:
    """Read a file raw, in parallel, into small reused buffers.

    Returns:
        Bytes read and seconds taken.

    Raises:
        OSError: reading failed, or O_DIRECT is refused here.
    """
    nbytes, seconds, err = _ffi.new("uint64_t *"), _ffi.new("double *"), _ffi.new("fst_error *")
    encoded = os.fsencode(path)
    if _lib.fst_read_ceiling(encoded, int(direct), threads, chunk_bytes, nbytes, seconds, err):
        _raise(err, path)
    return nbytes[0], seconds[0]


def memory_headroom() -> int | None:
    """Bytes this process may still take (MemAvailable and cgroups); None when nothing tells."""
    headroom = int(_lib.fst_memory_headroom())
    return None if headroom == (1 << 64) - 1 else headroom


def counters() -> dict[str, int]:
    """What the engine holds now and has moved since the start (``fst_pool_stats``)."""
    if _native_error is not None:
        return {}
    out = _ffi.new("fst_pool_stats *")
    _lib.fst_pool_get_stats(out)
    return {name: int(getattr(out, name)) for name, _ in _ffi.typeof("fst_pool_stats").fields}


def shutdown() -> None:
    """End idle workers and free their buffers now; the next load starts them again."""
    if _native_error is None:
        _lib.fst_pool_shutdown()


# ---- fault injection (tests) ----


def set_fault(
    call: str, *, first: int = 1, count: int = 1 << 62, errno: int = 0, short_bytes: int = 0
) -> None:
    """Make system calls number first.. of a kind fail, or be cut short (see native/fst.h)."""
    if _lib.fst_fault_set(call.encode(), first, count, errno, short_bytes):
        raise ValueError(f"no injectable system call {call!r}")


def fault_calls(call: str) -> int:
    """Calls of a kind since faults were last cleared."""
    return int(_lib.fst_fault_calls(call.encode()))


def clear_faults() -> None:
    """Let all system calls through again."""
    _lib.fst_fault_clear()
