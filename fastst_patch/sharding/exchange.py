"""Moving parts of tensors into memory of our own, on the host or a device, with the others.

A file is moved in steps, each of them one of

- *own*: rows that go straight from the file to where they stay,
- *alone*: a unit that this rank alone needs, to be sliced or cast,
- *shared*: a unit of which every reader reads its part; the parts are exchanged.

All ranks take equally many steps, so that after each they can tell one another, by a flag on the
control group, whether one of them failed::

    step       s-1                s                  s+1
    reads      ......[ done ]     ...............[ done ]   started `AHEAD` steps before
    exchange                 [====]             [====]
    slices                        [==]
    flag                     >----|> looked at when the next step's exchange is under way

A rank that fails goes on exchanging, whatever is in its buffers, until all have seen its flag:
at the same step, since all look at the same flags. Nobody waits for a collective that another
has not begun.

Buffers: `AHEAD` + 2 units and as many parts, reused in turn. On a device, torch's work (exchange,
slices, casts) is on a stream of its own, and a buffer is read into again behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import device, engine
from ..device import Target
from .channel import Pending
from .groups import Flag, Group
from .rules import Part
from .schedule import Key, Unit, part_bytes, segments
from .source import Source

if TYPE_CHECKING:
    import torch

__all__ = ["AHEAD", "Circle", "Memory", "Step", "move"]

AHEAD = 2
"""Steps whose reads are under way while one is exchanged."""


class Memory:
    """Where tensors go: a device's memory, or the host's."""

    def __init__(self, target: Target | None) -> None:
        self.target = target

    def empty(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with an allocation of its own.

        Raises:
            torch.OutOfMemoryError, RuntimeError: there is none.
        """
        import torch

        if self.target is None:
            return torch.empty(shape, dtype=dtype)
        return self.target.runtime.empty(shape, dtype, self.target.ordinal)

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """Torch's work goes to another stream than the caller's, and is over behind it."""
        if self.target is None:
            return contextlib.nullcontext()
        return self.target.runtime.beside(self.target.ordinal)


@dataclasses.dataclass(frozen=True)
class Circle:
    """The ranks that exchange a file's units.

    Attributes:
        group: all ranks.
        ranks: those that exchange, ascending.
        readers: those of them that read, ascending.
    """

    group: Group
    ranks: list[int]
    readers: list[int]

    @property
    def part(self) -> int | None:
        """Which part this rank reads; None for none."""
        rank = self.group.rank
        return self.readers.index(rank) if rank in self.readers else None

    def exchange(self, unit: torch.Tensor, part: torch.Tensor) -> list[Pending]:
        """Start putting every reader's part in its place in everybody's unit.

        Returns:
            Handles to wait for.

        Raises:
            RankError: a rank is gone.
        """
        channel = self.group.channel(self.ranks, unit.device.type)
        if len(self.readers) == len(self.ranks) and channel.gathers(unit.device.type):
            return [channel.all_gather(unit, part)]
        pending = []
        for number, reader in enumerate(self.readers):
            place = unit[number * part.numel() : (number + 1) * part.numel()]
            if self.part == number:
                place.copy_(part)
            pending.append(channel.broadcast(place, reader))
        return pending


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a rank.

    Attributes:
        kind: ``own``, ``alone`` or ``shared``.
        unit: what moves.
    """

    kind: str
    unit: Unit


class _Slot:
    """Buffers of one step: the unit, and the part that this rank reads of it."""

    def __init__(self, memory: Memory, unit_bytes: int, part_bytes: int) -> None:
        import torch

        self.unit = memory.empty([unit_bytes], torch.uint8)
        self.part = memory.empty([part_bytes], torch.uint8)


@dataclasses.dataclass(eq=False)
class _Reading:
    """Reads of a step under way."""

    job: engine.Job
    arena: engine.Arena
    segments: array[int]


def _borrowed(tensor: torch.Tensor, owner: object) -> engine.Arena:
    return engine.borrow_arena(tensor.data_ptr(), tensor.nbytes, owner)


class Mover:
    """Moves one file's steps; see the page above.

    Args:
        source: the file.
        circle: who exchanges.
        memory: where to.
        steps: of this rank.
        parts: of this rank, by tensor and number; a tensor whose rows go straight to where they
            stay has one.
        results: where each part stays, of its shape; of its dtype, or the one to cast to.
    """

    def __init__(
        self,
        source: Source,
        circle: Circle,
        memory: Memory,
        steps: Sequence[Step],
        *,
        parts: Mapping[Key, Part],
        results: Mapping[Key, torch.Tensor],
    ) -> None:
        self._source = source
        self._circle = circle
        self._memory = memory
        self._steps = steps
        self._of: dict[int, list[tuple[Part, torch.Tensor]]] = {}
        for key, part in parts.items():
            self._of.setdefault(key[0], []).append((part, results[key]))
        self._readings: dict[int, _Reading | None] = {}
        self._slots: list[_Slot] = []

    def allocate(self) -> None:
        """Get the buffers. Raises what torch does when memory is short."""
        largest = [step.unit.nbytes for step in self._steps if step.kind != "own"]
        if not largest:
            return
        readers = max(len(self._circle.readers), 1)
        shared = [s.unit for s in self._steps if s.kind == "shared"]
        part = max([part_bytes(unit, readers) for unit in shared], default=0)
        size = max(*largest, part * readers)
        count = min(AHEAD + 2, len(self._steps))
        self._slots = [_Slot(self._memory, size, part) for _ in range(count)]

    def connect(self) -> None:
        """Connect those who will exchange, while all are known to be well. Collective on them.

        Raises:
            RankError: a rank is gone.
        """
        if any(step.kind == "shared" for step in self._steps):
            circle = self._circle
            circle.group.channel(circle.ranks, self._slots[0].unit.device.type)

    def _slot(self, number: int) -> _Slot:
        return self._slots[number % len(self._slots)]

    def start(self, number: int) -> None:
        """Start the reads of a step, if it is ours and has any."""
        if number >= len(self._steps) or number in self._readings:
            return
        step = self._steps[number]
        self._readings[number] = None
        where, flat = self._places(number, step)
        if not len(flat):
            return
        opened = self._source.opened
        assert opened is not None  # who cannot see the file has nothing to read
        reading = _Reading(opened.read_into(where, flat), where, flat)
        self._readings[number] = reading

    def _places(self, number: int, step: Step) -> tuple[engine.Arena, array[int]]:
        unit = step.unit
        if step.kind == "own":
            return self._own_places(unit)
        slot = self._slot(number)
        if step.kind == "alone":
            return _borrowed(slot.unit, slot), segments(unit, 0, unit.nbytes)
        part = self._circle.part
        if part is None:
            return _borrowed(slot.part, slot), array("Q")
        each = part_bytes(unit, len(self._circle.readers))
        found = segments(unit, part * each, (part + 1) * each)
        return _borrowed(slot.part, slot), found

    def _own_places(self, unit: Unit) -> tuple[engine.Arena, array[int]]:
        places, owners = [], []
        for piece in unit.pieces:
            ((part, result),) = self._of[piece.tensor]
            row_bytes = self._source.extents[piece.tensor].row_bytes
            at = result.data_ptr() + (piece.first - part.rows[0]) * row_bytes
            places.append((piece.begin, piece.nbytes, at))
            owners.append(result)
        base = min(at for _, _, at in places)
        top = max(at + nbytes for _, nbytes, at in places)
        flat = array("Q")
        for begin, nbytes, at in places:
            flat.extend((begin, nbytes, at - base))
        return engine.borrow_arena(base, top - base, owners), flat

    def read(self, number: int) -> None:
        """Wait for the reads of a step. Raises what reading it did."""
        reading = self._readings.get(number)
        if reading is None:
            return
        opened: Any = self._source.opened
        reading.job.wait()
        opened.note(reading.job)
        target = self._memory.target
        if target is not None:
            sample = device.sample_of(target, reading.segments)
            device.prove(target, reading.arena, opened.file, sample)
        self._readings[number] = None

    def exchange(self, number: int) -> list[Pending]:
        """Start the exchange of a step, if it has one; also in a rank that has failed.

        Raises:
            RankError: a rank is gone.
        """
        if number >= len(self._steps) or self._steps[number].kind != "shared":
            return []
        slot = self._slot(number)
        readers = len(self._circle.readers)
        each = part_bytes(self._steps[number].unit, readers)
        return self._circle.exchange(slot.unit[: each * readers], slot.part[:each])

    def place(self, number: int) -> None:
        """Slice and cast what a step has brought to where it stays."""
        if number >= len(self._steps) or self._steps[number].kind == "own":
            return
        slot, unit = self._slot(number), self._steps[number].unit
        for piece in unit.pieces:
            raw = slot.unit[piece.offset : piece.offset + piece.nbytes]
            shape, dtype = self._source.describe(piece.tensor)
            for part, result in self._of.get(piece.tensor, ()):
                if not part.empty:
                    _place(raw, shape, dtype, (piece.first, piece.last), part=part, result=result)

    def stop(self) -> None:
        """Nothing is in flight afterwards."""
        for reading in self._readings.values():
            if reading is not None:
                reading.job.release()
        self._readings.clear()


def _place(
    raw: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    span: tuple[int, int],
    *,
    part: Part,
    result: torch.Tensor,
) -> None:
    """Copy from rows first..last of a tensor, as bytes, what a part has of them."""
    if not shape:
        shape, part, result = (1,), Part((1,), ((0, 1, 1),)), result.view(1)
    first, last = span
    found = part.within(first, last)
    if found is None:
        return
    rows, index = found
    # Bytes of dtypes that torch can hardly copy are moved as whole numbers of their size.
    carrier = dtype if result.dtype != dtype else _carrier(dtype)
    view = raw.view(carrier).view(last - first, *shape[1:])
    into = result if result.dtype != dtype else result.view(carrier)
    into[rows].copy_(view[index])


def _carrier(dtype: torch.dtype) -> torch.dtype:
    import torch

    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sizes.get(dtype.itemsize, dtype)


def move(mover: Mover, count: int, group: Group) -> None:
    """Take ``count`` steps, the same number on all ranks. Collective.

    Raises:
        RankError: a rank failed or is gone.
        BaseException: ours, if this rank failed; `Group.agree` tells the others which.
    """
    failure: list[BaseException] = []

    def attempt(work: Callable[[int], None], numbers: Iterable[int]) -> None:
        if failure:
            return
        try:
            for number in numbers:
                work(number)
        except BaseException as error:
            failure.append(error)

    previous: tuple[list[Pending], Flag] | None = None
    try:
        with mover._memory.beside():
            for step in range(count):
                attempt(mover.start, range(step, step + 1 + AHEAD))
                attempt(mover.read, (step,))
                works = mover.exchange(step)
                flag = group.flag(bool(failure))
                if previous is not None:
                    _arrive(previous[0])
                    attempt(mover.place, (step - 1,))
                    if previous[1].raised():
                        _arrive(works)
                        flag.raised()
                        break
                previous = works, flag
            else:
                if previous is not None:
                    _arrive(previous[0])
                    previous[1].raised()
                    attempt(mover.place, (count - 1,))
    finally:
        mover.stop()
    if failure:
        raise failure[0]


def _arrive(pending: list[Pending]) -> None:
    for collective in pending:
        collective.wait()
