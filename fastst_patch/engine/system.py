"""The limits of this machine, and the engine's counters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ._lib import ffi, lib, native_error, raise_


def touch(address: int, nbytes: int) -> int:
    """Read every byte once; returns an order-sensitive 64-bit checksum."""
    return int(lib.fst_touch(ffi.cast("void *", address), nbytes))


def read_ceiling(path: str, *, direct: bool, threads: int, chunk_bytes: int) -> tuple[int, float]:
    """Read a file raw, in parallel, into small reused buffers.

    Returns:
        Bytes read and seconds taken.

    Raises:
        OSError: reading failed, or O_DIRECT is refused here.
    """
    nbytes, seconds, err = ffi.new("uint64_t *"), ffi.new("double *"), ffi.new("fst_error *")
    encoded = os.fsencode(path)
    if lib.fst_read_ceiling(encoded, int(direct), threads, chunk_bytes, nbytes, seconds, err):
        raise_(err, path)
    return nbytes[0], seconds[0]


def dicts_holding(dicts: Sequence[dict[str, Any]], objects: Sequence[int]) -> list[int]:
    """Find dicts that have one of some objects among their values, by identity.

    In C, since the modules of a process have a hundred thousand names and more.

    Args:
        dicts: that are looked through.
        objects: by `id`; they are alive.

    Returns:
        Their numbers in ``dicts``.
    """
    found = ffi.new("uint8_t[]", len(dicts))
    addresses = ffi.new("uintptr_t[]", [id(one) for one in dicts])
    wanted = ffi.new("uintptr_t[]", objects)
    lib.fst_dicts_holding(addresses, len(dicts), wanted, len(objects), found)
    return [i for i, held in enumerate(ffi.buffer(found)[:]) if held]


def memory_headroom() -> int | None:
    """Bytes this process may still take (MemAvailable and cgroups); None if neither is known."""
    headroom = int(lib.fst_memory_headroom())
    return None if headroom == (1 << 64) - 1 else headroom


def ask_for_huge_pages(address: int, nbytes: int, *, fill: bool) -> int | None:
    """Ask for huge pages for memory that is not touched yet; content is left as it is.

    Args:
        address: of the memory, which must stay allocated during the call.
        nbytes: of the memory; only huge pages that lie in it as a whole are asked for.
        fill: whether they are taken now.

    Returns:
        Nanoseconds of processor time that this took; None where the system refuses.
    """
    spent = int(lib.fst_memory_huge(ffi.cast("void *", address), nbytes, int(fill)))
    return None if spent == (1 << 64) - 1 else spent


def counters() -> dict[str, int]:
    """Memory, files and threads held now, and bytes moved so far (``fst_pool_stats``)."""
    if native_error() is not None:
        return {}
    out = ffi.new("fst_pool_stats *")
    lib.fst_pool_get_stats(out)
    return {name: int(getattr(out, name)) for name, _ in ffi.typeof("fst_pool_stats").fields}


def shutdown() -> None:
    """End idle workers and free their buffers now; the next load starts them again."""
    if native_error() is None:
        lib.fst_pool_shutdown()
