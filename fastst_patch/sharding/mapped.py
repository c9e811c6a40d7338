"""CPU tensors taken from a file's map, and reading it ahead together.

Ranks of one node share the page cache, so nothing is exchanged: every rank maps the file and
takes its parts from there. What is not cached yet each rank reads ahead a share of: rows that it
alone needs, and of those that several need every n-th stripe.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from .. import tensors
from ..dtypes import PACKED, header_shape
from ..files.cpu import HostFile
from ..files.readahead_share import STRIPE
from ..layout import described
from ..runs import Runs
from .schedule import Extent, Key, Rows, ranges_of
from .spec import Region

if TYPE_CHECKING:
    import torch

__all__ = ["share", "take", "take_all", "wanted"]


def share(
    extents: Sequence[Extent], alone: Sequence[Rows], shared: Sequence[Rows], turn: int, turns: int
) -> Runs:
    """What one of ``turns`` ranks reads ahead, in order.

    Args:
        extents: of the file's tensors.
        alone: rows that this rank alone needs.
        shared: rows that several need.
        turn: this rank's number among those that share the reading.
        turns: how many they are.
    """
    ranges = Runs(ranges_of(extents, alone)).ranges
    for begin, end in Runs(ranges_of(extents, shared)).ranges:
        # Stripes lie at multiples of their size in the file, whoever needs which tensor.
        stripe = begin // STRIPE
        while stripe * STRIPE < end:
            if stripe % turns == turn:
                ranges.append((max(begin, stripe * STRIPE), min(end, (stripe + 1) * STRIPE)))
            stripe += 1
    return Runs(sorted(ranges))


def wanted(
    extents: Sequence[Extent], alone: Iterable[Sequence[Rows]], shared: Sequence[Rows]
) -> Runs:
    """What any rank of the node needs of a file, in order.

    Args:
        extents: of the file's tensors.
        alone: rows that one rank alone needs, of each.
        shared: rows that several need.
    """
    each = (Runs(ranges_of(extents, rows)).ranges for rows in (*alone, shared))
    return Runs(sorted(itertools.chain.from_iterable(each)))


def take_all(opened: HostFile) -> list[torch.Tensor]:
    """Every tensor of a mapped file, zero-copy. Raises as `take`."""
    return tensors.import_batch(opened.map(), opened.layout)


def take(
    opened: HostFile, extents: Sequence[Extent], parts: Mapping[Key, Region], contiguous: bool
) -> dict[Key, torch.Tensor]:
    """Parts of tensors of a mapped file.

    Rows that are complete are zero-copy tensors over the map, with storage of exactly their
    size; others are views of such a tensor.

    Args:
        opened: the file.
        extents: of its tensors.
        parts: by tensor and number.
        contiguous: make views contiguous, with storage of their own.

    Raises:
        Fallback: stock must do it.
        MemoryError, OSError: the map was refused.
        RuntimeError: there is no memory for a copy.
    """
    import torch

    layout = opened.layout
    straight = {key: part for key, part in parts.items() if part.contiguous and not part.empty}
    found = _straight(opened, extents, straight)
    copied = [key for key, part in parts.items() if key not in straight and not part.empty]
    if copied:
        numbers = array("Q", dict.fromkeys(i for i, _ in copied))
        made = tensors.import_batch(opened.map(), layout, numbers)
        wholes = dict(zip(numbers, made, strict=True))
    for key, part in parts.items():
        if part.empty:
            _, dtype = tensors.shape_and_dtype(layout, key[0])
            found[key] = torch.empty(part.size, dtype=dtype)
        elif key not in straight:
            # In order of the file, so that what is read ahead is used as it comes.
            view = wholes[key[0]][part.index]
            if contiguous:
                view = view.clone(memory_format=torch.contiguous_format)
            found[key] = view
    return found


def _straight(
    opened: HostFile, extents: Sequence[Extent], parts: dict[Key, Region]
) -> dict[Key, torch.Tensor]:
    """Complete rows, as tensors over the map made in one call."""
    if not parts:
        return {}
    layout, keys = opened.layout, list(parts)
    if all(part.size == list(part.shape) for part in parts.values()):
        made = tensors.import_batch(opened.map(), layout, array("Q", [i for i, _ in keys]))
        return dict(zip(keys, made, strict=True))
    # The same call, with a layout in which each tensor is what is taken of it.
    begins, taken = array("Q"), []
    for i, k in keys:
        part, extent = parts[i, k], extents[i]
        first, last = part.rows
        shape, kind = part.size, layout.dtype(i)
        if kind in PACKED:
            shape = header_shape(shape, tensors.shape_and_dtype(layout, i)[1])
        taken.append(("", kind, shape, (last - first) * extent.row_bytes))
        begins.append(extent.begin + first * extent.row_bytes)
    numbers = array("Q", range(len(keys)))
    made = tensors.import_batch(opened.map(), described(taken), numbers, begins)
    return dict(zip(keys, made, strict=True))
