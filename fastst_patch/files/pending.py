"""Tensors of a file that are on their way, handed out one by one, as often as they are asked for.

One job moves them to a device, into an arena that they share or into an allocation each. The
memory belongs to the stream that was current when the job started. A tensor may be taken under
another stream: torch then records that stream, and uses the memory again only behind its work.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .. import device, engine, tensors
from ..errors import FaststError
from ..layout import LoadPlan, plan_rows
from ..stock import SafetensorError

if TYPE_CHECKING:
    import torch

    from .cpu import HostFile
    from .cuda import DeviceFile

__all__ = [
    "UNREAD",
    "Failing",
    "PendingHostRows",
    "PendingHostTensors",
    "PendingRows",
    "PendingTensors",
    "Transfer",
    "runs_of",
]

_Item = TypeVar("_Item")

UNREAD = (OSError, SafetensorError, FaststError)
"""Errors of a job that may belong to another tensor than the one asked for, which is read alone
then."""


@dataclasses.dataclass(eq=False)
class Transfer:
    """Tensors that one job moves to a device. Dropping it cancels the job.

    Attributes:
        plan: where each byte of the file goes.
        arena: the memory: one block, or everything from the first allocation to the last.
        job: moves the bytes.
        sample: bytes to read back, in the first load of the process.
        stream: address of the stream on which the memory was allocated.
        block: torch's tensor over the arena; None where tensors have allocations of their own.
        waiting: by their numbers, tensors not handed out yet.
    """

    plan: LoadPlan
    arena: engine.Arena
    job: engine.Job
    sample: device.Sample | None
    stream: int
    block: Any = None
    waiting: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def hand_over(self, target: device.Device, tensor: torch.Tensor) -> None:
        """Give a tensor that has landed to the calling thread."""
        target.hand_over(tensor if self.block is None else self.block, self.stream)


class PendingTensors:
    """A `Pending` of tensors on their way to a device."""

    def __init__(self, opened: DeviceFile, transfer: Transfer, asked: Counter[int]) -> None:
        self._opened = opened
        self._transfer = transfer
        self._asked = asked

    def landed(self) -> bool:
        """Whether nothing moves any more. Never blocks."""
        return self._transfer.job.stats().done

    def take(self, i: int) -> torch.Tensor:
        """Tensor i, usable on any stream. Raises as `DeviceFile.tensor`."""
        opened, transfer = self._opened, self._transfer
        with Failing(opened):
            more = self._asked[i] > 1
            result = opened._arrived(
                transfer, i, transfer.waiting[i] if more else transfer.waiting.pop(i)
            )
            self._asked[i] -= 1
            if more:  # the last request gets the tensor itself, which nothing can change before
                result = opened._target.copy(result)
        opened.count(1, opened.layout.nbytes(i))
        return result


class PendingRows:
    """A `Pending` of rows on their way to a device.

    An item is the number of a tensor, the first row, and the row behind the last.
    """

    def __init__(self, opened: DeviceFile, transfer: Transfer, runs: Sequence[Run]) -> None:
        self._opened = opened
        self._transfer = transfer
        self._runs = {rows: run for run in runs for rows in run.asked}
        self._alone = len(self._runs) == 1

    def landed(self) -> bool:
        """Whether nothing moves any more. Never blocks."""
        return self._transfer.job.stats().done

    def take(self, rows: tuple[int, int, int]) -> torch.Tensor:
        """Rows that were asked for, usable on any stream. Raises as `DeviceFile.tensor`."""
        opened = self._opened
        begin = opened.layout.extent(rows[0])[0]
        first, last = plan_rows(opened.layout, *rows)
        run = self._runs[rows]
        whole = run.pop(rows)
        if not run.asked[rows]:
            del self._runs[rows]
        try:
            with Failing(opened):
                opened._landed(self._transfer, begin + last)
                self._transfer.hand_over(opened._target, whole)
                result = run.cut(rows, whole, opened._target)
        except UNREAD:
            if self._alone:
                raise
            del whole
            return opened.rows(*rows)
        opened.count(1, last - first)
        return result


class Run:
    """Overlapping rows of one tensor, which are read once, into one tensor.

    The last request gets this tensor if it asked for all the rows; other requests get copies.

    Attributes:
        i: number of the tensor.
        start: the first row.
        stop: the row behind the last.
        asked: how often each item was asked for; see `PendingRows`.
        tensor: all the rows; None once the last request has taken it.
    """

    def __init__(self, i: int, start: int, stop: int) -> None:
        self.i, self.start, self.stop = i, start, stop
        self.asked: Counter[tuple[int, int, int]] = Counter()
        self.tensor: torch.Tensor | None = None

    def pop(self, rows: tuple[int, int, int]) -> torch.Tensor:
        """Count a request for some rows; all the rows, which `cut` then takes them from."""
        whole = self.tensor
        assert whole is not None
        self.asked[rows] -= 1
        if not any(self.asked.values()):
            self.tensor = None
        return whole

    def cut(
        self, rows: tuple[int, int, int], whole: torch.Tensor, target: device.Device
    ) -> torch.Tensor:
        """The rows as a tensor that no other request gets."""
        _, start, stop = rows
        if self.tensor is None and (start, stop) == (self.start, self.stop):
            return whole
        return target.copy(whole[start - self.start : stop - self.start])


def runs_of(wanted: Iterable[tuple[int, int, int]]) -> list[Run]:
    """Merge rows that were asked for where they overlap, in the order of the file.

    Args:
        wanted: items of a `PendingRows`.
    """
    runs: list[Run] = []
    nothing: dict[tuple[int, int, int], Run] = {}
    for rows in sorted(wanted):
        i, start, stop = rows
        if start == stop:
            run = nothing.setdefault(rows, Run(i, start, stop))
        elif runs and runs[-1].i == i and start < runs[-1].stop:
            run = runs[-1]
        else:
            run = Run(i, start, stop)
            runs.append(run)
        run.stop = max(run.stop, stop)
        run.asked[rows] += 1
    return [*runs, *nothing.values()]


class Failing:
    """Passes errors of a ``with`` block to `DeviceFile.failed`.

    Work that allocates is in functions that the block calls: their frames have ended by then, and
    can be cleared.
    """

    def __init__(self, opened: DeviceFile) -> None:
        self._opened = opened

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._opened.failed(error, trace)


class _PendingHost(Generic[_Item]):
    """A `Pending` on the CPU: views of the file's map, or memory that a job fills.

    Args:
        opened: the file.
        waiting: the tensors by their items.
        job: fills them; None for views of the map.
        reading: reads them ahead, if they are views.
    """

    def __init__(
        self,
        opened: HostFile,
        waiting: dict[_Item, torch.Tensor],
        job: engine.Job | None,
        reading: engine.Job | None,
    ) -> None:
        self._opened = opened
        self._waiting = waiting
        self._alone = len(waiting) == 1
        self._job = job
        self._reading = reading

    def landed(self) -> bool:
        """Whether nothing moves any more; views are usable from the start."""
        return self._job is None or self._job.stats().done

    def stop(self) -> None:
        """End reading views ahead. If this object is dropped that goes on, for those taken."""
        if self._reading is not None:
            self._reading.cancel()


class PendingHostTensors(_PendingHost[int]):
    """A `Pending` of whole tensors.

    Args:
        opened: as of the base class.
        waiting: as of the base class; items are the tensors' numbers.
        job: as of the base class.
        reading: as of the base class.
        asked: how often each was asked for.
    """

    def __init__(
        self,
        opened: HostFile,
        waiting: dict[int, torch.Tensor],
        job: engine.Job | None,
        reading: engine.Job | None,
        asked: Counter[int],
    ) -> None:
        super().__init__(opened, waiting, job, reading)
        self._asked = asked

    def take(self, i: int) -> torch.Tensor:
        """Tensor i, usable at once. Raises as `HostFile.tensor`."""
        opened, more = self._opened, self._asked[i] > 1
        result = self._waiting[i] if more else self._waiting.pop(i)
        self._asked[i] -= 1
        if self._job is not None and not self._has_landed(opened.layout.extent(i)[1]):
            return opened.tensor(i)
        opened.count(1, opened.layout.nbytes(i))
        if not more:
            return result
        # A handle that is asked twice gives two views of the same bytes of the map, or memory of
        # its own. The last request gets the tensor itself, which nothing can change before.
        if self._job is None:
            return tensors.import_batch(opened.map(), opened.layout, array("Q", (i,)))[0]
        return result.clone()

    def _has_landed(self, end: int) -> bool:
        assert self._job is not None
        try:
            self._job.wait_until(end)
        except UNREAD:
            if self._alone:
                raise
            return False
        self._opened.note(self._job)
        return True


class PendingHostRows(_PendingHost[tuple[int, int, int]]):
    """A `Pending` of rows, each taken once; an item is as of `PendingRows`."""

    def take(self, rows: tuple[int, int, int]) -> torch.Tensor:
        """Rows that were asked for, usable at once. Raises as `HostFile.tensor`."""
        opened, result = self._opened, self._waiting.pop(rows)
        if self._job is not None:
            end = opened.layout.extent(rows[0])[0] + plan_rows(opened.layout, *rows)[1]
            try:
                self._job.wait_until(end)
            except UNREAD:
                if self._alone:
                    raise
                return opened.rows(*rows)
            opened.note(self._job)
        opened.count(1, result.nbytes)
        return result
