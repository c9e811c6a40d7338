"""Devices that the native engine copies to, by the driver's own library."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
from typing import Any

from ._lib import ffi, lib, raise_
from .arenas import Arena
from .files import File


class DeviceHandle:
    """One device, in its primary context. Lives as long as the process.

    Attributes:
        kind: ``cuda`` or ``hip``.
        ordinal: its number, as the driver counts.
    """

    __slots__ = ("handle", "kind", "ordinal")

    def __init__(self, handle: Any, kind: str, ordinal: int) -> None:
        self.handle = handle
        self.kind = kind
        self.ordinal = ordinal


@dataclasses.dataclass(frozen=True)
class DeviceInfo:
    """See ``fst_device_info`` in native/fst.h; all of it is what the driver says."""

    streams: int
    numa_node: int
    integrated: bool
    host_page_tables: bool
    free_bytes: int
    total_bytes: int


def open_device(ordinal: int, *, kind: str = "cuda", library: str | None = None) -> DeviceHandle:
    """Retain a device's primary context; the first call starts the driver.

    Args:
        ordinal: as the driver counts.
        kind: ``cuda`` or ``hip``.
        library: path of a driver library; the usual one when None.

    Raises:
        Fallback: there is no such library or device, or the process has forked since.
    """
    kinds = {"cuda": lib.FST_GPU_CUDA, "hip": lib.FST_GPU_HIP}
    out, err = ffi.new("fst_device **"), ffi.new("fst_error *")
    path = ffi.NULL if library is None else ffi.new("char[]", os.fsencode(library))
    if lib.fst_device_open(kinds[kind], path, ordinal, out, err):
        raise_(err)
    _quiesce_at_exit()
    return DeviceHandle(out[0], kind, ordinal)


@functools.cache
def _quiesce_at_exit() -> None:
    # Copies must not be under way when the driver unloads.
    atexit.register(lib.fst_device_quiesce)


def device_info(device: DeviceHandle) -> DeviceInfo:
    """The driver's current figures for a device.

    Raises:
        Fallback: the driver failed.
    """
    out, err = ffi.new("fst_device_info *"), ffi.new("fst_error *")
    if lib.fst_device_get_info(device.handle, out, err):
        raise_(err)
    return DeviceInfo(
        out.streams,
        out.numa_node,
        bool(out.integrated),
        bool(out.host_page_tables),
        out.free_bytes,
        out.total_bytes,
    )


def compare(
    device: DeviceHandle,
    arena: Arena,
    file: File,
    *,
    arena_offset: int,
    file_offset: int,
    nbytes: int,
) -> bool:
    """Read landed bytes back from a device: whether they equal the file's.

    Raises:
        Fallback: the driver failed.
        OSError, MemoryError, SafetensorError: the file could not be read.
    """
    if file.feed is not None:
        file.feed.ready()
    equal, err = ffi.new("int32_t *"), ffi.new("fst_error *")
    if lib.fst_device_compare(
        device.handle, arena.handle, arena_offset, file.handle, file_offset, nbytes, equal, err
    ):
        raise_(err, about=file.path)
    return bool(equal[0])
