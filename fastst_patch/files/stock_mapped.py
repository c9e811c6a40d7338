"""A file that stock maps and whose tensors stock makes; workers read ahead what is not cached.

For Paddle: its tensors of a file are views of a map already. So only a file that is not cached
gains, and others are left to stock.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from .. import engine, stock
from ..config import Config
from ..errors import Fallback
from ..layout import FileLayout
from .cpu import HostFile
from .pending import PendingHostRows, PendingHostTensors

__all__ = ["AsFast", "ByStock", "StockMappedFile"]


class AsFast(Fallback):
    """Stock is as fast. This is intended, so nothing warns of it."""


class ByStock(NamedTuple):
    """Whose tensors stock makes.

    Attributes:
        framework: as the caller names it.
        device: as the caller names it; stock judges it.
    """

    framework: str
    device: object


class StockMappedFile(HostFile):
    """An open file whose tensors stock makes. Usable from any thread.

    Raises:
        Fallback: there is nothing to read ahead, or stock must judge the call.
    """

    def __init__(
        self, file: engine.File, layout: FileLayout, config: Config, target: ByStock
    ) -> None:
        super().__init__(file, layout, config)
        self.framework = target.framework
        self.device_argument = "cpu" if target.device is None else target.device
        self.device = str(self.device_argument)
        if not self.mapped:
            raise Fallback(f"framework {self.framework!r} maps files, and reads none")
        if not self.ahead_of.cold():
            raise AsFast("the file is cached, and stock maps it")
        try:
            path = f"/proc/self/fd/{file.fd}"  # the file that is open, whatever its name leads to
            self._theirs = stock.safe_open(path, self.framework, self.device_argument)
        except Exception as error:  # the user's own call to stock raises it again
            raise Fallback(f"stock refuses: {error}") from error
        self._tied = False

    def check(self, i: int | None = None) -> None:
        """Do nothing: stock judges each tensor."""

    def tensor(self, i: int, *, for_slice: bool = False) -> Any:
        """Tensor i; raises what stock raises."""
        self.ahead_of.request(self.map(), i)
        result = stock.call(self._theirs.get_tensor, (self.layout.names[i],), {})
        self.count(1, self.layout.nbytes(i))
        return self._tie(result)

    def all_tensors(self) -> dict[str, Any]:
        """Every tensor by name, in offset order; raises what stock raises."""
        self.ahead_of.everything(self.map())
        result: dict[str, Any] = stock.call(self._theirs.get_tensors, (), {})
        self.count(len(result), self.layout.data_bytes)
        for one in result.values():
            self._tie(one)
        return result

    def part(
        self, i: int, index: Any, rows: tuple[int, int] | None = None, *, ahead: bool = True
    ) -> Any:
        """The result of stock's slice for an index into tensor i; raises what stock raises."""
        if ahead:
            self.ahead_of.request(self.map(), i, rows)
        found = stock.call(self._theirs.get_slice, (self.layout.names[i],), {})
        result = stock.call(operator.getitem, (found, index), {})
        self.count(1, getattr(result, "nbytes", 0))
        return self._tie(result)

    def ahead(self, numbers: Sequence[int]) -> PendingHostTensors:
        """Raise Fallback: stock makes tensors when they are requested."""
        raise Fallback(f"tensors of framework {self.framework!r} are not started ahead")

    def rows_ahead(self, wanted: Sequence[tuple[int, int, int]]) -> PendingHostRows:
        """Raise Fallback, too."""
        raise Fallback(f"tensors of framework {self.framework!r} are not started ahead")

    def _tie(self, tensor: Any) -> Any:
        """Keep our map as long as stock's: reading ahead ends with it."""
        if not self._tied:
            storage = getattr(tensor, "_safetensors_storage", None)  # one of all tensors
            if storage is not None:
                self._tied = True
                weakref.finalize(storage, _released, self.map()).atexit = False
        return tensor


def _released(arena: engine.Arena) -> None:
    """Drop a map that was kept as an argument."""
