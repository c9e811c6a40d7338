"""Reads, uploads and read-ahead in progress."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from typing import Any

from ._lib import ffi, lib, place_for, raise_
from .arenas import Arena, segments_of
from .devices import DeviceHandle
from .files import File

_WAIT_MS = 100
"""A wait returns to Python this often, so that Ctrl-C is seen."""


@dataclasses.dataclass(frozen=True)
class JobStats:
    """Counters of a job, in bytes; see ``fst_job_stats`` in native/fst.h."""

    bytes_total: int
    bytes_done: int
    bytes_cold: int
    bytes_skipped: int
    bytes_direct: int
    bytes_gds: int
    direct_errno: int
    done: bool
    gds_refused: bool
    gds_note: str


class Job:
    """Work in progress. Releasing or collecting a job that fills an arena cancels and drains it.

    The object exists before the native job does, and keeps the memory that the job uses. So an
    interrupt can never leave workers writing into memory that is about to be freed.

    A job on a file with a feed is cancelled only: nothing waits for the network, and nothing that
    it still brings is written to memory that the job does not hold itself.
    """

    __slots__ = ("_at", "_feed", "_keep", "_path")

    def __init__(self, keep: object, file: File | None = None) -> None:
        self._keep = keep, file
        self._feed = None if file is None else file.feed
        self._path = "" if file is None else file.path
        self._at = place_for("job")

    def __del__(self) -> None:
        if hasattr(self, "_at"):  # else __init__ was interrupted
            self.release()  # before the memory that it uses is freed

    def start(self, call: Any, *arguments: Any) -> None:
        """Let a native function create the job, and raise the error that it reports."""
        err = ffi.new("fst_error *")
        try:
            code = call(*arguments, self._at, err)
        except BaseException:
            self.release()
            raise
        if code:
            raise_(err, about=self._path)

    def release(self) -> None:
        """Release the job; nothing that fills an arena is in flight afterwards."""
        ffi.release(self._at)

    def wait(self, on_progress: Callable[[JobStats], None] | None = None) -> JobStats:
        """Wait until all bytes are there; an interrupt cancels and drains the job.

        Raises:
            OSError, MemoryError, SafetensorError: as the table in `_lib` says.
        """
        err = ffi.new("fst_error *")
        try:
            while (code := lib.fst_job_wait(self._at[0], _WAIT_MS, err)) == lib.FST_PENDING:
                if on_progress is not None:
                    on_progress(self.stats())
        except BaseException as error:
            self.release()
            self._interrupted(error)
            raise
        if code != lib.FST_OK:
            raise_(err, about=self._path)
        stats = self.stats()
        if on_progress is not None:
            on_progress(stats)
        return stats

    def wait_until(self, file_offset: int) -> None:
        """Wait until the bytes before a file offset, or address, have landed; raises as `wait`.

        For several threads at once: an interrupt of one leaves the job to the others.
        """
        err = ffi.new("fst_error *")
        try:
            while True:
                code = lib.fst_job_wait_until(self._at[0], file_offset, _WAIT_MS, err)
                if code != lib.FST_PENDING:
                    break
        except BaseException as error:
            self._interrupted(error)
            raise
        if code != lib.FST_OK:
            raise_(err, about=self._path)

    def _interrupted(self, error: BaseException) -> None:
        """Cancel what is in flight on a network after Ctrl-C, for all jobs on the file."""
        if self._feed is not None and not isinstance(error, Exception):
            self._feed.interrupt()

    def cancel(self) -> None:
        """Start no more chunks; chunks in flight are finished."""
        lib.fst_job_cancel(self._at[0])

    def stats(self) -> JobStats:
        """Counters as of now."""
        out = ffi.new("fst_job_stats *")
        lib.fst_job_get_stats(self._at[0], out)
        return JobStats(
            out.bytes_total,
            out.bytes_done,
            out.bytes_cold,
            out.bytes_skipped,
            out.bytes_direct,
            out.bytes_gds,
            out.direct_errno,
            bool(out.done),
            bool(out.gds_refused),
            ffi.string(out.gds_note).decode("utf-8", "replace"),
        )


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where on a device a read or an upload goes.

    Attributes:
        device: owns the memory.
        stream: address of the stream that the arena was allocated on; copies wait for what is
            pending there when the job starts.
        pinned_bytes: most host memory that the process may have pinned for copies.
    """

    device: DeviceHandle
    stream: int
    pinned_bytes: int


def _options(threads: int, chunk_bytes: int, to: Destination | None = None) -> Any:
    """The options that all kinds of jobs have; the others are 0."""
    options = ffi.new("fst_job_options *", [ffi.sizeof("fst_job_options"), threads, chunk_bytes])
    if to is not None:
        options.device, options.stream = to.device.handle, to.stream
        options.pinned_bytes = to.pinned_bytes
    return options


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
        arena: the map; read-ahead ends with its last user.
        segments: flat 64-bit triples (file offset, bytes, ignored).
        threads: most workers.
        chunk_bytes: bytes one worker handles at a time.
        reserve_bytes: stop when less memory than this is left.
    """
    options = _options(threads, chunk_bytes)
    options.reserve_bytes = reserve_bytes
    pointer, count = segments_of(segments)
    job = Job(arena)
    job.start(lib.fst_job_prefetch, file.handle, arena.handle, pointer, count, options)
    return job


_MODES = {"buffered": 0, "direct": 1, "direct-if-cold": 2, "gds": 3}  # enum fst_read_mode


def read(
    file: File,
    arena: Arena,
    segments: array[int],
    *,
    threads: int,
    chunk_bytes: int,
    mode: str,
    drop_cache: bool,
    to: Destination | None = None,
) -> Job:
    """Start reading extents into an arena.

    Args:
        file: to read from.
        arena: to read into.
        segments: flat 64-bit triples (file offset, bytes, arena offset), by file offset.
        threads: most workers.
        chunk_bytes: bytes one worker handles at a time.
        mode: ``buffered``; ``direct``, with O_DIRECT, or through the page cache where that is
            refused; ``direct-if-cold``, which reads cached chunks from the page cache; ``gds``, for
            devices only.
        drop_cache: leave nothing of the extents in the page cache.
        to: the device whose memory the arena is; None for host memory.

    Raises:
        Fallback: the device's driver failed.
        RemoteError: the file is remote, and could not be opened again after an interrupt.
    """
    options = _options(threads, chunk_bytes, to)
    options.mode, options.drop_cache = _MODES[mode], drop_cache
    pointer, count = segments_of(segments)
    if file.feed is not None:
        file.feed.ready()
    job = Job(arena, file)
    job.start(lib.fst_job_read, file.handle, arena.handle, pointer, count, options)
    return job


def upload(
    arena: Arena,
    segments: array[int],
    *,
    threads: int,
    chunk_bytes: int,
    to: Destination,
    keep: object,
) -> Job:
    """Start copying host memory into an arena on a device.

    Segments that are neighbours by address and, less than 256 bytes apart, in the arena are copied
    together; the bytes between them in the arena become zeros, unless the arena is borrowed.

    Args:
        arena: memory of the device.
        segments: flat 64-bit triples (address, bytes, arena offset), by address, not overlapping.
        threads: most workers.
        chunk_bytes: bytes one worker handles at a time.
        to: the device.
        keep: owner of the host memory, which must not change meanwhile; kept as long as the job.

    Raises:
        Fallback: the device's driver failed.
    """
    options = _options(threads, chunk_bytes, to)
    pointer, count = segments_of(segments)
    job = Job((arena, keep))
    job.start(lib.fst_job_upload, arena.handle, pointer, count, options)
    return job
