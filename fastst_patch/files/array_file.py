"""A file whose tensors are loaded as NumPy arrays, or as what a library makes of arrays."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from .. import arrays, engine
from ..config import Config
from ..errors import Fallback
from ..layout import FileLayout
from ..locks import shared
from .base import places_in_arena
from .cpu import HostFile
from .pending import PendingHostRows, PendingHostTensors

__all__ = ["ArrayFile"]


class ArrayFile(HostFile):
    """An open file whose tensors are arrays. Usable from any thread.

    Stock copies a tensor for each request, so that no two arrays share memory. Here the first
    request gets the map's own pages, which are private to the process. Later requests for the
    same tensor, and slices, get copies out of a second map, which nobody writes to.
    """

    def __init__(
        self, file: engine.File, layout: FileLayout, config: Config, maker: arrays.ArrayMaker
    ) -> None:
        super().__init__(file, layout, config)
        self.framework = maker.framework
        self._maker = maker
        self._given = bytearray(len(layout.names))  # by tensor: 1 when its pages are handed out
        self._unwritten: engine.Arena | None = None

    # ---- tensors ----

    def check(self, i: int | None = None) -> None:
        """Raise Fallback unless tensor i, or every tensor when None, can be made now."""
        self._maker.prepare()
        arrays.check(self.layout, i)

    def tensor(self, i: int, *, for_slice: bool = False) -> Any:
        """Array i; raises as for torch."""
        self.check(i)
        if not self.mapped:
            made = [self._read_one(i)]
        elif self._is_untouched([i]):
            self.ahead_of.request(self.map(), i)
            made = self._import(self.map(), array("Q", (i,)))
        else:
            made = [self._copied(i, ...)]
        result = self._maker.finished(made)[0]
        self.count(1, self.layout.nbytes(i))
        return result

    def all_tensors(self) -> dict[str, Any]:
        """Every array by name, in offset order; raises as for torch."""
        layout = self.layout
        self.check()
        if not layout.names:
            return {}
        if not self.mapped:
            made = self._read(range(len(layout.names)))
        elif self._is_untouched(range(len(layout.names))):
            self.ahead_of.everything(self.map())
            made = self._import(self.map())
        else:
            return {name: self.tensor(i) for i, name in enumerate(layout.names)}
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
        self.check(i)
        if self.mapped:
            made = self._copied(i, index, rows, ahead)
        else:
            made = self.index(self._read_one(i), index)
        self.count(1, made.nbytes)
        return self._maker.finished([made])[0]

    def check_index(self, i: int, index: Any) -> None:
        """Raise Fallback where stock must judge an index into tensor i."""
        if arrays.plain_index(index, self.layout.shape(i)) is None:
            raise Fallback("stock judges such an index by rules of its own")

    def index(self, whole: Any, index: Any) -> Any:
        """A copy of what a plain index finds in an array, or in some rows of it."""
        found = whole[arrays.plain_index(index, whole.shape)]
        return arrays.copy(found)

    # ---- inside ----

    def _is_untouched(self, wanted: Sequence[int]) -> bool:
        """Whether nobody has the map's pages of some tensors, which this request then gets."""
        if self._maker.library is not None:
            return True  # a library copies them, or never writes to them
        with shared:  # threads share a handle
            if any(self._given[i] for i in wanted):
                return False
            for i in wanted:
                self._given[i] = self.layout.nbytes(i) > 0
        return True

    def _copied(
        self, i: int, index: Any, rows: tuple[int, int] | None = None, ahead: bool = True
    ) -> Any:
        """A copy of array i, or of a part of it, as it is in the file."""
        if self._unwritten is None:
            self._unwritten = engine.map_arena(self.file)
        arena = self._unwritten
        if ahead:
            self.ahead_of.request(arena, i, rows)
        return self.index(self._import(arena, array("Q", (i,)))[0], index)

    def _import(
        self,
        arena: engine.Arena,
        wanted: array[int] | None = None,
        offsets: array[int] | None = None,
    ) -> list[Any]:
        return arrays.import_batch(arena, self.layout, wanted, offsets)

    def _empty(self, i: int, rows: int | None = None) -> Any:
        return arrays.empty(self.layout, i, rows)

    def _over(self, places: Sequence[tuple[int, int, Any]]) -> tuple[engine.Arena, array[int]]:
        return places_in_arena(places, arrays.address_of)
