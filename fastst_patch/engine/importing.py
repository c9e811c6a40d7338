"""The native engine's dtypes, and torch tensors and NumPy arrays, made in one call."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..layout import FileLayout
from ._lib import ffi, lib, native_error, raise_
from .arenas import Arena

if TYPE_CHECKING:
    import numpy as np


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


def _selected(
    layout: FileLayout, tensors: array[int] | None, offsets: array[int] | None
) -> tuple[Any, ...]:
    """The arguments that name tensors: view, which, count, offsets and file_base."""
    return (
        _view_of(layout) if layout.view is None else layout.view,
        ffi.NULL if tensors is None else ffi.from_buffer("uint64_t[]", tensors),
        len(layout.names) if tensors is None else len(tensors),
        ffi.NULL if offsets is None else ffi.from_buffer("uint64_t[]", offsets),
        layout.data_begin,
    )


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
        *_selected(layout, tensors, offsets),
        table,
        importer[0],
        importer[1],
        id(result),
        err,
    )
    if code:
        raise_(err)
    return result


def np_table() -> Any:
    """A table of NumPy's dtypes in native form, with none in it yet; None without engine."""
    return None if native_error() is not None else ffi.new("fst_np_dtype[]", lib.FST_DTYPES)


def set_np_dtype(table: Any, k: int, dtype: np.dtype[Any]) -> None:
    """Put the dtype that the caller keeps for number k of ``enum fst_dtype`` into a table."""
    row = table[k]
    row.itemsize, row.alignment = dtype.itemsize, dtype.alignment
    row.dtype = id(dtype)  # last: other threads may wait for it


def make_arrays(
    memory: memoryview,
    layout: FileLayout,
    table: Any,
    frombuffer: Callable[..., Any],
    *,
    tensors: array[int] | None = None,
    offsets: array[int] | None = None,
) -> tuple[list[Any], int]:
    """Make NumPy arrays over memory in one native call, a third of the time of one in Python.

    Args:
        memory: holds the bytes, and lives as long as an array.
        layout: describes the arrays.
        table: from `np_table`, with all their dtypes.
        frombuffer: NumPy's.
        tensors: their numbers; all when None.
        offsets: where each begins in the memory; as in the file when None.

    Returns:
        The arrays, with None for each that has no bytes or is not aligned; and how many these are.

    Raises:
        Fallback: NumPy refused one.
    """
    result: list[Any] = []
    left, err = ffi.new("uint64_t *"), ffi.new("fst_error *")
    code = lib.fst_arrays_make(
        *_selected(layout, tensors, offsets),
        table,
        id(frombuffer),
        id(memory),
        id(result),
        left,
        err,
    )
    if code:
        raise_(err)
    return result, left[0]
