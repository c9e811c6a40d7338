"""CPU tensors that are views of a file's map, and reading the file ahead together.

Ranks of one node share the page cache, so nothing is exchanged: every rank maps the file and takes
its shards from there. Each rank reads ahead a share of the bytes that are not cached: rows that it
alone needs, and every n-th stripe of rows that several ranks need.
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
from ..machine import io_threads
from ..runs import Runs
from .requests import Request
from .schedule import Extent, Key, Rows, ranges_of, split
from .source import Source
from .spec import Region

if TYPE_CHECKING:
    import torch

__all__ = ["host_file", "read_ahead", "take_regions"]


def host_file(source: Source) -> HostFile:
    """The opened file of a source whose tensors are views of its map."""
    assert isinstance(source.opened, HostFile)
    return source.opened


# ---- reading ahead ----


def read_ahead(
    source: Source, request: Request, ranks: Sequence[int], turn: int, cold: bool
) -> None:
    """Start reading ahead this rank's share of the rows that a node needs of a file.

    Args:
        source: the file.
        request: of all ranks.
        ranks: of the node.
        turn: this rank's number among them.
        cold: whether some rank found bytes that are not cached. If none did, this rank reads all
            of them, to make sure: that reads nothing where the answer was right.
    """
    opened = host_file(source)
    if len(ranks) == 1 and request.shards is None:
        opened.ahead_of.everything(opened.map())
        return
    needs = [request.needs[rank] for rank in ranks]
    alone, shared = split(source.extents, needs, range(len(ranks)))
    runs = _needed(source.extents, alone, shared)
    opened.keep_to(runs.flat)
    if cold:
        runs = _share(source.extents, alone[turn], shared, turn, len(ranks))
    threads = io_threads(opened.config.threads)
    opened.ahead_of.extents(opened.map(), runs, max(threads // len(ranks), 2))


def _share(
    extents: Sequence[Extent], alone: Sequence[Rows], shared: Sequence[Rows], turn: int, turns: int
) -> Runs:
    """The runs that one of ``turns`` ranks reads ahead, in file order.

    Args:
        extents: of the file's tensors.
        alone: rows that this rank alone needs.
        shared: rows that several ranks need.
        turn: this rank's number among the ranks that share the reading.
        turns: number of these ranks.
    """
    ranges = Runs(ranges_of(extents, alone)).ranges
    for begin, end in Runs(ranges_of(extents, shared)).ranges:
        # Stripes begin at multiples of their size in the file, whichever rank needs which tensor.
        stripe = begin // STRIPE
        while stripe * STRIPE < end:
            if stripe % turns == turn:
                ranges.append((max(begin, stripe * STRIPE), min(end, (stripe + 1) * STRIPE)))
            stripe += 1
    return Runs(sorted(ranges))


def _needed(
    extents: Sequence[Extent], alone: Iterable[Sequence[Rows]], shared: Sequence[Rows]
) -> Runs:
    """The runs that any rank of the node needs of a file, in file order.

    Args:
        extents: of the file's tensors.
        alone: for each rank, rows that it alone needs.
        shared: rows that several ranks need.
    """
    each = (Runs(ranges_of(extents, rows)).ranges for rows in (*alone, shared))
    return Runs(sorted(itertools.chain.from_iterable(each)))


# ---- tensors ----


def take_regions(
    opened: HostFile, extents: Sequence[Extent], regions: Mapping[Key, Region], contiguous: bool
) -> dict[Key, torch.Tensor]:
    """Regions of tensors of a mapped file.

    Complete rows are zero-copy tensors over the map, with storage of exactly their size. Other
    regions are views of the whole tensor.

    Args:
        opened: the file.
        extents: of its tensors.
        regions: by tensor and number.
        contiguous: make views contiguous, with storage of their own.

    Raises:
        Fallback: stock must do it.
        MemoryError, OSError: the map was refused.
        RuntimeError: there is no memory for a copy.
    """
    import torch

    layout = opened.layout
    rows = {key: one for key, one in regions.items() if one.contiguous and not one.empty}
    found = _take_rows(opened, extents, rows)
    others = [key for key, one in regions.items() if key not in rows and not one.empty]
    if others:
        numbers = array("Q", dict.fromkeys(i for i, _ in others))
        made = tensors.import_batch(opened.map(), layout, numbers)
        wholes = dict(zip(numbers, made, strict=True))
    for key, region in regions.items():
        if region.empty:
            _, dtype = tensors.shape_and_dtype(layout, key[0])
            found[key] = torch.empty(region.size, dtype=dtype)
        elif key not in rows:
            # In file order: copies use bytes in the order in which they are read ahead.
            view = wholes[key[0]][region.index]
            if contiguous:
                view = view.clone(memory_format=torch.contiguous_format)
            found[key] = view
    return found


def _take_rows(
    opened: HostFile, extents: Sequence[Extent], regions: dict[Key, Region]
) -> dict[Key, torch.Tensor]:
    """Regions that are complete rows, as tensors over the map made in one call."""
    if not regions:
        return {}
    layout, keys = opened.layout, list(regions)
    if all(region.size == list(region.shape) for region in regions.values()):
        made = tensors.import_batch(opened.map(), layout, array("Q", [i for i, _ in keys]))
        return dict(zip(keys, made, strict=True))
    # The same call, with a layout in which each tensor is one of the regions.
    begins, entries = array("Q"), []
    for i, k in keys:
        region, extent = regions[i, k], extents[i]
        first, last = region.rows
        shape, dtype = region.size, layout.dtype(i)
        if dtype in PACKED:
            shape = header_shape(shape, tensors.shape_and_dtype(layout, i)[1])
        entries.append(("", dtype, shape, (last - first) * extent.row_bytes))
        begins.append(extent.begin + first * extent.row_bytes)
    numbers = array("Q", range(len(keys)))
    made = tensors.import_batch(opened.map(), described(entries), numbers, begins)
    return dict(zip(keys, made, strict=True))
