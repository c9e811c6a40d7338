"""One file of a sharded load, as this rank has it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .. import stock, tensors
from ..dropin.slices import path_to
from ..files.base import OpenedFile
from ..layout import FileLayout
from ..locks import once
from ..report import Account
from .schedule import Extent

if TYPE_CHECKING:
    import torch

__all__ = ["Source"]


@dataclasses.dataclass(eq=False)
class Source:
    """One file of the load, as this rank has it.

    Attributes:
        path: as the caller named it.
        names: of its tensors, in file order.
        readers: ranks that can read it.
        opened: the file; None where this rank cannot see it, or stock reads it.
        fallback: why stock reads it, on all ranks; None when it does not.
    """

    path: str
    names: tuple[str, ...]
    readers: list[int]
    opened: OpenedFile | None
    fallback: str | None
    _layout: FileLayout | None
    _stock_handle: Any = None

    @once
    def account(self) -> Account:
        """Counts of the tensors loaded so far."""
        if self.fallback is not None:
            return Account("stock", reason=self.fallback)
        return Account("exchange") if self.opened is None else self.opened.account

    def open_by_stock(self) -> None:
        """Open the file by stock, which reads it from now on. Raises stock's exceptions."""
        self._stock_handle = stock.safe_open(self.path, framework="pt", device="cpu")
        in_file_order = getattr(self._stock_handle, "offset_keys", self._stock_handle.keys)
        self.names = tuple(in_file_order())

    def set_layout(self, layout: FileLayout) -> None:
        """Set the layout that another rank sent, where this one cannot see the file."""
        self._layout = layout
        self.names = layout.names

    @once
    def described(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor, as torch holds it."""
        if self._layout is None:
            made = map(self.stock_tensor, range(len(self.names)))
            return [(tuple(tensor.shape), tensor.dtype) for tensor in made]
        found = []
        for i in range(len(self.names)):
            shape, dtype = tensors.shape_and_dtype(self._layout, i)
            found.append((tuple(shape), dtype))
        return found

    @once
    def extents(self) -> list[Extent]:
        """Position of each tensor in the file."""
        layout, found = self.layout, []
        for i, (shape, _) in enumerate(self.described):
            begin, end = layout.extent(i)
            rows = shape[0] if shape else 1
            found.append(Extent(begin, rows, (end - begin) // rows if rows else 0))
        return found

    @property
    def layout(self) -> FileLayout:
        """The file's layout; not available where stock reads the file."""
        assert self._layout is not None
        return self._layout

    def stock_tensor(self, i: int) -> torch.Tensor:
        """Tensor i as stock loads it, to the CPU."""
        if self._stock_handle is None:
            path = self.path if self.opened is None else path_to(self.opened.file)
            self._stock_handle = stock.safe_open(path, framework="pt", device="cpu")
        result: torch.Tensor = self._stock_handle.get_tensor(self.names[i])
        return result

    def close(self) -> None:
        """Close the file. Tensors stay valid."""
        self.opened = self._stock_handle = None
