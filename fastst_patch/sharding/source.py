"""One file of a sharded load, as a rank has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import stock, tensors
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
    _stock: Any = None  # a handle

    @once
    def account(self) -> Account:
        """What was taken of it so far."""
        if self.fallback is not None:
            return Account("stock", reason=self.fallback)
        return Account("exchange") if self.opened is None else self.opened.account

    def ask_stock(self) -> None:
        """Let stock read the file, which it opens now. Raises what stock raises."""
        self._stock = stock.safe_open(self.path, framework="pt", device="cpu")
        in_file_order = getattr(self._stock, "offset_keys", self._stock.keys)
        self.names = tuple(in_file_order())

    def is_told(self, layout: FileLayout) -> None:
        """Take another rank's word for what is in a file that this one cannot see."""
        self._layout = layout
        self.names = layout.names

    @once
    def described(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor, as torch holds it."""
        if self._layout is None:
            return [(tuple(t.shape), t.dtype) for t in map(self.by_stock, range(len(self.names)))]
        found = []
        for i in range(len(self.names)):
            shape, dtype = tensors.shape_and_dtype(self._layout, i)
            found.append((tuple(shape), dtype))
        return found

    def metadata(self) -> Mapping[str, str] | None:
        """The header's free-form metadata, or None."""
        if self.fallback is None:
            return self.layout.metadata
        with stock.safe_open(self.path, "pt") as handle:
            found: Mapping[str, str] | None = handle.metadata()
            return found

    def describe(self, i: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of tensor i, as torch holds it."""
        return self.described[i]

    @once
    def extents(self) -> list[Extent]:
        """Where each tensor lies."""
        layout, found = self.layout, []
        for i, (shape, _) in enumerate(self.described):
            begin, end = layout.extent(i)
            rows = shape[0] if shape else 1
            found.append(Extent(begin, rows, (end - begin) // rows if rows else 0))
        return found

    @property
    def layout(self) -> FileLayout:
        """Of the file; not where stock reads it."""
        assert self._layout is not None
        return self._layout

    @property
    def mapped(self) -> bool:
        """Whether this rank takes its tensors from the file's map."""
        return self.opened is not None and self.opened.mapped

    def by_stock(self, i: int) -> torch.Tensor:
        """Tensor i as stock loads it, to the CPU."""
        if self._stock is None:
            self._stock = stock.safe_open(self.path, framework="pt", device="cpu")
        result: torch.Tensor = self._stock.get_tensor(self.names[i])
        return result

    def close(self) -> None:
        """Let go of the file. Tensors stay."""
        self.opened = self._stock = None
