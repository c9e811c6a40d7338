"""A file whose tensors are loaded as NumPy arrays, or as what a library makes of arrays."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import Any

from .. import arrays, engine
from ..config import Config
from ..errors import Fallback
from ..layout import FileLayout
from .base import places_in_arena
from .cpu import HostFile
from .pending import PendingHostRows, PendingHostTensors
from .readahead import WORKERS_FROM

__all__ = ["ArrayFile"]

GROUP = 128
"""Most arrays made at a time, beside the one that is requested."""

IN_VAIN = 10
"""Most arrays that wait to be requested, for each that was. To make one with others takes 0.4 us,
and to make it alone 7 us, where stock's copy of a small tensor takes 2 us."""


class ArrayFile(HostFile):
    """An open file whose tensors are arrays. Usable from any thread.

    Stock copies a tensor for each request, so that no two arrays share memory. Here the first
    request gets the map's own pages, which are private to the process. Later requests for the
    same tensor, and slices, get copies out of a second map, which nobody writes to. This holds
    for libraries that take an array's memory as it is, too: some write into tensors that nobody
    else refers to, as TensorFlow does when a variable is updated.
    """

    def __init__(
        self, file: engine.File, layout: FileLayout, config: Config, maker: arrays.ArrayMaker
    ) -> None:
        super().__init__(file, layout, config)
        self.framework = maker.framework
        self._maker = maker
        self._given: dict[int, object] = {}  # by tensor: who claimed its pages
        self._memory: memoryview | None = None  # the map's
        self._unwritten: memoryview | None = None  # the second map's
        self._built = 0  # arrays over the map
        self._arrays: dict[str, Any] = {}  # that were made with others, and nobody has yet

    # ---- tensors ----

    def check(self, i: int | None = None) -> None:
        """Raise Fallback unless tensor i, or every tensor when None, can be made now."""
        self._maker.prepare()
        arrays.check(self.layout, i)

    def tensor(self, i: int, *, for_slice: bool = False) -> Any:
        """Array i; raises as for torch."""
        found = self._unshared(i)
        result = found if self._maker.library is None else self._maker.finished([found])[0]
        self.count(1, found.nbytes)
        return result

    def all_tensors(self) -> dict[str, Any]:
        """Every array by name, in offset order; raises as for torch."""
        layout = self.layout
        self.check()
        if not layout.names:
            return {}
        every = range(len(layout.names))
        if self.mapped and self._is_better_read():
            made = self._read_aligned()
        elif self.mapped:
            self.ahead_of.everything(self.map())
            claimed = self._claimed(every)
            made = arrays.over(self._mapped_memory(), layout, array("Q", claimed))
            if len(made) < len(every):
                by_number = dict(zip(claimed, made, strict=True))
                made = [by_number[i] if i in by_number else self._unshared(i) for i in every]
        else:
            made = self._read(every)
        result = self._maker.finished(made)
        self.count(len(result), layout.data_bytes)
        return dict(zip(layout.names, result, strict=True))

    def ahead(self, numbers: Sequence[int]) -> PendingHostTensors:
        """Raise Fallback: arrays are made when they are requested."""
        raise Fallback(f"tensors of framework {self.framework!r} are not started ahead")

    def rows_ahead(self, wanted: Sequence[tuple[int, int, int]]) -> PendingHostRows:
        """Raise Fallback, too."""
        raise Fallback(f"tensors of framework {self.framework!r} are not started ahead")

    def part(
        self, i: int, index: Any, rows: tuple[int, int] | None = None, *, ahead: bool = True
    ) -> Any:
        """The result of stock's slice for an index into array i; raises as for torch."""
        started = time.perf_counter()
        entry = self.layout.entry(i)
        _, nbytes, kind, shape = entry
        plain = arrays.plain_index(index, shape)
        if plain is None:
            raise Fallback("stock judges such an index by rules of its own")
        if kind not in arrays.KNOWN_DTYPES:
            self.check(i)
        if self.mapped:
            if ahead and (nbytes >= WORKERS_FROM or not self.ahead_of.calm):
                self.ahead_of.request(self.map(), i, _rows_of(plain, shape) if nbytes else None)
            made = arrays.copy(self._unwritten_memory(), entry, plain)
            counts = 1, made.nbytes
        else:
            made, counts = self._part_read(i, plain, _rows_of(plain, shape) if nbytes else None)
        result = made if self._maker.library is None else self._maker.finished([made])[0]
        self.count(*counts, time.perf_counter() - started)
        return result

    # ---- inside ----

    def _is_better_read(self) -> bool:
        """Whether the whole file is read by workers, to where a library takes tensors as they are.

        In the map most tensors are not aligned for it, and it would copy them in one thread.
        """
        library, nbytes = self._maker.library, self.layout.data_bytes
        if library is None or not library.aligned or self.config.io != "auto":
            return False
        return nbytes >= WORKERS_FROM and 2 * arrays.strays(self.layout) > nbytes

    def _read_aligned(self) -> list[Any]:
        layout = self.layout
        self._require_room(layout.data_bytes)
        made = [self._empty(i) for i in range(len(layout.names))]
        places = [
            (begin, nbytes, one)
            for (begin, nbytes, _, _), one in zip(layout.entries(), made, strict=True)
        ]
        self.account.path = "owned"
        self._run(*self._over(places), layout.data_bytes)
        return made

    def _unshared(self, i: int) -> Any:
        """Array i, which nobody else has. Others that are likely to be next are made, too."""
        if not self.mapped:
            self.check(i)
            return self._read_one(i)
        self._read_ahead(i)
        found = self._arrays.pop(self.layout.names[i], None)
        if found is not None:
            return found
        self.check(i)
        group = [i] if i in self._given or self.config.verify else [i, *self._neighbours(i)]
        claimed = self._claimed(group)
        if not claimed or claimed[0] != i:  # its pages are taken
            return arrays.copy(self._unwritten_memory(), self.layout.entry(i), (...,))
        first, *rest = arrays.over(self._mapped_memory(), self.layout, array("Q", claimed))
        self._built += len(claimed)
        names = [self.layout.names[j] for j in claimed[1:]]
        self._arrays.update(zip(names, rest, strict=True))
        return first

    def _neighbours(self, i: int) -> list[int]:
        """Small arrays behind array i, or before it, to make with it.

        A walk through the file in any order soon finds its arrays made.
        """
        given, waiting = self._given, len(self._arrays)
        wanted = min(IN_VAIN * (self._built - waiting) + 1 - waiting, GROUP)
        found: list[int] = []
        for places in (range(i + 1, len(self.layout.names)), range(i - 1, -1, -1)):
            if len(found) < wanted:
                free = [j for j in places[: wanted - len(found)] if j not in given]
                found += self.layout.lesser(free, WORKERS_FROM, arrays.KNOWN_DTYPES)
        return found

    def _claimed(self, wanted: Sequence[int]) -> Sequence[int]:
        """Those of some tensors whose pages nobody has; from now on the caller has them.

        Takes no lock: to claim is one operation, which neither threads nor a signal handler divide.
        """
        mine, claim = object(), self._given.setdefault
        return [i for i in wanted if claim(i, mine) is mine]

    def _read_ahead(self, i: int) -> None:
        ahead = self.ahead_of
        calm = ahead.calm
        if not calm or self.layout.nbytes(i) >= WORKERS_FROM:
            ahead.request(self.map(), i)
        if self._maker.library is None:  # requests of small arrays need not come here any more
            self.ready = self._arrays if calm else {}  # type: ignore[misc]  # of this file

    def _mapped_memory(self) -> memoryview:
        if self._memory is None:
            self._memory = arrays.memory_of(self.map())
        return self._memory

    def _unwritten_memory(self) -> memoryview:
        if self._unwritten is None:
            self._unwritten = arrays.memory_of(engine.map_arena(self.file))
        return self._unwritten

    def _part_read(
        self, i: int, index: tuple[Any, ...], rows: tuple[int, int] | None
    ) -> tuple[Any, tuple[int, int]]:
        """A part of array i, of which no more than the rows that it needs is read; and counts."""
        if rows is None:
            whole = self._read_one(i)
            counts = 1, whole.nbytes
        else:
            whole = self.rows(i, *rows)  # which counts
            index, counts = (0 if type(index[0]) is int else slice(None), *index[1:]), (0, 0)
        found = whole[index]
        # As it is, where this is all of it; a part would keep the memory of the whole.
        return found if found.size == whole.size else arrays.own_memory(found), counts

    def _import(
        self,
        arena: engine.Arena,
        wanted: array[int] | None = None,
        offsets: array[int] | None = None,
    ) -> list[Any]:
        return arrays.over(arrays.memory_of(arena), self.layout, wanted, offsets)

    def _empty(self, i: int, rows: int | None = None) -> Any:
        return arrays.empty(self.layout, i, rows)

    def _over(self, places: Sequence[tuple[int, int, Any]]) -> tuple[engine.Arena, array[int]]:
        return places_in_arena(places, arrays.address_of)


def _rows_of(index: tuple[Any, ...], shape: Sequence[int]) -> tuple[int, int] | None:
    """First row that a plain index needs, and the row behind the last; None: all of them."""
    first = index[0]
    if type(first) is int:
        return first, first + 1
    if type(first) is not slice:
        return None
    start, stop, _ = first.indices(shape[0])
    return (start, stop) if stop - start < shape[0] else None
