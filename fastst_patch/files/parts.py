"""Parts of a file's tensors, such as some columns, read by a device file before they are used.

A part is described as torch describes a view of the whole tensor: offset, shape and strides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .. import tensors
from .pending import UNREAD, Failing, Transfer

if TYPE_CHECKING:
    import torch

    from ..layout import FileLayout
    from .cuda import DeviceFile

__all__ = ["Item", "Part", "PendingParts", "apart", "extent_of", "itemsize_of", "parts_ahead"]


class Part(NamedTuple):
    """A view of a tensor whose elements lie one behind another. All numbers count elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, view: torch.Tensor) -> Part:
        """The part that a view shows of a tensor that begins with its storage."""
        return cls(int(view.storage_offset()), tuple(view.shape), view.stride())

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements from its first to its last, gaps included."""
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((length - 1) * stride for length, stride in steps)

    @property
    def dense(self) -> bool:
        """Whether there are no gaps. Asked of boxes only."""
        return self.span == self.numel

    @property
    def order(self) -> tuple[int, ...]:
        """Its dimensions as they lie in the file, the outermost first."""
        return _form(self.shape, self.strides)[0]

    def is_box(self) -> bool:
        """Whether it has elements, and none of them twice."""
        return _form(self.shape, self.strides)[1]

    @property
    def run(self) -> int:
        """Elements of each of its contiguous runs."""
        return _form(self.shape, self.strides)[2]

    def starts(self) -> list[int]:
        """Where its contiguous runs begin, behind its offset."""
        starts, inside, run = [0], 1, self.run
        for dim in reversed(self.order):
            length, stride = self.shape[dim], self.strides[dim]
            if inside >= run and length > 1:
                starts = [step * stride + at for step in range(length) for at in starts]
            inside *= length
        return starts

    def sorted_shape(self) -> list[int]:
        """Its lengths in `order`."""
        return [self.shape[dim] for dim in self.order]

    def sorted_view(self, whole: torch.Tensor) -> torch.Tensor:
        """Its view of the whole tensor, with the dimensions in `order`."""
        strides = [self.strides[dim] for dim in self.order]
        return whole.as_strided(self.sorted_shape(), strides, self.offset)

    def shaped(self, memory: torch.Tensor) -> torch.Tensor:
        """A tensor with the dimensions in `order`, in the part's own."""
        order = self.order
        return memory.permute([order.index(dim) for dim in range(len(order))])


@functools.lru_cache(maxsize=1024)
def _form(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], bool, int]:
    """`Part.order`, `Part.is_box` and `Part.run`; the layers of a model have few forms."""
    order = sorted(range(len(shape)), key=lambda dim: (-strides[dim], -shape[dim]))
    inside = [dim for dim in reversed(order) if shape[dim] > 1]
    is_box, reach = 0 not in shape, 1  # reach: of the dimensions inside
    for dim in inside:
        is_box = is_box and strides[dim] >= reach
        reach += (shape[dim] - 1) * strides[dim]
    run = 1
    for dim in inside:
        if strides[dim] != run:
            break
        run *= shape[dim]
    return tuple(order), is_box, run


Item = tuple[int, Part]
"""Number of a tensor in its file, and the part."""


def itemsize_of(layout: FileLayout, i: int) -> int:
    """Bytes of an element of tensor i, as torch counts elements."""
    return tensors.shape_and_dtype(layout, i)[1].itemsize


def extent_of(layout: FileLayout, item: Item) -> tuple[int, int]:
    """File offsets of a part's first byte, and of the byte behind its last."""
    i, part = item
    itemsize = itemsize_of(layout, i)
    begin = layout.extent(i)[0] + part.offset * itemsize
    return begin, begin + part.span * itemsize


def apart(layout: FileLayout, items: Iterable[Item]) -> list[list[Item]]:
    """Items in lists, by file offset; those of one list do not overlap, gaps included."""
    lists: list[list[Item]] = []
    ends: list[int] = []
    for begin, end, item in sorted((*extent_of(layout, item), item) for item in items):
        for at, last in enumerate(ends):
            if last <= begin:
                lists[at].append(item)
                ends[at] = end
                break
        else:
            lists.append([item])
            ends.append(end)
    return lists


class PendingParts:
    """A `Pending` of parts on their way to a device; an item is an `Item`."""

    def __init__(
        self, opened: DeviceFile, transfer: Transfer, made: dict[Item, torch.Tensor]
    ) -> None:
        self._opened = opened
        self._transfer = transfer
        self._made = made
        self._alone = len(made) == 1

    def landed(self) -> bool:
        """Whether nothing moves any more. Never blocks."""
        return self._transfer.job.stats().done

    def take(self, item: Item) -> torch.Tensor:
        """A part, usable on any stream. Raises as `DeviceFile.tensor`."""
        opened, memory = self._opened, self._made.pop(item)
        try:
            with Failing(opened):
                opened._landed(self._transfer, extent_of(opened.layout, item)[1])
                self._transfer.hand_over(opened._target, memory)
        except UNREAD:
            if self._alone:
                raise
            del memory
            return parts_ahead(opened, [item]).take(item)
        return item[1].shaped(memory)


def parts_ahead(opened: DeviceFile, items: Sequence[Item]) -> PendingParts:
    """Start moving parts that will be asked for, once each, into an allocation each.

    Args:
        opened: the file.
        items: boxes that do not overlap, gaps included.

    Raises as `DeviceFile.tensor`.
    """
    opened.check()
    with Failing(opened):
        return _start(opened, items)


def _start(opened: DeviceFile, items: Sequence[Item]) -> PendingParts:
    import torch

    target, made, places = opened._target, {}, []
    for i, part in items:
        dtype = tensors.shape_and_dtype(opened.layout, i)[1]
        memory = target.runtime.empty(part.sorted_shape(), dtype, target.ordinal)
        made[i, part] = memory
        begin = extent_of(opened.layout, (i, part))[0]
        pieces = torch.split(memory.view(-1), part.run)
        for at, piece in zip(part.starts(), pieces, strict=True):
            places.append((begin + at * dtype.itemsize, piece.nbytes, piece))
    places.sort(key=lambda place: place[0])
    return PendingParts(opened, opened._start_places(places), made)
