"""A file that stock safetensors reads, with the interface of a file that the engine reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import engine, stock
from ..config import Config
from ..dropin import slices
from ..dtypes import DTYPE_NAMES
from ..errors import Fallback
from ..files.base import TensorFile
from ..files.prefetcher import Pending
from ..layout import FileLayout, described

if TYPE_CHECKING:
    import torch

__all__ = ["StockFile", "layout_of"]


class StockFile(TensorFile):
    """A file whose tensors stock makes.

    Attributes:
        path: of the file.
        handle: stock's.
    """

    def __init__(
        self,
        path: str,
        layout: FileLayout,
        config: Config,
        device: str,
        fallback: Fallback,
        *,
        file: engine.File | None = None,
    ) -> None:
        """Open it by stock; `file` is the one that is open already."""
        super().__init__(layout, config)
        self.path = path
        self.device = device
        self.account.path = "stock"
        self.account.reason = fallback.reason
        self._fallback = fallback
        found = path if file is None else slices.path_to(file)
        self.handle = slices.stock_handle(stock.safe_open, found, device)

    def tensor(self, i: int, *, for_slice: bool = False) -> torch.Tensor:
        """Tensor i, by stock. Raises stock's exceptions."""
        result: torch.Tensor = self.handle.get_tensor(self.layout.names[i])
        self.count(1, self.layout.nbytes(i))
        return result

    def slice(self, i: int) -> Any:
        """Stock's slice of tensor i."""
        return self.handle.get_slice(self.layout.names[i])

    def ahead(self, numbers: Sequence[int]) -> Pending:
        """Always raises Fallback: stock reads nothing ahead."""
        raise Fallback(self._fallback.reason)


def layout_of(path: str) -> FileLayout:
    """The layout of a file that stock has opened, and whose header therefore is valid.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None)
    found = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return described(
        [
            (name, _kind(entry["dtype"]), entry["shape"], end - begin)
            for name, entry in found
            for begin, end in [entry["data_offsets"]]
        ],
        data_begin=8 + length,
        metadata=metadata,
    )


def _kind(dtype: str) -> int:
    try:
        return DTYPE_NAMES.index(dtype)
    except ValueError:
        raise NotImplementedError(f"dtype {dtype!r} is not known to this version") from None
