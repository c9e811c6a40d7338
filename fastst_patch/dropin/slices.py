"""A stock-compatible slice, and stock handles over files that are open here.

As with handles, stock does what might differ from stock, through our descriptor.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import safetensors

from .. import engine, stock
from ..dtypes import DTYPE_NAMES
from ..errors import Fallback
from ..files.array_file import ArrayFile
from ..files.base import OpenedFile
from ..layout import FileLayout
from .eligibility import complain, fell_back, same
from .remote_stock import Judge, filled

if TYPE_CHECKING:
    import torch

__all__ = [
    "FastSlice",
    "TensorMeta",
    "behind",
    "indexed",
    "leading_rows",
    "path_to",
    "repr_as",
    "stock_handle",
    "stock_over",
]


def stock_over(
    opened: OpenedFile, stock_class: Any = stock.safe_open, numbers: Iterable[int] = ()
) -> Any:
    """A stock handle over the file that is open here, whatever its path leads to by now.

    Args:
        opened: the file.
        stock_class: ``safe_open`` or ``_safe_open_handle``.
        numbers: of the tensors that the caller will ask it for. The bytes of a remote file's are
            read now; without any the handle only raises stock's exceptions.
    """
    if opened.file.feed is not None:
        if not numbers:
            return Judge(opened, stock_class)
        with filled(opened, numbers) as path:
            return stock_handle(stock_class, path, opened.device_argument, opened.framework)
    path = path_to(opened.file)
    return stock_handle(stock_class, path, opened.device_argument, opened.framework)


def path_to(file: engine.File) -> str:
    """A path of the file that is open here, whatever its own path leads to by now."""
    link = f"/proc/self/fd/{file.fd}"
    return link if os.path.exists(link) else file.path


def stock_handle(stock_class: Any, path: str, device: object = "cpu", framework: str = "pt") -> Any:
    """A stock handle over a path; `stock_class` is ``safe_open`` or ``_safe_open_handle``."""
    if stock_class is not stock.safe_open_handle:
        return stock_class(path, framework, device)
    with open(path, "rb") as file:
        return stock_class(file, framework, device)


def repr_as(self: object, stock_class: Any) -> str:
    """The text that stock's class shows, with the address of our object."""
    return f"<{stock_class.__module__}.{stock_class.__qualname__} object at {id(self):#x}>"


class FastSlice:
    """Behaves like stock's slice: has a shape and a dtype, and reads when it is indexed.

    Stays valid when its handle is closed.
    """

    __slots__ = ("_i", "_opened")

    def __init__(self, opened: OpenedFile, i: int) -> None:
        self._opened = opened
        self._i = i

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return stock.slice_class()

    def __repr__(self) -> str:
        """Stock's text with the address of this object."""
        return repr_as(self, stock.slice_class())

    def _stock(self) -> Any:
        name = self._opened.layout.names[self._i]
        return stock_over(self._opened, numbers=[self._i]).get_slice(name)

    def __getattr__(self, name: str) -> Any:
        if name in FastSlice.__slots__:  # not set yet: see FastHandle
            raise AttributeError(name)
        return getattr(self._stock(), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise stock's exception: slices cannot be pickled."""
        return self._stock().__reduce_ex__(protocol)

    def get_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Shape of the whole tensor."""
        if args or kwargs:
            return self._stock().get_shape(*args, **kwargs)
        return self._opened.layout.shape(self._i)

    def get_dtype(self, *args: Any, **kwargs: Any) -> Any:
        """Safetensors name of the dtype, such as ``BF16``."""
        if args or kwargs:
            return self._stock().get_dtype(*args, **kwargs)
        return DTYPE_NAMES[self._opened.layout.dtype(self._i)]

    def __getitem__(self, index: Any) -> Any:
        """Index as torch does."""
        opened = self._opened
        try:
            if isinstance(opened, ArrayFile):
                result = opened.part(self._i, index)  # which takes its own time
            else:
                with opened.account:
                    result = indexed(opened, self._i, index)
        except (Fallback, MemoryError) as error:
            fallback = Fallback.alone(error)
        except BaseException as error:
            raise stock.trimmed(error)  # noqa: B904 - the same, with fewer frames
        else:
            return self._verified(result, index) if opened.config.verify else result
        return self._left_to_stock(fallback, index)

    def _verified(self, ours: torch.Tensor, index: Any) -> Any:
        theirs = self._stock()[index]
        if same(ours, theirs):
            return ours
        name = self._opened.layout.names[self._i]
        complain(self._opened.config, self._opened.file.path, f"a slice of {name!r}")
        return theirs

    def _left_to_stock(self, fallback: Fallback, index: Any) -> Any:
        opened = self._opened
        result = self._stock()[index]
        opened.account.reason = fallback.reason
        fell_back(opened.config, "get_slice", opened.file.path, fallback)
        return result


class TensorMeta:
    """Behaves like stock's: what a header says of a tensor."""

    __slots__ = ("_i", "_layout")

    def __init__(self, layout: FileLayout, i: int) -> None:
        self._layout = layout
        self._i = i

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return getattr(safetensors, "TensorMeta", TensorMeta)

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype, such as ``BF16``."""
        return DTYPE_NAMES[self._layout.dtype(self._i)]

    @property
    def shape(self) -> list[int]:
        """Shape of the tensor, as the header has it."""
        return self._layout.shape(self._i)

    @property
    def data_offsets(self) -> tuple[int, int]:
        """Where its bytes begin and end, from the first byte behind the header."""
        begin, end = self._layout.extent(self._i)
        return begin - self._layout.data_begin, end - self._layout.data_begin

    def __repr__(self) -> str:
        """Stock's text."""
        return (
            f'TensorMeta {{ dtype: "{self.dtype}", shape: {self.shape},'
            f" data_offsets: {self.data_offsets} }}"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise stock's exception: it cannot be pickled."""
        raise TypeError(f"cannot pickle '{self.__class__.__module__}.TensorMeta' object")


def indexed(opened: OpenedFile, i: int, index: Any) -> torch.Tensor:
    """What stock's slice of tensor i gives for an index; raises as `OpenedFile.tensor`."""
    shape = opened.layout.shape(i)
    rows = leading_rows(index, shape)
    if rows is None and opened.file.feed is not None:
        rows = _one_row(index, shape)
    if rows is None:
        return opened.part(i, index)
    start, stop, rest = rows
    if not opened.mapped:
        return opened.index(opened.rows(i, start, stop), rest)
    some = (start, stop) if stop - start < shape[0] else None
    return opened.part(i, index, some)


def behind(found: Any) -> tuple[OpenedFile, int] | None:
    """The file and the tensor's number behind a slice of ours; None for other objects."""
    # Not isinstance: our slices claim stock's class. Not a public attribute: stock's has none.
    return (found._opened, found._i) if type(found) is FastSlice else None


def _one_row(index: Any, shape: list[int]) -> tuple[int, int, Any] | None:
    """As `leading_rows`, of an index by a number of an existing row."""
    first = index[0] if isinstance(index, tuple) and index else index
    if type(first) is not int or not shape or not -shape[0] <= first < shape[0]:
        return None
    row = first % shape[0]
    return row, row + 1, (0, *index[1:]) if isinstance(index, tuple) else 0


def leading_rows(index: Any, shape: list[int]) -> tuple[int, int, Any] | None:
    """First row, end of the rows, and the index into these rows, of an index by a leading slice.

    None when the index does not begin with a slice of step 1.
    """
    first = index[0] if isinstance(index, tuple) and index else index
    if not isinstance(first, slice) or not shape:
        return None
    try:
        start, stop, step = first.indices(shape[0])
        if step <= 0 or (first.step is not None and operator.index(first.step) != 1):
            return None
    except (TypeError, ValueError):
        return None
    rest = (slice(None), *index[1:]) if isinstance(index, tuple) else slice(None)
    return start, max(start, stop), rest
