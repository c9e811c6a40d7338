"""A file whose tensors are loaded: the common part of loading to the CPU and to a device."""

from __future__ import annotations

import abc
import operator
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from .. import engine, stock, tensors
from ..config import Config, current
from ..errors import Fallback
from ..interrupts import uninterrupted
from ..layout import FileLayout
from ..locks import shared
from ..report import Account
from .prefetcher import Pending
from .remote import is_remote, local_file, open_remote, stand_in

if TYPE_CHECKING:
    import torch

__all__ = [
    "OpenedFile",
    "TensorFile",
    "open_checked",
    "places_in_arena",
    "progress_bar",
]


def open_checked(path: str, config: Config | None = None) -> tuple[engine.File, FileLayout]:
    """Open a file and validate its header.

    Args:
        path: of the file, or a URL.
        config: for a URL; None: the options in force.

    Raises:
        StandInFile: it stands for a remote file.
        Fallback: stock must judge it; not for remote files.
        OSError, MemoryError: it cannot be read; callers leave it to stock, which raises its own,
            unless the file is remote.
        SafetensorError, FaststError, ImportError: as `open_remote`.
    """
    if "://" in path and is_remote(path):
        options = config or current()
        local = local_file(path, options)
        if local is None:
            return open_remote(path, options)
        path = local
    file = engine.open_file(path)
    try:
        layout = engine.read_layout(file)
    except Fallback:
        found = stand_in(file)
        if found is None:
            raise
        raise found from None
    if not tensors.known_to_stock(layout.dtypes):
        raise Fallback("this safetensors lacks a dtype of the file")
    return file, layout


class TensorFile(abc.ABC):
    """Tensors of one file, by number, read by the engine or by stock. Usable from any thread.

    Attributes:
        layout: of the file.
        config: in force when it was opened.
        account: counts of what was moved so far.
        device: where the tensors are.
    """

    device = "cpu"

    def __init__(self, layout: FileLayout, config: Config) -> None:
        self.layout = layout
        self.config = config
        self.account = Account()

    @abc.abstractmethod
    def tensor(self, i: int, *, for_slice: bool = False) -> torch.Tensor:
        """Tensor i, usable at once; ``for_slice``: as stock makes a tensor to slice it.

        Raises:
            Fallback: stock must do it.
            OSError, MemoryError, SafetensorError: its bytes could not be read.
        """

    @abc.abstractmethod
    def ahead(self, numbers: Sequence[int]) -> Pending:
        """Start moving tensors that will be asked for, each as often as its number is given.

        Raises as `tensor`.
        """

    def count(self, made: int, nbytes: int, seconds: float = 0.0) -> None:
        """Add tensors handed out to the account, and the time of a call that took no time of it."""
        account = self.account
        with shared:  # threads share a handle
            account.tensors += made
            account.bytes += nbytes
            account.seconds += seconds


class OpenedFile(TensorFile):
    """A file that the engine reads: state shared by a handle and its slices.

    Holds the descriptor; tensors handed out hold their memory themselves and outlive this
    object.

    Attributes:
        file: open for reading.
        device_argument: how the caller named the device.
        framework: whose tensors they are, as stock takes it.
        mapped: whether tensors are views of the file's map.
        ready: by name, tensors that were made before they are requested; a request takes one out.
    """

    device_argument: object = "cpu"
    framework = "pt"
    mapped = False
    ready: ClassVar[dict[str, Any]] = {}

    def __init__(self, file: engine.File, layout: FileLayout, config: Config) -> None:
        super().__init__(layout, config)
        self.file = file
        if file.feed is not None:
            self.account.take_traffic = file.feed.take_traffic

    @property
    def owned(self) -> bool:
        """Whether each tensor has an allocation of its own from torch, else shared memory.

        ``auto`` does as stock: shared on the CPU, where stock maps the file; owned on a device,
        where only memory of a tensor's own can be shared with other processes and resized, and
        heeds ``record_stream``.
        """
        kind = self.config.tensors
        return kind == "owned" or (kind == "auto" and self.device != "cpu")

    def check(self, i: int | None = None) -> None:
        """Raise Fallback unless tensor i, or every tensor when None, can be made now."""
        tensors.check(self.layout, i)
        if not tensors.ordinary_mode():
            raise Fallback("a torch mode or default device is in force")

    def may_start(self, numbers: Sequence[int]) -> bool:
        """Whether all of some tensors can be made now, so that they may be read ahead together."""
        try:
            self.check()
        except Fallback:  # of another tensor, perhaps
            try:
                for i in numbers:
                    self.check(i)
            except Fallback:
                return False
        return True

    @abc.abstractmethod
    def all_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, in offset order. Raises as `tensor`."""

    @abc.abstractmethod
    def rows(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of tensor i's first dimension, read alone; not for mapped files.

        Raises as `tensor`.
        """

    @abc.abstractmethod
    def rows_ahead(self, wanted: Sequence[tuple[int, int, int]]) -> Pending:
        """Start moving rows that will be asked for. Raises as `tensor`.

        Args:
            wanted: number of the tensor, the first row, and the row behind the last: the items of
                the result.
        """

    @abc.abstractmethod
    def read_into(self, arena: engine.Arena, segments: array[int]) -> engine.Job:
        """Start reading extents into memory where the tensors go; not for mapped files.

        Args:
            arena: the memory.
            segments: flat 64-bit triples (file offset, bytes, arena offset), by file offset.

        Raises:
            Fallback: the device's driver failed.
        """

    def stop(self) -> None:
        """Read nothing ahead any more: the handle is closed. Slices may still read."""

    @abc.abstractmethod
    def note(self, job: engine.Job) -> None:
        """Put into the account how a finished job has read its bytes."""

    def part(self, i: int, index: Any, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The result of stock's slice for an index into tensor i, which needs some of its rows.

        Raises as `tensor`.
        """
        return self.index(self.tensor(i, for_slice=True), index)

    def index(self, whole: torch.Tensor, index: Any) -> torch.Tensor:
        """The result of stock's slice for an index into a tensor, or into some rows of it."""
        result: torch.Tensor = stock.call(operator.getitem, (whole, index), {})
        return result


def places_in_arena(
    places: Sequence[tuple[int, int, Any]],
    address_of: Callable[[Any], int] = operator.methodcaller("data_ptr"),
) -> tuple[engine.Arena, array[int]]:
    """One arena over tensors that exist, and the segments to read into it.

    Args:
        places: (file offset, bytes, tensor), by file offset.
        address_of: finds a tensor's first byte.
    """
    found = [(begin, nbytes, address_of(tensor)) for begin, nbytes, tensor in places if nbytes]
    arena, base = engine.Arena.over([(at, nbytes) for _, nbytes, at in found], places)
    segments = array("Q")
    for begin, nbytes, at in found:
        segments.extend((begin, nbytes, at - base))
    return arena, segments


@contextmanager
def progress_bar(path: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of one load with GB/s; yields a function of the bytes read so far."""
    from tqdm import tqdm

    bar: Any = None

    def advance(done: int) -> None:
        with uninterrupted():
            bar.update(done - bar.n)

    try:
        with uninterrupted():
            bar = tqdm(total=nbytes, unit="B", unit_scale=True, desc=os.path.basename(path))
        yield advance
    finally:
        if bar is not None:
            with uninterrupted():
                bar.close()
