"""Where tensors lie in a file, and where a load puts their bytes. Pure: no I/O, no torch.

``FileLayout`` (what is in a file) and ``LoadPlan`` (which bytes go where) are immutable and
may be shared between threads.
"""

from __future__ import annotations

import dataclasses
import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .locks import once, shared

__all__ = [
    "ARENA_ALIGNMENT",
    "FileLayout",
    "LayoutCache",
    "LoadPlan",
    "described",
    "plan_arena",
    "plan_rows",
]

ARENA_ALIGNMENT = 256
"""Bytes. Files promise 8; transformers' grouped matmul wants 16 and kernels up to 128."""

_NUMBER = re.compile(r"[0-9]+")


def _padded(number: re.Match[str]) -> str:
    return number[0].zfill(20)


_FIELDS = 4  # 64-bit words in struct fst_tensor: begin, end, dims index, ndim | dtype << 32


@dataclasses.dataclass(frozen=True, eq=False)
class FileLayout:
    """What a validated header says. Tensors are numbered in offset order.

    Attributes:
        names: of the tensors, in offset order.
        index: name -> number.
        data_begin: file offset of the first tensor's bytes.
        data_bytes: of all tensors together.
        find_metadata: decodes the header's ``__metadata__``; None where there is none.
        dtypes: bit ``1 << k`` is set if number k of ``enum fst_dtype`` occurs.
        odd_f4: whether an F4 tensor has no even last dimension, which stock refuses.
        owner: keeps the memory of the views below alive.
        view: the engine's ``fst_layout_view``; None where no header was parsed.
    """

    names: tuple[str, ...]
    index: Mapping[str, int]
    data_begin: int
    data_bytes: int
    find_metadata: Callable[[], Mapping[str, str]] | None
    dtypes: int
    odd_f4: bool
    owner: Any
    _records: memoryview
    _dims: memoryview
    view: Any = None

    @once
    def metadata(self) -> Mapping[str, str] | None:
        """The header's ``__metadata__``, or None. Decoded when first asked for: 14 ns a byte."""
        return None if self.find_metadata is None else self.find_metadata()

    @once
    def sorted_names(self) -> tuple[str, ...]:
        """Names as stock's ``keys()`` orders them: by UTF-8 bytes, which is by code point."""
        return tuple(sorted(self.names))

    @once
    def natural_names(self) -> tuple[str, ...]:
        """Names with the numbers in them in their order: layer 2 before layer 10."""
        return tuple(sorted(self.names, key=lambda name: _NUMBER.sub(_padded, name)))

    def extent(self, i: int) -> tuple[int, int]:
        """File offsets of tensor i's first byte and of the byte behind its last."""
        at = i * _FIELDS
        return self.data_begin + self._records[at], self.data_begin + self._records[at + 1]

    def nbytes(self, i: int) -> int:
        """Length of tensor i in bytes."""
        at = i * _FIELDS
        return int(self._records[at + 1] - self._records[at])

    def shape(self, i: int) -> list[int]:
        """Shape of tensor i as the header has it (F4 counts halves of bytes)."""
        first, tail = self._records[i * _FIELDS + 2], self._records[i * _FIELDS + 3]
        return self._dims[first : first + (tail & 0xFFFFFFFF)].tolist()

    def dtype(self, i: int) -> int:
        """Number of tensor i's dtype in ``enum fst_dtype``."""
        return int(self._records[i * _FIELDS + 3] >> 32)

    def entries(
        self, numbers: Iterable[int] | None = None
    ) -> Iterator[tuple[int, int, int, list[int]]]:
        """Offset of the first byte, bytes, dtype and shape of tensors; of all when None."""
        records, dims, data_begin = self._records, self._dims, self.data_begin
        for i in range(len(self.names)) if numbers is None else numbers:  # of some 20,000
            begin, end, first, tail = records[i * _FIELDS : (i + 1) * _FIELDS]
            shape = dims[first : first + (tail & 0xFFFFFFFF)].tolist()
            yield data_begin + begin, end - begin, tail >> 32, shape

    def entry(self, i: int) -> tuple[int, int, int, list[int]]:
        """The same of tensor i."""
        begin, end, first, tail = self._records[i * _FIELDS : (i + 1) * _FIELDS]
        shape = self._dims[first : first + (tail & 0xFFFFFFFF)].tolist()
        return self.data_begin + begin, end - begin, tail >> 32, shape

    def lesser(self, numbers: Iterable[int], limit: int, dtypes: Container[int]) -> list[int]:
        """Those of some tensors that have fewer than ``limit`` bytes, and one of some dtypes."""
        records = self._records
        return [
            i
            for i in numbers
            if records[i * _FIELDS + 1] - records[i * _FIELDS] < limit
            and records[i * _FIELDS + 3] >> 32 in dtypes
        ]


def described(
    tensors: Iterable[tuple[str, int, Sequence[int], int]],
    data_begin: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> FileLayout:
    """A layout made from descriptions instead of a parsed header.

    Args:
        tensors: name, dtype, shape as a header has it, and bytes of each, one behind another.
        data_begin: see the attribute.
        metadata: the header's ``__metadata__``.
    """
    names: list[str] = []
    records, dims = array("Q"), array("q")
    used = end = 0
    for name, kind, shape, nbytes in tensors:
        names.append(name)
        used |= 1 << kind
        records.extend((end, end + nbytes, len(dims), len(shape) | kind << 32))
        dims.extend(shape)
        end += nbytes
    return FileLayout(
        names=tuple(names),
        index={name: i for i, name in enumerate(names)},
        data_begin=data_begin,
        data_bytes=end,
        find_metadata=None if metadata is None else lambda: metadata,
        dtypes=used,
        odd_f4=False,
        owner=None,
        _records=memoryview(records),
        _dims=memoryview(dims),
    )


class LayoutCache:
    """Parsed headers of files that are opened repeatedly, as by accelerate's disk offload.

    A hit still reads the header and compares every byte of it: timestamps are not trusted. Code
    that interrupts an update, as a signal handler does, finds the cache empty and leaves it alone.
    """

    BYTES = 64 << 20
    """Most header bytes kept; parsed they take about three times that."""

    def __init__(self) -> None:
        self._updating = False
        self._entries: OrderedDict[tuple[Hashable, ...], FileLayout] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[Hashable, ...]) -> FileLayout | None:
        """The last layout of a file's identity and size, whose header the caller has to compare."""
        with shared:
            if self._updating:
                return None
            self._updating = True
            try:
                found = self._entries.get(key)
                if found is not None:
                    self._entries.move_to_end(key)
                return found
            finally:
                self._updating = False

    def put(self, key: tuple[Hashable, ...], layout: FileLayout) -> None:
        """Keep a layout, and drop the oldest if there are too many bytes; none of a huge header."""
        if layout.data_begin > self.BYTES // 4:
            return
        with shared:
            if self._updating:
                return
            self._updating = True
            try:
                self._put(key, layout)
            finally:
                self._updating = False

    def _put(self, key: tuple[Hashable, ...], layout: FileLayout) -> None:
        old = self._entries.pop(key, None)
        self._bytes += layout.data_begin - (old.data_begin if old else 0)
        self._entries[key] = layout
        while self._bytes > self.BYTES:
            _, evicted = self._entries.popitem(last=False)
            self._bytes -= evicted.data_begin


@dataclasses.dataclass(frozen=True, eq=False)
class LoadPlan:
    """Which bytes of a file go where in an arena.

    Attributes:
        tensors: numbers of the tensors planned, in offset order.
        offsets: 64-bit arena offset of each.
        segments: flat triples (file offset, bytes, arena offset), by file offset, neighbours
            merged where they are neighbours on both sides.
        arena_bytes: size of the arena.
        data_bytes: bytes to be read.
    """

    tensors: array[int]
    offsets: array[int]
    segments: array[int]
    arena_bytes: int
    data_bytes: int


def plan_arena(layout: FileLayout, tensors: Iterable[int] | None = None) -> LoadPlan:
    """Place tensors (all when None) one behind another at `ARENA_ALIGNMENT` boundaries."""
    chosen = array("Q", range(len(layout.names)) if tensors is None else sorted(tensors))
    offsets, segments = array("Q"), array("Q")
    place = data_bytes = 0
    file_end = arena_end = -1
    records, data_begin = layout._records, layout.data_begin
    for i in chosen:  # of some 20,000: no call for each
        begin, end = data_begin + records[i * _FIELDS], data_begin + records[i * _FIELDS + 1]
        length = end - begin
        offsets.append(place)
        if length == 0:
            continue
        if begin == file_end and place == arena_end:
            segments[-2] += length
        else:
            segments.extend((begin, length, place))
        file_end, arena_end = end, place + length
        data_bytes += length
        place = -(-arena_end // ARENA_ALIGNMENT) * ARENA_ALIGNMENT
    return LoadPlan(chosen, offsets, segments, max(place, 1), data_bytes)


def plan_rows(layout: FileLayout, i: int, start: int, stop: int) -> tuple[int, int]:
    """Byte range, within tensor i, of rows start..stop of its first dimension.

    The tensor must have at least one dimension of length ``>= stop >= start >= 0``.
    """
    rows = layout.shape(i)[0]
    per_row = layout.nbytes(i) // rows if rows else 0
    return start * per_row, stop * per_row
