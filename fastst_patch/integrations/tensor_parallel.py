"""Tensor parallelism: a rank's shards in one load of transformers, and reading ahead together.

transformers cuts a DTensor's local shard from the slice of a tensor, in threads. Where that makes
a view of the file's map, the view is made at once instead, as for tensors that are not sharded.

Ranks of one node share the page cache, so each reads ahead a share of the bytes that are not
cached. The ranks do not communicate. Stock's load needs no other rank, so a rank that failed, or
that does something else in the meantime, must not block the others. Each rank knows the rows that
it takes itself, and its turn from the mesh; see `readahead_share.in_turn` for the rest.

A load to a device needs no other rank either where a shard is one box of its tensor (`cut_of`).
Complete rows are read from the file (`rows_of`). Of other boxes, the runs of their rows are copied
from the file's map (`Shards.view`), which ranks of one node read ahead as above.
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

START_BYTES = 64 << 20
"""Bytes noted for reading ahead that start it, if no shard was used before."""

RUN = 512
"""Smallest contiguous run of a view, in bytes, that workers copy. Workers claim each run by itself,
under the lock that they share. A run took 45 ns, whatever its length. One worker over the fake
driver took 22 ms for 32 MiB in runs of 512 bytes, 18 ms in one run, 32 ms in runs of 128 bytes."""


class Shards:
    """The shards that one load takes of its files. Used by the loading thread only."""

    def __init__(self) -> None:
        self._files: dict[int, _FileReadAhead] = {}  # by id of the file
        self._latest: _FileReadAhead | None = None
        self._turn: tuple[int, int] | None = None  # known after the first shard
        self._viewed: set[tuple[int, int]] = set()  # id of the file, and number of the tensor

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
            sharding_op: cuts the shard, by its ``shard_tensor``.
            tensor_idx: argument of ``shard_tensor``.
            cast: whether the shard is copied to another dtype.
            materialize: transformers' function that makes the shard of a slice.

        Returns:
            A function that returns the shard; None where transformers' threads make it, or raise
            their own error.
        """
        if not (_is_mapped(opened) and tensors.ordinary_mode()):
            return None
        if self._turn is None:
            self._turn = _turn_in(sharding_op.device_mesh)
        ahead = self._read_ahead_of(opened)
        try:
            if not cast and _is_view(sharding_op):
                shard = materialize(_MapSlice(opened, i, ahead))
                return lambda: self._use(shard)
            if ahead.cold:
                meta = _MetaSlice(opened, i, functools.partial(ahead.note, i))
                sharding_op.shard_tensor(meta, tensor_idx=tensor_idx, device="meta")
        except Exception:  # transformers cuts the slice itself, and raises its own errors
            _log.debug("a shard is left to transformers", exc_info=True)
        return None

    def whole(self, opened: OpenedFile, i: int) -> None:
        """Note that a whole tensor will be used, if the load takes shards of other tensors."""
        if self._turn is not None and _is_mapped(opened):
            self._read_ahead_of(opened).note(i, ...)

    def view(self, opened: OpenedFile, i: int, mesh: Any, cut: Cut) -> torch.Tensor | None:
        """A shard as a view of the file's map, for workers to copy to a device.

        It shares no memory with other views that this returned, the gaps between its runs
        included. The shard's rows are noted for reading ahead, also where this returns None.

        Args:
            opened: the file.
            i: number of the tensor.
            mesh: of the ranks.
            cut: of the shard.

        Returns:
            None where transformers' threads should make the shard: its runs are short, or its
            copy by ``.to`` has other strides than a new tensor.

        Raises:
            Fallback: this torch or stock lacks the dtype.
            MemoryError, OSError: the map was refused.
        """
        if not (_is_mapped(opened) and tensors.ordinary_mode()):
            return None
        if self._turn is None:
            self._turn = _turn_in(mesh)
        ahead = self._read_ahead_of(opened)
        for index in cut.indices:
            ahead.note(i, index)
        if cut.box is None or (id(opened), i) in self._viewed or not _has_long_runs(cut.meta):
            return None
        tensors.check(opened.layout, i)
        # `opened.part` would count it as a tensor that the handle has given.
        whole = tensors.import_batch(opened.map(), opened.layout, array("Q", (i,)))[0]
        self._viewed.add((id(opened), i))
        return opened.index(whole, tuple(slice(*bounds) for bounds in cut.box))

    @property
    def waiting(self) -> bool:
        """Whether rows were noted that `start` has not started to read."""
        return any(ahead.waiting for ahead in self._files.values())

    def start(self) -> None:
        """Start reading ahead the rows noted so far."""
        for ahead in self._files.values():
            ahead.start()

    def _use(self, shard: Any) -> Any:
        self.start()
        return shard

    def _read_ahead_of(self, opened: HostFile) -> _FileReadAhead:
        found = self._files.get(id(opened))
        if found is None:
            assert self._turn is not None
            found = self._files[id(opened)] = _FileReadAhead(opened, *self._turn)
        if self._latest is not None and self._latest is not found:
            # Loads go file by file: as a rule, no more rows of the file before will be noted.
            self._latest.start(readahead_share.STRIPE)
        self._latest = found
        return found


class _FileReadAhead:
    """Reads one file ahead. Holds the file, so that no other file gets its id.

    Attributes:
        cold: whether any of it is not cached.
    """

    def __init__(self, opened: HostFile, turn: int, turns: int) -> None:
        self._opened = opened
        self._turn, self._turns = turn, turns
        self._nbytes = 0
        self._alone: set[tuple[int, int]] = set()
        self._shared: set[tuple[int, int]] = set()
        self.cold = opened.ahead_of.cold()

    @property
    def waiting(self) -> bool:
        """Whether rows were noted that `start` has not started to read."""
        return self._nbytes > 0

    def note(self, i: int, index: Any) -> None:
        """Note that an index into tensor i will be used."""
        if not self.cold:
            return
        layout = self._opened.layout
        begin, end = layout.extent(i)
        shape = layout.shape(i)
        rows = leading_rows(index, shape)
        if rows is None or rows[1] - rows[0] == shape[0]:
            place, ranges = (begin, end), self._shared
        else:  # as a rule, other ranks take other rows
            first, last = plan_rows(layout, i, rows[0], rows[1])
            place, ranges = (begin + first, begin + last), self._alone
        if place in ranges or place[0] == place[1]:
            return
        ranges.add(place)
        self._nbytes += place[1] - place[0]
        if self._nbytes >= START_BYTES:
            self.start()

    def start(self, fewest: int = 1) -> None:
        """Start reading the noted rows, unless they are fewer bytes than ``fewest``."""
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


class _MetaSlice:
    """A slice of a tensor that returns meta tensors, and calls ``note`` with each index.

    Attributes:
        last: the last tensor returned.
    """

    def __init__(self, opened: OpenedFile, i: int, note: Callable[[Any], None]) -> None:
        self._layout, self._i, self._note = opened.layout, i, note
        self.last: torch.Tensor | None = None

    def get_shape(self) -> list[int]:
        """As of a slice."""
        return self._layout.shape(self._i)

    def get_dtype(self) -> str:
        """As of a slice."""
        return DTYPE_NAMES[self._layout.dtype(self._i)]

    def __getitem__(self, index: Any) -> torch.Tensor:
        import torch

        self._note(index)
        shape, dtype = tensors.shape_and_dtype(self._layout, self._i)
        result: torch.Tensor = torch.empty(shape, dtype=dtype, device="meta")[index]
        self.last = result
        return result


class _MapSlice(_MetaSlice):
    """A slice of a mapped file's tensor that returns its views; `_FileReadAhead` reads ahead."""

    def __init__(self, opened: HostFile, i: int, ahead: _FileReadAhead) -> None:
        super().__init__(opened, i, functools.partial(ahead.note, i))
        self._opened, self._ahead = opened, not ahead.cold

    def __getitem__(self, index: Any) -> torch.Tensor:
        self._note(index)
        with self._opened.account:
            return self._opened.part(self._i, index, ahead=self._ahead)


class Cut(NamedTuple):
    """The part of a tensor that a shard takes.

    Attributes:
        indices: into the tensor, in the order in which they are used.
        box: start and stop in each dimension, where the shard is one index with elements; None
            for steps, several indices, or an empty shard.
        meta: the shard as a meta tensor, with the strides of a view; None where ``box`` is.
    """

    indices: list[Any]
    box: list[tuple[int, int]] | None
    meta: torch.Tensor | None


def cut_of(opened: OpenedFile, i: int, sharding_op: Any, tensor_idx: int | None) -> Cut | None:
    """The part of a tensor that this rank's shard takes; None where cutting it raises."""
    indices: list[Any] = []
    meta = _MetaSlice(opened, i, indices.append)
    try:
        shard = sharding_op.shard_tensor(meta, tensor_idx=tensor_idx, device="meta")
    except Exception:  # transformers then raises it itself
        return None
    if len(indices) == 1 and shard is meta.last:
        box = _box(indices[0], opened.layout.shape(i))
        if box is not None:
            return Cut(indices, box, shard)
    return Cut(indices, None, None)


def _box(index: Any, shape: list[int]) -> list[tuple[int, int]] | None:
    """Start and stop in each dimension of an index of slices without steps; else None."""
    slices = index if isinstance(index, tuple) else () if index is Ellipsis else (index,)
    if len(slices) > len(shape) or any(type(one) is not slice for one in slices):
        return None
    slices = (*slices, *[slice(None)] * (len(shape) - len(slices)))
    cuts = [one.indices(length) for one, length in zip(slices, shape, strict=True)]
    if any(step != 1 or start >= stop for start, stop, step in cuts):
        return None
    return [(start, stop) for start, stop, _ in cuts]


def rows_of(cut: Cut, shape: list[int]) -> tuple[int, int] | None:
    """First row, and the row after the last, where a shard is complete rows; else None."""
    if not cut.box or cut.box[1:] != [(0, length) for length in shape[1:]]:
        return None
    return cut.box[0]


def _has_long_runs(meta: torch.Tensor | None) -> bool:
    """Whether a view has gaps, and runs that are long enough to copy one by one.

    A view without gaps that is not complete rows, such as [1, n] of [1, 2 * n], is left out: its
    copy by ``.to`` keeps the strides (2 * n, 1). The copy of a view with gaps has the strides of a
    new tensor.
    """
    return meta is not None and not meta.is_contiguous() and run_bytes(meta) >= RUN


def _is_mapped(opened: OpenedFile) -> TypeGuard[HostFile]:
    """Whether shards may be views of a file's map. With ``verify``, slices compare themselves."""
    return isinstance(opened, HostFile) and opened.mapped and not opened.config.verify


def _is_view(sharding_op: Any) -> bool:
    """Whether a shard is one box of the tensor, and not several that are copied together."""
    return all(one.is_shard() or not hasattr(one, "dim") for one in sharding_op.placements)


def _turn_in(mesh: Any) -> tuple[int, int]:
    """This rank's number among the mesh's ranks on this node, and how many these are.

    The launcher's environment says which ranks are on this node; without it, all of the mesh are.
    """
    import torch.distributed as dist

    rank, local = dist.get_rank(), local_ranks()
    ranks: list[int] = mesh.mesh.flatten().tolist()
    if local is not None:
        first = rank - local[0]
        ranks = [one for one in ranks if first <= one < first + local[1]]
    return (ranks.index(rank), len(ranks)) if rank in ranks else (0, 1)
