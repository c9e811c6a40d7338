"""The native engine's dtypes, and torch tensors over an arena, made in one call."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from typing import Any

from ..errors import Fallback
from ..layout import FileLayout
from ._lib import ffi, lib, native_error, raise_
from .arenas import Arena


def dtype_names() -> tuple[str, ...]:
    """Names of safetensors' dtypes by their number in ``enum fst_dtype``; () without engine."""
    if native_error() is not None:
        return ()
    found: dict[int, str] = ffi.typeof("enum fst_dtype").elements
    return tuple(found[k].removeprefix("FST_") for k in range(lib.FST_DTYPES))


def dtype_bits(k: int) -> int:
    """Bits of one number of a dtype."""
    return int(lib.fst_dtype_bits(k))


@dataclasses.dataclass(frozen=True)
class DlDtype:
    """How torch takes one dtype through DLPack."""

    code: int = 0
    bits: int = 0
    as_bytes: bool = False
    known: bool = False


def dl_table(entries: Sequence[DlDtype]) -> Any:
    """Native form of a table with one entry per dtype."""
    rows = [[e.code, e.bits, int(e.as_bytes), int(e.known)] for e in entries]
    return ffi.new("fst_dl_dtype[]", rows)


def set_dl_dtype(table: Any, k: int, entry: DlDtype) -> None:
    """Change one entry of a table; ``known`` is set last, which other threads may wait for."""
    row = table[k]
    row.code, row.bits, row.as_bytes = entry.code, entry.bits, int(entry.as_bytes)
    row.known = int(entry.known)


def _view_of(layout: FileLayout) -> Any:
    """A layout in the engine's form; it uses the layout's memory, which must outlive it."""
    view = ffi.new("fst_layout_view *")
    view.count = len(layout.names)
    view.tensors = ffi.from_buffer("fst_tensor[]", layout._records)
    view.dims = ffi.from_buffer("int64_t[]", layout._dims)
    return view


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
        Fallback: this torch cannot hold one of the dtypes.
        MemoryError: no memory to describe them.
    """
    result: list[Any] = []
    err = ffi.new("fst_error *")
    code = lib.fst_tensors_import(
        arena.handle,
        _view_of(layout) if layout.view is None else layout.view,
        ffi.NULL if tensors is None else ffi.from_buffer("uint64_t[]", tensors),
        len(layout.names) if tensors is None else len(tensors),
        ffi.NULL if offsets is None else ffi.from_buffer("uint64_t[]", offsets),
        layout.data_begin,
        table,
        importer[0],
        importer[1],
        id(result),
        err,
    )
    if code == lib.FST_E_PYTHON:
        raise Fallback(ffi.string(err.message).decode("utf-8", "replace"))
    if code:
        raise_(err)
    return result
