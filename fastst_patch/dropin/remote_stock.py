"""What stock does with a remote file, which it cannot open itself.

It gets a file in memory with the same header. Its exceptions are those for a local file then. Bytes
of tensors are in that file only where they were read into it (`filled`); elsewhere it has a hole,
so nothing that stock makes of it is handed out (`Judge`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from .. import engine, stock
from ..errors import Fallback
from ..files.base import OpenedFile
from ..files.remote import naming, not_by_stock, ranges

__all__ = ["Judge", "filled"]


@contextlib.contextmanager
def _copy_of(opened: OpenedFile) -> Iterator[Any]:
    """A file in memory with the header of a remote one, and no other bytes."""
    header = engine.header_of(opened.layout)
    begin = len(header).to_bytes(8, "little") + header
    with stock.hollow_file(begin, opened.file.size) as copy:
        yield copy


@contextlib.contextmanager
def filled(opened: OpenedFile, numbers: Iterable[int]) -> Iterator[str]:
    """A path at which stock finds a remote file with the bytes of some tensors, read now.

    Args:
        opened: the remote file.
        numbers: of the tensors; of others only the headers are right.

    Raises:
        OSError, MemoryError: they could not be read.
    """
    threads, chunk_bytes = ranges(opened.config)
    with naming(opened.file.path), _copy_of(opened) as copy:
        for i in numbers:
            begin, end = opened.layout.extent(i)
            arena = engine.alloc_arena(max(end - begin, 1))
            job = engine.read(
                opened.file,
                arena,
                array("Q", (begin, end - begin, 0)),
                threads=threads,
                chunk_bytes=chunk_bytes,
                mode="buffered",
                drop_cache=False,
            )
            job.wait()
            view = memoryview((ctypes.c_char * (end - begin)).from_address(arena.address)).cast("B")
            while len(view):
                done = os.pwrite(copy.fileno(), view, begin)
                view, begin = view[done:], begin + done
        yield copy.name


class Judge:
    """A handle of stock over a remote file's header: it raises stock's exceptions, and no more.

    Args:
        opened: the remote file.
        stock_class: ``safe_open`` or ``_safe_open_handle``.
    """

    def __init__(self, opened: OpenedFile, stock_class: Any) -> None:
        self._name = opened.file.path
        with _copy_of(opened) as copy:
            if stock_class is stock.safe_open_handle:
                with open(copy.name, "rb") as file:
                    self._handle = stock_class(file, opened.framework, "cpu")
            else:
                self._handle = stock_class(copy.name, opened.framework, "cpu")

    def __getattr__(self, method: str) -> Any:
        found = getattr(self._handle, method)  # raises stock's own AttributeError

        def asked(*args: Any, **kwargs: Any) -> Any:
            stock.call(found, args, kwargs)
            raise not_by_stock(self._name, Fallback(f"{method} with these arguments is stock's"))

        return asked

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._handle.__reduce_ex__(protocol)

    def __enter__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handle.__enter__(*args, **kwargs)
