"""One opened file whose tensors go to a device.

==================  =========================================================================
path                what happens
==================  =========================================================================
ring                parallel reads through the page cache into pinned slots, copied from there
ring+direct         the same with O_DIRECT
gds                 cuFile into staging blocks on the device, copied from there; by nvidia-fs or,
                    where that is not loaded, in cuFile's compatibility mode
http, s3, ...       ranges of a remote file into pinned slots, copied from there
==================  =========================================================================

Each tensor has an allocation of its own, exactly as stock's; with ``tensors="dlpack"`` tensors lie
in arenas of torch's memory, at 256-byte boundaries. A tensor is handed out when its own bytes have
landed, a copy such as a slice when the copy has run; it is then usable from any stream. Its memory
is used again only behind the work of the stream that was current when it was asked for.

Device memory: `OpenedFile.all_tensors` takes the tensors' own and no more. A handle that is asked
in the order of the file also holds tensors that it reads ahead, up to the budget.
"""

from __future__ import annotations

import os
import traceback
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import device, engine, tensors
from ..config import Config
from ..errors import Fallback
from ..layout import FileLayout, LoadPlan, plan_arena, plan_rows
from ..machine import NETWORKED, io_threads
from .base import OpenedFile, places_in_arena, progress_bar
from .file_order import FileOrder, groups_of
from .network_ahead import request_order
from .pending import UNREAD, Failing, PendingRows, PendingTensors, Transfer, runs_of
from .prefetcher import Group, Prefetcher
from .readahead import AHEAD
from .remote import ranges

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceFile"]

MIB = 1 << 20
ARENA = 256 * MIB
"""Bytes of one arena, unless a tensor is larger. One tensor that survives keeps its arena."""

BUDGET = 256 * MIB
"""Default of ``device_memory_budget``: bytes read ahead of their use."""

PINNED = 256 * MIB
"""Default of ``pinned_bytes``. Slots are pinned as workers need them: 16 of 4 MiB for 8 workers."""

_PATHS = {"auto": "ring", "buffered": "ring", "direct": "ring+direct", "gds": "gds"}


def bounds_ahead(budget: int | None, *, mapped: bool = False) -> tuple[int, int]:
    """Most bytes that are read ahead of their use, and bytes of a group of them.

    A group has a third: one group is in use, one comes next, and one may wait for a slower thread.

    Args:
        budget: ``device_memory_budget``.
        mapped: whether the tensors are views of a file's map.
    """
    if mapped:  # pages of a cache, not memory of ours: far enough that a drive is never idle
        return 2 * AHEAD, AHEAD // 2
    most = BUDGET if budget is None else budget
    return most, max(min(ARENA, most) // 3, 1)


class DeviceFile(OpenedFile):
    """An open file whose tensors go to a device. Usable from any thread.

    Holds the descriptor and what was read ahead; tensors handed out outlive this object.
    """

    def __init__(
        self, file: engine.File, layout: FileLayout, config: Config, target: device.Device
    ) -> None:
        super().__init__(file, layout, config)
        self.device = target.name
        self.device_argument = target.argument
        self._target = target
        budget, nbytes = bounds_ahead(config.device_memory_budget)
        self._at_once = min(ARENA, budget)  # bytes of a group where all tensors are asked for
        self._mode = self._asked_mode()  # if "auto", the first read decides
        if file.feed is not None:
            self._prefetcher = Prefetcher(request_order(self), lambda: budget)
            self.account.path = file.feed.scheme
            return
        order = FileOrder([(layout, range(len(layout.names)))], nbytes, one_ahead=True)
        self._prefetcher = Prefetcher(order, lambda: budget)
        self.account.path = _PATHS[self._mode]

    # ---- which path ----

    def _asked_mode(self) -> str:
        config = self.config
        if self.file.feed is not None:
            if config.io not in ("auto", "buffered"):
                self.account.reason = f"io={config.io!r} is for local files"
            return "buffered"
        if config.io == "mmap":
            raise Fallback("io='mmap' copies to a device from the map, which is what stock does")
        return "direct" if config.io == "auto" and config.page_cache == "drop" else config.io

    def _auto_mode(self) -> str:
        """What is best for this file and device. May open the device's driver; raises as that."""
        if self.config.page_cache == "keep" or self.file.fs_magic in NETWORKED:
            return "buffered"
        if self._target.memory().shared:
            return "direct-if-cold"
        # To cache a larger file would take more than half of the memory that is left.
        headroom = engine.memory_headroom()
        large = headroom is not None and self.file.size > headroom // 2
        return "direct-if-cold" if large else "buffered"

    # ---- tensors ----

    def tensor(self, i: int, *, for_slice: bool = False) -> torch.Tensor:
        """Tensor i on the device, usable on any stream.

        Raises:
            Fallback: stock must do it.
            OSError, MemoryError, SafetensorError: its bytes could not be read.
        """
        self.check(i)
        with Failing(self):
            result = self._take(i)
        self.count(1, self.layout.nbytes(i))
        return result

    def _take(self, i: int) -> torch.Tensor:
        transfer = self._prefetcher.hand_out(i, self._start_group) or self._start([i])
        return self._arrived(transfer, i, transfer.waiting.pop(i))

    def _start_group(self, group: Group) -> Transfer | None:
        if not self.may_start(group.items):
            return None  # those that can be made are read alone
        try:
            return self._start(group.items)
        except Exception as error:
            if not self._target.runtime.is_out_of_memory(error):
                raise
        return None  # one tensor may still fit

    def _arrived(self, transfer: Transfer, i: int, result: torch.Tensor) -> torch.Tensor:
        end = self.layout.extent(i)[1]
        try:
            self._landed(transfer, end)
            transfer.hand_over(self._target, result)
            return result
        except BaseException as error:
            self._prefetcher.drop()  # other tensors of the transfer are read anew
            if len(transfer.plan.tensors) == 1 or not isinstance(error, UNREAD):
                raise
        alone = self._start([i])
        self._landed(alone, end)
        return alone.waiting[i]

    def all_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, in offset order. Raises as `tensor`."""
        self.check()
        with Failing(self):
            result = self._take_all()
        self.count(len(result), self.layout.data_bytes)
        return result

    def _take_all(self) -> dict[str, torch.Tensor]:
        names = self.layout.names
        transfers: list[Transfer] = []
        made: list[torch.Tensor] = []
        for numbers, _ in groups_of(self.layout, range(len(names)), self._at_once):
            transfers.append(self._start(numbers))
            made += transfers[-1].waiting.values()
        self._finish(transfers)
        return dict(zip(names, made, strict=True))

    def ahead(self, numbers: Sequence[int], *, owned: bool | None = None) -> PendingTensors:
        """Start moving tensors that will be asked for, each as often as its number is given.

        Args:
            numbers: of the tensors.
            owned: whether each has an allocation of its own; None: see `OpenedFile.owned`.

        Raises as `tensor`.
        """
        self.check()
        asked = Counter(numbers)
        with Failing(self):
            return PendingTensors(self, self._start(sorted(asked), owned), asked)

    def rows_ahead(self, wanted: Sequence[tuple[int, int, int]]) -> PendingRows:
        """Start moving rows that will be asked for, each into an allocation of its own.

        Args:
            wanted: number of the tensor, the first row, and the row behind the last. Rows may
                overlap, and may be asked for several times.

        Raises as `tensor`.
        """
        self.check()
        with Failing(self):
            return self._start_rows(wanted)

    def _start_rows(self, wanted: Sequence[tuple[int, int, int]]) -> PendingRows:
        runs, places = runs_of(wanted), []
        for run in runs:
            first, last = plan_rows(self.layout, run.i, run.start, run.stop)
            run.tensor = self._empty(run.i, run.stop - run.start)
            places.append((self.layout.extent(run.i)[0] + first, last - first, run.tensor))
        places.sort(key=lambda place: place[0])
        return PendingRows(self, self._start_places(places), runs)

    def rows(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of tensor i's first dimension, read alone. Raises as `tensor`."""
        self.check(i)
        if self.file.feed is not None and (start, stop) == (0, self.layout.shape(i)[0]):
            return self.tensor(i)  # it may be read ahead
        first, last = plan_rows(self.layout, i, start, stop)
        begin = self.layout.extent(i)[0] + first
        with Failing(self):
            result = self._filled(i, stop - start, begin, last - first)
        self.count(1, last - first)
        return result

    def _filled(self, i: int, rows: int, begin: int, nbytes: int) -> torch.Tensor:
        result = self._empty(i, rows)
        if nbytes:
            arena, segments = places_in_arena([(begin, nbytes, result)])
            job = self.read_into(arena, segments)
            job.wait()
            self.note(job)
            device.prove(self._target, arena, self.file, device.sample_of(self._target, segments))
        return result

    def index(self, whole: torch.Tensor, index: Any) -> torch.Tensor:
        """What stock's slice gives for an index: a tensor with memory of its own."""
        if not _plain(index):
            raise Fallback("an index of tensors or lists")
        result = super().index(whole, index)
        # A view without elements may have an offset in its storage; a copy has none.
        if result.numel() == whole.numel() > 0:
            return result
        with Failing(self):
            return self._target.copy(result)

    def check(self, i: int | None = None) -> None:
        """Raise Fallback unless tensor i, or any, may be moved now."""
        self._target.check()
        super().check(i)

    def failed(self, error: BaseException, trace: Any) -> None:
        """Free the device memory that an error keeps; raise Fallback if there was not enough.

        Stock loads tensor by tensor, which may still fit; if not, the exception is torch's own. So
        it is for remote files, which stock does not load.
        """
        # Users and shells keep tracebacks, which keep frames, which keep the memory.
        traceback.clear_frames(trace)
        out_of_memory = self._target.runtime.is_out_of_memory(error)
        if out_of_memory or not isinstance(error, Exception):  # an interrupt ends the load
            self._prefetcher.drop()
        if out_of_memory and self.file.feed is None:
            raise Fallback(f"not enough memory on {self.device} for arenas") from None

    # ---- moving ----

    def _start(self, numbers: list[int], owned: bool | None = None) -> Transfer:
        """Start reading tensors into one allocation each, or into an arena of their own."""
        if self.owned if owned is None else owned:
            return self._start_owned(numbers)
        plan = plan_arena(self.layout, numbers)
        stream = self._target.stream()
        arena = self._target.runtime.arena(plan.arena_bytes, self._target.ordinal)
        job = self.read_into(arena, plan.segments)
        made = tensors.import_batch(arena, self.layout, plan.tensors, plan.offsets)
        waiting = dict(zip(plan.tensors, made, strict=True))
        sample = device.sample_of(self._target, plan.segments)
        return Transfer(plan, arena, job, sample, stream, arena.keep, waiting)

    def _start_owned(self, numbers: list[int]) -> Transfer:
        layout = self.layout
        made = {i: self._empty(i) for i in numbers}
        places = []
        for i, tensor in made.items():
            begin, end = layout.extent(i)
            places.append((begin, end - begin, tensor))
        transfer = self._start_places(places)
        transfer.plan.tensors.extend(numbers)
        transfer.waiting.update(made)
        return transfer

    def _start_places(self, places: list[tuple[int, int, torch.Tensor]]) -> Transfer:
        """Start reading into tensors allocated just now.

        Args:
            places: (file offset, bytes, tensor), by file offset.
        """
        arena, segments = places_in_arena(places)
        nbytes = sum(segments[1::3])
        plan = LoadPlan(array("Q"), array("Q"), segments, max(nbytes, 1), nbytes)
        job = self.read_into(arena, segments)
        sample = device.sample_of(self._target, segments)
        return Transfer(plan, arena, job, sample, self._target.stream())

    def read_into(self, arena: engine.Arena, segments: array[int]) -> engine.Job:
        """Start reading extents into memory of the device.

        The memory was allocated just now by this thread, or was since used only on the stream on
        which torch would allocate now.

        Raises:
            Fallback: the device's driver failed.
        """
        if self._mode == "auto":
            self._mode = self._auto_mode()
        pinned = PINNED if self.config.pinned_bytes is None else self.config.pinned_bytes
        threads, chunk_bytes = io_threads(self.config.threads), self.config.chunk_bytes
        if self.file.feed is not None:
            threads, chunk_bytes = ranges(self.config)
        return engine.read(
            self.file,
            arena,
            segments,
            threads=threads,
            chunk_bytes=chunk_bytes,
            mode=self._mode,
            drop_cache=self.config.page_cache == "drop" and self.file.feed is None,
            to=self._target.destination(pinned),
        )

    def stop(self) -> None:
        """See `OpenedFile`."""
        if self.file.feed is not None:  # others end with the handle, or with its last slice
            self._prefetcher.drop()

    def _empty(self, i: int, rows: int | None = None) -> torch.Tensor:
        shape, dtype = tensors.shape_and_dtype(self.layout, i, rows)
        return self._target.runtime.empty(shape, dtype, self._target.ordinal)

    def _landed(self, transfer: Transfer, end: int) -> None:
        sample = transfer.sample
        if sample is not None and self._target.wants(sample.nbytes):
            end = max(end, sample.end)  # nothing is handed out before the proof
        transfer.job.wait_until(end)
        self.note(transfer.job)
        device.prove(self._target, transfer.arena, self.file, sample)

    def _finish(self, transfers: list[Transfer]) -> None:
        """Wait for everything, in order, with a progress bar if one is wanted."""
        if not self.config.progress:
            for transfer in transfers:
                transfer.job.wait()
        else:
            done = 0
            with progress_bar(self.file.path, self.layout.data_bytes) as advance:
                for transfer in transfers:

                    def tell(stats: engine.JobStats, before: int = done) -> None:
                        advance(before + stats.bytes_done)

                    transfer.job.wait(tell)
                    done += transfer.plan.data_bytes
        for transfer in transfers:
            self.note(transfer.job)
        samples = [(one.sample.nbytes, one) for one in transfers if one.sample is not None]
        if samples:
            transfer = max(samples, key=lambda pair: pair[0])[1]
            device.prove(self._target, transfer.arena, self.file, transfer.sample)

    def note(self, job: engine.Job) -> None:
        """Note in the account how a finished job got its bytes."""
        stats = job.stats()
        if stats.gds_refused:
            self.account.path = "ring+direct" if stats.bytes_direct else "ring"
            self.account.reason = f"cuFile gave way: {stats.gds_note}"
        elif stats.bytes_gds:
            self.account.path = f"gds ({stats.gds_note})"
        elif stats.bytes_direct:
            self.account.path = "ring+direct"
        if stats.direct_errno:
            self.account.path = "ring"
            self.account.reason = f"O_DIRECT was refused ({os.strerror(stats.direct_errno)})"


def _plain(index: Any) -> bool:
    """Whether an index means the same on the device as on the CPU, where stock takes it."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or type(part) in (slice, int) for part in parts)
