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

On the host, shared units lie in memory that the ranks of a node have in common (`commons`), where
that can be had: parts are read to where they belong, and the flag of a step, which all raise when
they have read, is all the exchange there is. A rank starts to read step s + ahead once all have
raised the flag of s - 2, and so have placed what came in s - 4: ahead + 4 units are in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import device, engine
from ..device import Device
from .channel import Pending
from .groups import Flag, Group, PeerFailed
from .schedule import Key, Unit, part_bytes, segments
from .source import Source
from .spec import Region

if TYPE_CHECKING:
    import torch

__all__ = ["COMMON_UNIT", "Memory", "Step", "Subgroup", "move"]

AHEAD = 2
"""Steps whose reads are under way while one is exchanged."""

COMMON_UNIT, COMMON_AHEAD = 8 << 20, 8
"""The same, and bytes of a unit, in common memory: little at a time, and much under way. 1.5 GB by
4 ranks with O_DIRECT, load alone: 0.60 to 0.65 s; 16 MiB and 4 ahead 0.73 to 0.78, 8 MiB and 2
ahead 0.69 to 0.77, 32 MiB and 2 ahead 0.78 to 0.82."""


class Memory:
    """Where tensors go: a device's memory, or the host's."""

    def __init__(self, target: Device | None) -> None:
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
class Subgroup:
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
    """Buffers of one step: the unit, and the part that this rank reads of it, if that is apart."""

    def __init__(self, unit: torch.Tensor, part: torch.Tensor | None) -> None:
        self.unit = unit
        self.part = part


@dataclasses.dataclass(eq=False)
class _Reading:
    """Reads of a step under way."""

    job: engine.Job
    arena: engine.Arena
    segments: array[int]


def _borrowed(tensor: torch.Tensor, owner: object) -> engine.Arena:
    return engine.Arena.over([(tensor.data_ptr(), tensor.nbytes)], owner)[0]


class Exchange:
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
        circle: Subgroup,
        memory: Memory,
        steps: Sequence[Step],
        *,
        parts: Mapping[Key, Region],
        results: Mapping[Key, torch.Tensor],
    ) -> None:
        self._source = source
        self._circle = circle
        self._memory = memory
        self._steps = steps
        self._of: dict[int, list[tuple[Region, torch.Tensor]]] = {}
        for key, part in parts.items():
            self._of.setdefault(key[0], []).append((part, results[key]))
        self._readings: dict[int, _Reading | None] = {}
        self._slots: list[_Slot] = []
        self._common: list[_Slot] = []  # of shared steps, if all of the circle have them

    @property
    def common_bytes(self) -> int:
        """What `share` takes."""
        largest, count = self._largest_shared
        return largest * count

    @property
    def _largest_shared(self) -> tuple[int, int]:
        """Bytes of the largest shared unit with all of its parts, and how many are in use."""
        readers = max(len(self._circle.readers), 1)
        sizes = [part_bytes(s.unit, readers) * readers for s in self._steps if s.kind == "shared"]
        return max(sizes, default=0), min(COMMON_AHEAD + 4, len(sizes))

    @property
    def in_common(self) -> bool:
        """Whether shared units lie in memory that all of the circle have."""
        return bool(self._common)

    @property
    def ahead(self) -> int:
        """Steps whose reads are under way at a time, besides the one that is waited for."""
        return COMMON_AHEAD if self._common else AHEAD

    def share(self, memory: torch.Tensor) -> None:
        """Take memory that the circle has in common for shared units, instead of `allocate`."""
        size, count = self._largest_shared
        whole = memory[: size * count].view(count, size)
        self._common = [_Slot(unit, None) for unit in whole]

    def allocate(self, *, shared: bool = True) -> None:
        """Get the buffers, of our own; ``shared``: for shared units, too.

        Raises what torch does when memory is short.
        """
        import torch

        kinds = ("alone", "shared") if shared else ("alone",)
        largest = max([s.unit.nbytes for s in self._steps if s.kind in kinds], default=0)
        if not largest:
            return
        size, part = largest, 0
        if shared:
            readers = max(len(self._circle.readers), 1)
            whole, _ = self._largest_shared
            size, part = max(largest, whole), whole // readers
        ahead = AHEAD if shared else COMMON_AHEAD
        self._slots = []
        for _ in range(min(ahead + 2, len(self._steps))):
            unit = self._memory.empty([size], torch.uint8)
            self._slots.append(_Slot(unit, self._memory.empty([part], torch.uint8)))

    def connect(self) -> None:
        """Connect those who will exchange, while all are known to be well. Collective on them.

        Raises:
            RankError: a rank is gone.
        """
        if not self._common and any(step.kind == "shared" for step in self._steps):
            circle = self._circle
            circle.group.channel(circle.ranks, self._slots[0].unit.device.type)

    def _slot(self, number: int) -> _Slot:
        slots = self._slots
        if self._common and self._steps[number].kind == "shared":
            slots = self._common
        return slots[number % len(slots)]

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
        each = part_bytes(unit, len(self._circle.readers))
        if part is None:
            return _borrowed(slot.unit, slot), array("Q")
        found = segments(unit, part * each, (part + 1) * each)
        where = slot.part if slot.part is not None else slot.unit[part * each : (part + 1) * each]
        return _borrowed(where, slot), found

    def _own_places(self, unit: Unit) -> tuple[engine.Arena, array[int]]:
        places, owners = [], []
        for piece in unit.pieces:
            ((part, result),) = self._of[piece.tensor]
            row_bytes = self._source.extents[piece.tensor].row_bytes
            at = result.data_ptr() + (piece.first - part.rows[0]) * row_bytes
            places.append((piece.begin, piece.nbytes, at))
            owners.append(result)
        arena, base = engine.Arena.over([(at, nbytes) for _, nbytes, at in places], owners)
        flat = array("Q")
        for begin, nbytes, at in places:
            flat.extend((begin, nbytes, at - base))
        return arena, flat

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
        if slot.part is None:
            return []
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
    part: Region,
    result: torch.Tensor,
) -> None:
    """Copy from rows first..last of a tensor, as bytes, what a part has of them."""
    if not shape:
        shape, part, result = (1,), Region((1,), ((0, 1, 1),)), result.view(1)
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


def move(mover: Exchange, count: int, group: Group) -> None:
    """Take ``count`` steps, the same number on all ranks. Collective.

    Raises:
        RankError: a rank is gone.
        Elsewhere: another rank failed.
        BaseException: ours, if this rank failed; `Group.agree` tells the others which.
    """
    failure: list[BaseException] = []
    flagged = False

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
                attempt(mover.start, range(step, step + 1 + mover.ahead))
                attempt(mover.read, (step,))
                works = mover.exchange(step)
                flag = group.flag(bool(failure))
                if previous is not None:
                    _arrive(previous[0])
                    if mover.in_common:
                        previous[1].raised()  # waits for the others' parts
                    attempt(mover.place, (step - 1,))
                    if previous[1].raised():
                        flagged = True
                        _arrive(works)
                        flag.raised()
                        break
                previous = works, flag
            else:
                if previous is not None:
                    _arrive(previous[0])
                    flagged = previous[1].raised()
                    attempt(mover.place, (count - 1,))
    finally:
        mover.stop()
    if failure:
        raise failure[0]
    if flagged:
        raise PeerFailed


def _arrive(pending: list[Pending]) -> None:
    for collective in pending:
        collective.wait()
