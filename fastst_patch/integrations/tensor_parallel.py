"""Tensor parallelism: the shards that one rank takes in a load, and shared read-ahead.

transformers cuts the local shard of a DTensor out of a tensor's slice, in threads. If the shard is
a view of the file's map it is made at once instead, as for tensors that are not sharded.

Ranks of one node share the page cache, so each reads ahead a part of what is not cached yet. The
ranks do not communicate: stock's load needs no other rank, and a rank that failed, or that does
something else in the meantime, must not be waited for. Each rank knows from the mesh which rows it
takes itself, and whose turn it is. `readahead_share.in_turn` describes the case of late ranks.

For a device, too, a shard that is one piece of its tensor needs no other rank (`cut_of`). Complete
rows are read from the file (`rows_of`). Of other shards, workers copy the runs of their rows from
the file's map (`Shards.view`), which the ranks of a node read ahead in turn, as above.
"""

from __future__ import annotations

import functools
import logging
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from .. import tensors
from ..config import local_ranks
from ..dropin.slices import leading_rows
from ..dtypes import DTYPE_NAMES
from ..files import readahead_share
from ..files.cpu import HostFile
from ..layout import plan_rows
from ..machine import io_threads
from ..runs import Runs
from .uploads import run_bytes

if TYPE_CHECKING:
    import torch

    from ..files.base import OpenedFile

__all__ = ["Cut", "Shards", "cut_of", "rows_of"]

_log = logging.getLogger("fastst_patch")

ENOUGH = 64 << 20
"""Reading ahead starts when so many bytes are known to be needed, or at the first take."""

RUN = 512
"""Workers gather views with contiguous runs of at least so many bytes. A worker claims each run
under the lock of all workers, which takes 45 ns (docs/design-notes.md, "Thresholds")."""


class Shards:
    """The shards that one load takes of its files. Used by the loading thread only."""

    def __init__(self) -> None:
        self._readings: dict[int, _Reading] = {}
        self._latest: _Reading | None = None
        self._turn: tuple[int, int] | None = None  # set by the first shard
        self._viewed: set[tuple[int, int]] = set()  # file and tensor

    def local(
        self,
        opened: OpenedFile,
        i: int,
        sharding_op: Any,
        *,
        tensor_idx: int | None,
        cast: bool,
        materialize: Callable[[Any], Any],
    ) -> Callable[[], Any] | None:
        """Make this rank's shard of a tensor of a file that stays on the CPU.

        Args:
            opened: the file.
            i: number of the tensor.
            sharding_op: its ``shard_tensor`` cuts the shard.
            tensor_idx: argument of ``shard_tensor``.
            cast: whether a shard is copied to another dtype.
            materialize: does transformers' work on a slice in the calling thread.

        Returns:
            A function that returns the shard; None where transformers' threads make it, or raise
            their own exception.
        """
        if not (_is_mapped(opened) and tensors.ordinary_mode()):
            return None
        if self._turn is None:
            self._turn = _turn_in(sharding_op.device_mesh)
        reading = self._reading(opened)
        try:
            if not cast and _is_view(sharding_op):
                shard = materialize(_Source(opened, i, reading))
                return lambda: self._taken(shard)
            if reading.worth_it:
                outline = _Outline(opened, i, functools.partial(reading.note, i))
                sharding_op.shard_tensor(outline, tensor_idx=tensor_idx, device="meta")
        except Exception:  # transformers cuts the slice itself, and raises what is its own
            _log.debug("a shard is left to transformers", exc_info=True)
        return None

    def whole(self, opened: OpenedFile, i: int) -> None:
        """Note that a tensor will be taken whole, in a load that takes others in shards."""
        if self._turn is not None and _is_mapped(opened):
            self._reading(opened).note(i, ...)

    def view(self, opened: OpenedFile, i: int, mesh: Any, cut: Cut) -> torch.Tensor | None:
        """A shard as a view of the file's map, for workers to upload.

        No two views that this returned share memory, the gaps between their runs included. The
        bytes of the shard are noted for read-ahead, also where transformers' threads make it.

        Args:
            opened: the file.
            i: number of the tensor.
            mesh: of the ranks.
            cut: the shard's place in the tensor.

        Returns:
            None where transformers' threads make it: it is no view, its runs are too short, or a
            copy would keep the view's strides.

        Raises:
            Fallback: this torch or stock lacks the dtype.
            MemoryError, OSError: the map was refused.
        """
        if not (_is_mapped(opened) and tensors.ordinary_mode()):
            return None
        if self._turn is None:
            self._turn = _turn_in(mesh)
        reading = self._reading(opened)
        for index in cut.indices:
            reading.note(i, index)
        if cut.piece is None or (id(opened), i) in self._viewed or not _picks(cut.outline):
            return None
        tensors.check(opened.layout, i)
        # Not by `part`, which counts it as a tensor that the handle returned.
        whole = tensors.import_batch(opened.map(), opened.layout, array("Q", (i,)))[0]
        self._viewed.add((id(opened), i))
        return opened.index(whole, tuple(slice(*bounds) for bounds in cut.piece))

    @property
    def waiting(self) -> bool:
        """Whether `start` has something to do."""
        return any(reading.waiting for reading in self._readings.values())

    def start(self) -> None:
        """Read ahead the bytes that were noted so far."""
        for reading in self._readings.values():
            reading.start()

    def _taken(self, shard: Any) -> Any:
        self.start()
        return shard

    def _reading(self, opened: HostFile) -> _Reading:
        found = self._readings.get(id(opened))
        if found is None:
            assert self._turn is not None
            found = self._readings[id(opened)] = _Reading(opened, *self._turn)
        if self._latest is not None and self._latest is not found:
            self._latest.start(readahead_share.STRIPE)  # a load usually finishes file by file
        self._latest = found
        return found


class _Reading:
    """Reading one file ahead. Keeps the file, so that no other gets its id.

    Attributes:
        worth_it: whether any of it is not cached.
    """

    def __init__(self, opened: HostFile, turn: int, turns: int) -> None:
        self._opened = opened
        self._turn, self._turns = turn, turns
        self._nbytes = 0
        self._alone: set[tuple[int, int]] = set()
        self._shared: set[tuple[int, int]] = set()
        self.worth_it = opened.ahead_of.cold()

    @property
    def waiting(self) -> bool:
        """Whether something was noted and not started."""
        return self._nbytes > 0

    def note(self, i: int, index: Any) -> None:
        """Note that an index into tensor i will be taken."""
        if not self.worth_it:
            return
        layout = self._opened.layout
        begin, end = layout.extent(i)
        shape = layout.shape(i)
        rows = leading_rows(index, shape)
        if rows is None or rows[1] - rows[0] == shape[0]:
            place, ranges = (begin, end), self._shared
        else:  # a row usually belongs to one rank
            first, last = plan_rows(layout, i, rows[0], rows[1])
            place, ranges = (begin + first, begin + last), self._alone
        if place in ranges or place[0] == place[1]:
            return
        ranges.add(place)
        self._nbytes += place[1] - place[0]
        if self._nbytes >= ENOUGH:
            self.start()

    def start(self, fewest: int = 1) -> None:
        """Start reading the noted bytes if there are at least so many."""
        if self._nbytes < fewest:
            return
        alone, shared = Runs(sorted(self._alone)), Runs(sorted(self._shared))
        extents = readahead_share.in_turn(alone.ranges, shared.ranges, self._turn, self._turns)
        _log.debug(
            "%s: rank %d of %d reads %d bytes ahead, of which others may read %d",
            self._opened.file.path, self._turn, self._turns, self._nbytes,
            shared.nbytes,
        )  # fmt: skip
        self._nbytes = 0
        self._alone, self._shared = set(), set()
        threads = io_threads(self._opened.config.threads)
        self._opened.ahead_of.extents(self._opened.map(), extents, max(threads // self._turns, 2))


class _Outline:
    """In place of a slice: reads nothing, and calls a function with each index.

    Attributes:
        given: the last result of an index, without bytes.
    """

    def __init__(self, opened: OpenedFile, i: int, tell: Callable[[Any], None]) -> None:
        self._layout, self._i, self._tell = opened.layout, i, tell
        self.given: torch.Tensor | None = None

    def get_shape(self) -> list[int]:
        """As a slice's."""
        return self._layout.shape(self._i)

    def get_dtype(self) -> str:
        """As a slice's."""
        return DTYPE_NAMES[self._layout.dtype(self._i)]

    def __getitem__(self, index: Any) -> torch.Tensor:
        import torch

        self._tell(index)
        shape, dtype = tensors.shape_and_dtype(self._layout, self._i)
        given: torch.Tensor = torch.empty(shape, dtype=dtype, device="meta")[index]
        self.given = given
        return given


class _Source(_Outline):
    """In place of a slice: returns the same tensors, and leaves read-ahead to a `_Reading`."""

    def __init__(self, opened: HostFile, i: int, reading: _Reading) -> None:
        super().__init__(opened, i, functools.partial(reading.note, i))
        self._opened, self._ahead = opened, not reading.worth_it

    def __getitem__(self, index: Any) -> torch.Tensor:
        self._tell(index)
        with self._opened.account:
            return self._opened.part(self._i, index, ahead=self._ahead)


class Cut(NamedTuple):
    """The part of a tensor that a shard consists of.

    Attributes:
        indices: the indices into the tensor, in the order of use.
        piece: start and stop in each dimension, if the shard is one index with elements; None for
            steps, several pieces, or no elements.
        outline: the shard without bytes, with the strides of a view; None as above.
    """

    indices: list[Any]
    piece: list[tuple[int, int]] | None
    outline: torch.Tensor | None


def cut_of(opened: OpenedFile, i: int, sharding_op: Any, tensor_idx: int | None) -> Cut | None:
    """The part of a tensor that this rank's shard consists of; None where cutting it raises."""
    indices: list[Any] = []
    outline = _Outline(opened, i, indices.append)
    try:
        shard = sharding_op.shard_tensor(outline, tensor_idx=tensor_idx, device="meta")
    except Exception:  # transformers raises it again
        return None
    if len(indices) == 1 and shard is outline.given:
        piece = _piece(indices[0], opened.layout.shape(i))
        if piece is not None:
            return Cut(indices, piece, shard)
    return Cut(indices, None, None)


def _piece(index: Any, shape: list[int]) -> list[tuple[int, int]] | None:
    """Start and stop in each dimension for an index of slices without steps; else None."""
    parts = index if isinstance(index, tuple) else () if index is Ellipsis else (index,)
    if len(parts) > len(shape) or any(type(part) is not slice for part in parts):
        return None
    parts = (*parts, *[slice(None)] * (len(shape) - len(parts)))
    cuts = [part.indices(length) for part, length in zip(parts, shape, strict=True)]
    if any(step != 1 or start >= stop for start, stop, step in cuts):
        return None
    return [(start, stop) for start, stop, _ in cuts]


def rows_of(cut: Cut, shape: list[int]) -> tuple[int, int] | None:
    """The first row and the one behind the last, if a shard is complete rows; else None."""
    if not cut.piece or cut.piece[1:] != [(0, length) for length in shape[1:]]:
        return None
    return cut.piece[0]


def _picks(outline: torch.Tensor | None) -> bool:
    """Whether a view has gaps, and runs that are long enough.

    A view without gaps that is not complete rows is, for example, [1, n] of [1, 2 * n]: ``.to``
    keeps its strides of (2 * n, 1). The copy of a view with gaps has the strides of a new tensor.
    """
    return outline is not None and not outline.is_contiguous() and run_bytes(outline) >= RUN


def _is_mapped(opened: OpenedFile) -> TypeGuard[HostFile]:
    """Whether shards may be views of a file's map; not with ``verify``, when slices compare."""
    return isinstance(opened, HostFile) and opened.mapped and not opened.config.verify


def _is_view(sharding_op: Any) -> bool:
    """Whether a shard is one piece of the tensor, and not several that are copied together."""
    return all(one.is_shard() or not hasattr(one, "dim") for one in sharding_op.placements)


def _turn_in(mesh: Any) -> tuple[int, int]:
    """This rank's turn, and the number of turns, among the mesh's ranks on this node.

    The launcher's environment tells which ranks are on the node; without it all of them are.
    """
    import torch.distributed as dist

    rank, local = dist.get_rank(), local_ranks()
    ranks: list[int] = mesh.mesh.flatten().tolist()
    if local is not None:
        first = rank - local[0]
        ranks = [one for one in ranks if first <= one < first + local[1]]
    return (ranks.index(rank), len(ranks)) if rank in ranks else (0, 1)
