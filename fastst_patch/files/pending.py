"""Groups of tensors under way, and what hands them out one by one, as often as they are wanted.

To a device a transfer is one job: tensors in an arena of their own, or in an allocation each. Its
memory is that of the stream that was current when it started. Whoever takes a tensor may do so
under another stream, and torch is then told, so that the memory is used again only behind that
stream's work.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .. import device, engine, tensors
from ..errors import FaststError
from ..layout import LoadPlan, plan_rows
from ..stock import SafetensorError

if TYPE_CHECKING:
    import torch

    from .cpu import HostFile
    from .cuda import DeviceFile

__all__ = ["Failing", "PendingHostTensors", "PendingRows", "PendingTensors", "Transfer", "runs_of"]


@dataclasses.dataclass(eq=False)
class Transfer:
    """Tensors under way. The job goes with the last who waits for it.

    Attributes:
        plan: what goes where.
        arena: the memory, or all that lies between the first and the last allocation.
        job: moves the bytes.
        sample: to be read back, in the first load of the process.
        stream: that the memory was allocated on.
        block: what torch knows the arena by; None where tensors have allocations of their own.
        waiting: tensors not handed out yet.
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
    """Tensors under way to a device, each to be taken as often as it was asked for.

    Dropping it cancels the rest.
    """

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
            if more:  # the last gets the tensor itself, which nobody can change before
                result = opened._target.copy(result)
        opened.count(1, opened.layout.nbytes(i))
        return result


class PendingRows:
    """Rows under way to a device, to be taken as they were asked for.

    Dropping it cancels the rest.
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
        """What was asked for, usable on any stream. Raises as `DeviceFile.tensor`."""
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
        except (OSError, SafetensorError, FaststError):  # of rows that nobody has asked for yet?
            if self._alone:
                raise
            del whole
            return opened.rows(*rows)
        opened.count(1, last - first)
        return result


class Run:
    """Rows of one tensor that were asked for, and hang together where they overlap.

    They are read once, into one tensor. The last to ask gets it, where it asked for all of it;
    others get copies.

    Attributes:
        i: number of the tensor.
        start: the first row.
        stop: the one behind the last.
        asked: for what, and how often: (number, first row, row behind the last).
        tensor: all of it; None once the last has it.
    """

    def __init__(self, i: int, start: int, stop: int) -> None:
        self.i, self.start, self.stop = i, start, stop
        self.asked: Counter[tuple[int, int, int]] = Counter()
        self.tensor: torch.Tensor | None = None

    def pop(self, rows: tuple[int, int, int]) -> torch.Tensor:
        """All of it, which is to be `cut`, for one who asked for some rows."""
        whole = self.tensor
        assert whole is not None
        self.asked[rows] -= 1
        if not any(self.asked.values()):
            self.tensor = None
        return whole

    def cut(
        self, rows: tuple[int, int, int], whole: torch.Tensor, target: device.Device
    ) -> torch.Tensor:
        """The rows as a tensor that nobody else has."""
        _, start, stop = rows
        if self.tensor is None and (start, stop) == (self.start, self.stop):
            return whole
        return target.copy(whole[start - self.start : stop - self.start])


def runs_of(wanted: Iterable[tuple[int, int, int]]) -> list[Run]:
    """What to read for rows that were asked for: no byte twice, in the order of the file.

    Args:
        wanted: number of the tensor, the first row, and the row behind the last.
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
    """Tells a file of errors in a ``with`` block whose work is in functions of their own.

    Their frames are over by then, and can be cleared.
    """

    def __init__(self, opened: DeviceFile) -> None:
        self._opened = opened

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._opened.failed(error, trace)


class PendingHostTensors:
    """Tensors under way, each to be taken as often as it was asked for.

    Dropping it cancels what is still to be read.
    """

    def __init__(
        self,
        opened: HostFile,
        waiting: dict[int, torch.Tensor],
        job: engine.Job | None,
        asked: Counter[int],
    ) -> None:
        self._opened = opened
        self._waiting = waiting
        self._alone = len(waiting) == 1
        self._job = job
        self._asked = asked

    def landed(self) -> bool:
        """Whether nothing moves any more; mapped tensors are usable from the start."""
        return self._job is None or self._job.stats().done

    def take(self, i: int) -> torch.Tensor:
        """Tensor i, usable at once. Raises as `HostFile.tensor`."""
        opened, more = self._opened, self._asked[i] > 1
        result = self._waiting[i] if more else self._waiting.pop(i)
        self._asked[i] -= 1
        if self._job is not None and not self._has_landed(opened.layout.extent(i)[1]):
            return opened.tensor(i)  # the error may be that of a tensor nobody has asked for
        opened.count(1, opened.layout.nbytes(i))
        if not more:
            return result
        # As asking twice gives: the same bytes of the map, or memory of its own. The last gets
        # the tensor itself, which nobody can change before.
        if self._job is None:
            return tensors.import_batch(opened.map(), opened.layout, array("Q", (i,)))[0]
        return result.clone()

    def _has_landed(self, end: int) -> bool:
        assert self._job is not None
        try:
            self._job.wait_until(end)
        except (OSError, SafetensorError, FaststError):
            if self._alone:
                raise
            return False
        self._opened.note(self._job)
        return True
