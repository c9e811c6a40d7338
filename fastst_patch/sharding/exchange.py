"""Reading parts of tensors into memory of our own, host or device, and exchanging them.

A rank moves a file in steps. Each is of one kind:

- *own*: rows that are read straight into a result of this rank,
- *alone*: a unit that only this rank needs, to be sliced or cast,
- *shared*: a unit of which every reader reads one part; the parts are exchanged.

All ranks take the same number of steps. After each, they exchange a flag on the control channel
that says whether one of them failed::

    step       s-1                s                  s+1
    reads      ......[ done ]     ...............[ done ]   started `AHEAD` steps before
    exchange                 [====]             [====]
    slices                        [==]
    flag                     >----|> looked at when the next step's exchange is in progress

A rank that fails continues to exchange, whatever its buffers hold, until all ranks have seen its
flag. All stop at the same step, because all look at the same flags, and no rank waits for a
collective that another does not start.

Buffers: `AHEAD` + 2 units and as many parts, used in turn. On a device, torch's work (exchange,
slices, casts) runs on a separate stream, and reads into a buffer wait for it.

On the host, shared units lie in the `SharedBuffer` of the node, where it has one. Every rank reads
its part to its final place, and the flag of a step, which each rank sends after reading, is the
whole exchange. A rank starts to read step s + ahead once all ranks have sent the flag of step
s - 2, and so have copied the results of step s - 4: ahead + 4 units are in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import device, engine
from ..device import Device
from .channel import Pending
from .groups import Flag, Group, PeerFailed
from .requests import Request, result_dtype
from .schedule import Key, Rows, Unit, pack, part_bytes, segments, split
from .source import Source
from .spec import Region

if TYPE_CHECKING:
    import torch

__all__ = ["SHARED_BUFFER_UNIT", "Exchange", "Memory", "Step", "Subgroup", "plan_steps"]

AHEAD = 2
"""Steps whose reads are in progress while one is exchanged."""

SHARED_BUFFER_UNIT, SHARED_BUFFER_AHEAD = 8 << 20, 8
"""Bytes of a unit, and `AHEAD`, in a shared buffer: small units, and many of them in progress.
1.5 GB by 4 ranks with O_DIRECT, load alone: 0.60 to 0.65 s; 16 MiB and 4 ahead 0.73 to 0.78, 8 MiB
and 2 ahead 0.69 to 0.77, 32 MiB and 2 ahead 0.78 to 0.82."""


class Memory:
    """Where tensors go: a device's memory, or the host's."""

    def __init__(self, target: Device | None) -> None:
        self.target = target

    def empty(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with an allocation of its own.

        Raises:
            torch.OutOfMemoryError, RuntimeError: there is no memory.
        """
        import torch

        if self.target is None:
            return torch.empty(shape, dtype=dtype)
        return self.target.runtime.empty(shape, dtype, self.target.ordinal)

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """Torch's work in the block runs on another stream, and is over when the block ends."""
        if self.target is None:
            return contextlib.nullcontext()
        return self.target.runtime.beside(self.target.ordinal)


@dataclasses.dataclass(frozen=True)
class Subgroup:
    """The ranks that exchange a file's units.

    Attributes:
        group: all ranks.
        ranks: the ranks that exchange, ascending.
        readers: of these, the ranks that read, ascending.
    """

    group: Group
    ranks: list[int]
    readers: list[int]

    @classmethod
    def of(cls, source: Source, group: Group, read_once: str) -> Subgroup:
        """The ranks of this node; all ranks for ``job``, or where a node cannot see the file."""
        nodes = {group.nodes[rank] for rank in source.readers}
        all_ranks = read_once == "job" or len(nodes) < len(set(group.nodes))
        ranks = list(range(group.size)) if all_ranks else group.node_ranks
        return cls(group, ranks, [rank for rank in source.readers if rank in ranks])

    @property
    def part(self) -> int | None:
        """Number of the part of each unit that this rank reads; None for none."""
        rank = self.group.rank
        return self.readers.index(rank) if rank in self.readers else None

    def exchange(self, unit: torch.Tensor, part: torch.Tensor) -> list[Pending]:
        """Start copying every reader's part to its place in the unit of all ranks.

        Returns:
            Collectives to wait for.

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
        unit: of rows to move.
    """

    kind: str
    unit: Unit


def plan_steps(
    source: Source, subgroup: Subgroup, request: Request, regions: Mapping[Key, Region], size: int
) -> tuple[list[Step], bool]:
    """This rank's steps, in order. The shared ones are the same on all ranks of the subgroup.

    Args:
        source: the file.
        subgroup: the ranks that exchange it.
        request: of all ranks.
        regions: that this rank takes.
        size: of a unit, in bytes; the same on all ranks.

    Returns:
        The steps, and whether no rank of the subgroup needs some of the file.
    """
    readers = [subgroup.ranks.index(rank) for rank in subgroup.readers]
    needs = [request.needs[rank] for rank in subgroup.ranks]
    alone, shared = split(source.extents, needs, readers, request.numbers)
    own: list[Rows] = []
    rest: list[Rows] = []
    for row in alone[subgroup.ranks.index(subgroup.group.rank)]:
        dtype = source.described[row[0]][1]
        single = (row[0], 1) not in regions and regions[row[0], 0].contiguous
        straight = single and result_dtype(dtype, request.dtype) == dtype
        (own if straight else rest).append(row)
    steps = [
        *(Step("shared", unit) for unit in pack(source.extents, shared, size)),
        *(Step("own", unit) for unit in pack(source.extents, own, size)),
        *(Step("alone", unit) for unit in pack(source.extents, rest, size)),
    ]
    if request.numbers is not None:
        return steps, False  # the next request may be for a tensor that this one leaves out
    rows = itertools.chain(shared, *alone)
    needed = sum((last - first) * source.extents[i].row_bytes for i, first, last in rows)
    return steps, needed < source.layout.data_bytes


class _Slot:
    """Buffers of one step: the unit, and this rank's part of it where that is separate."""

    def __init__(self, unit: torch.Tensor, part: torch.Tensor | None) -> None:
        self.unit = unit
        self.part = part


@dataclasses.dataclass(eq=False)
class _Reads:
    """Reads of a step in progress."""

    job: engine.Job
    arena: engine.Arena
    segments: array[int]


def _borrowed(tensor: torch.Tensor, owner: object) -> engine.Arena:
    return engine.Arena.over([(tensor.data_ptr(), tensor.nbytes)], owner)[0]


class Exchange:
    """Moves one file's steps; the module's docstring describes how.

    Args:
        source: the file.
        subgroup: the ranks that exchange it.
        memory: where tensors go.
        steps: of this rank.
        regions: that this rank takes, by tensor and number; one for a tensor of an *own* step.
        results: where each region goes, of its shape; of its dtype, or the one to cast to.
    """

    def __init__(
        self,
        source: Source,
        subgroup: Subgroup,
        memory: Memory,
        steps: Sequence[Step],
        *,
        regions: Mapping[Key, Region],
        results: Mapping[Key, torch.Tensor],
    ) -> None:
        self._source = source
        self._subgroup = subgroup
        self._memory = memory
        self._steps = steps
        self._results: dict[int, list[tuple[Region, torch.Tensor]]] = {}
        for key, region in regions.items():
            self._results.setdefault(key[0], []).append((region, results[key]))
        self._reads: dict[int, _Reads | None] = {}
        self._slots: list[_Slot] = []
        self._shared_slots: list[_Slot] = []  # of shared steps, in a shared buffer

    # ---- buffers ----

    @property
    def shared_buffer_bytes(self) -> int:
        """Bytes that `use_shared_buffer` needs."""
        largest, count = self._largest_shared
        return largest * count

    @property
    def _largest_shared(self) -> tuple[int, int]:
        """Bytes of the largest shared unit with all of its parts, and number of units in use."""
        readers = max(len(self._subgroup.readers), 1)
        sizes = [part_bytes(s.unit, readers) * readers for s in self._steps if s.kind == "shared"]
        return max(sizes, default=0), min(SHARED_BUFFER_AHEAD + 4, len(sizes))

    def use_shared_buffer(self, memory: torch.Tensor) -> None:
        """Put shared units into memory that all ranks of the subgroup have mapped."""
        size, count = self._largest_shared
        whole = memory[: size * count].view(count, size)
        self._shared_slots = [_Slot(unit, None) for unit in whole]

    def allocate(self, *, shared: bool = True) -> None:
        """Allocate buffers of this rank's own; ``shared``: for shared units, too.

        Raises torch's error when memory is short.
        """
        import torch

        kinds = ("alone", "shared") if shared else ("alone",)
        largest = max([s.unit.nbytes for s in self._steps if s.kind in kinds], default=0)
        if not largest:
            return
        size, part = largest, 0
        if shared:
            readers = max(len(self._subgroup.readers), 1)
            whole, _ = self._largest_shared
            size, part = max(largest, whole), whole // readers
        ahead = AHEAD if shared else SHARED_BUFFER_AHEAD
        self._slots = []
        for _ in range(min(ahead + 2, len(self._steps))):
            unit = self._memory.empty([size], torch.uint8)
            self._slots.append(_Slot(unit, self._memory.empty([part], torch.uint8)))

    def _slot(self, number: int) -> _Slot:
        slots = self._slots
        if self._shared_slots and self._steps[number].kind == "shared":
            slots = self._shared_slots
        return slots[number % len(slots)]

    # ---- all steps ----

    def connect(self) -> None:
        """Connect the subgroup before any rank can fail in a step. Collective on the subgroup.

        Raises:
            RankError: a rank is gone.
        """
        if not self._shared_slots and any(step.kind == "shared" for step in self._steps):
            subgroup = self._subgroup
            subgroup.group.channel(subgroup.ranks, self._slots[0].unit.device.type)

    def run(self, count: int) -> None:
        """Take ``count`` steps, the same number on all ranks. Collective.

        Raises:
            RankError: a rank is gone.
            PeerFailed: another rank failed.
            BaseException: this rank failed; `Group.agree` must send the error to the others.
        """
        group = self._subgroup.group
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

        ahead = SHARED_BUFFER_AHEAD if self._shared_slots else AHEAD
        previous: tuple[list[Pending], Flag] | None = None
        try:
            with self._memory.beside():
                for step in range(count):
                    attempt(self._start_reads, range(step, step + 1 + ahead))
                    attempt(self._finish_reads, (step,))
                    collectives = self._start_exchange(step)
                    flag = group.flag(bool(failure))
                    if previous is not None:
                        _wait(previous[0])
                        if self._shared_slots:
                            previous[1].raised()  # until then, other ranks read their parts
                        attempt(self._place_results, (step - 1,))
                        if previous[1].raised():
                            flagged = True
                            _wait(collectives)
                            flag.raised()
                            break
                    previous = collectives, flag
                else:
                    if previous is not None:
                        _wait(previous[0])
                        flagged = previous[1].raised()
                        attempt(self._place_results, (count - 1,))
        finally:
            self._stop()
        if failure:
            raise failure[0]
        if flagged:
            raise PeerFailed

    # ---- one step ----

    def _start_reads(self, number: int) -> None:
        """Start the reads of a step, if this rank has it and reads in it."""
        if number >= len(self._steps) or number in self._reads:
            return
        step = self._steps[number]
        self._reads[number] = None
        arena, flat = self._destinations(number, step)
        if not len(flat):
            return
        opened = self._source.opened
        assert opened is not None  # a rank that cannot see the file has nothing to read
        self._reads[number] = _Reads(opened.read_into(arena, flat), arena, flat)

    def _destinations(self, number: int, step: Step) -> tuple[engine.Arena, array[int]]:
        """Memory that a step reads into, and file segments with their offsets in it."""
        unit = step.unit
        if step.kind == "own":
            return self._own_destinations(unit)
        slot = self._slot(number)
        if step.kind == "alone":
            return _borrowed(slot.unit, slot), segments(unit, 0, unit.nbytes)
        part = self._subgroup.part
        each = part_bytes(unit, len(self._subgroup.readers))
        if part is None:
            return _borrowed(slot.unit, slot), array("Q")
        found = segments(unit, part * each, (part + 1) * each)
        where = slot.part if slot.part is not None else slot.unit[part * each : (part + 1) * each]
        return _borrowed(where, slot), found

    def _own_destinations(self, unit: Unit) -> tuple[engine.Arena, array[int]]:
        reads, owners = [], []
        for piece in unit.pieces:
            ((region, result),) = self._results[piece.tensor]
            row_bytes = self._source.extents[piece.tensor].row_bytes
            address = result.data_ptr() + (piece.first - region.rows[0]) * row_bytes
            reads.append((piece.begin, piece.nbytes, address))
            owners.append(result)
        arena, base = engine.Arena.over([(address, nbytes) for _, nbytes, address in reads], owners)
        flat = array("Q")
        for begin, nbytes, address in reads:
            flat.extend((begin, nbytes, address - base))
        return arena, flat

    def _finish_reads(self, number: int) -> None:
        """Wait for the reads of a step. Raises their error."""
        reads = self._reads.get(number)
        if reads is None:
            return
        opened: Any = self._source.opened
        reads.job.wait()
        opened.note(reads.job)
        target = self._memory.target
        if target is not None:
            sample = device.sample_of(target, reads.segments)
            device.prove(target, reads.arena, opened.file, sample)
        self._reads[number] = None

    def _start_exchange(self, number: int) -> list[Pending]:
        """Start the exchange of a step, if it has one. A rank that has failed takes part, too.

        Raises:
            RankError: a rank is gone.
        """
        if number >= len(self._steps) or self._steps[number].kind != "shared":
            return []
        slot = self._slot(number)
        if slot.part is None:
            return []
        readers = len(self._subgroup.readers)
        each = part_bytes(self._steps[number].unit, readers)
        return self._subgroup.exchange(slot.unit[: each * readers], slot.part[:each])

    def _place_results(self, number: int) -> None:
        """Slice and cast a step's unit into the results."""
        if number >= len(self._steps) or self._steps[number].kind == "own":
            return
        slot, unit = self._slot(number), self._steps[number].unit
        for piece in unit.pieces:
            raw = slot.unit[piece.offset : piece.offset + piece.nbytes]
            shape, dtype = self._source.described[piece.tensor]
            rows = piece.first, piece.last
            for region, result in self._results.get(piece.tensor, ()):
                if not region.empty:
                    _place(raw, shape, dtype, rows, region=region, result=result)

    def _stop(self) -> None:
        """Release all reads; none is in progress afterwards."""
        for reads in self._reads.values():
            if reads is not None:
                reads.job.release()
        self._reads.clear()


def _place(
    raw: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: tuple[int, int],
    *,
    region: Region,
    result: torch.Tensor,
) -> None:
    """Copy a region's elements in some rows of a tensor to the region's result.

    Args:
        raw: bytes of the rows.
        shape: of the whole tensor.
        dtype: of the tensor.
        rows: first, and the row after the last.
        region: of the tensor.
        result: of the region's shape.
    """
    if not shape:
        shape, region, result = (1,), Region((1,), ((0, 1, 1),)), result.view(1)
    first, last = rows
    found = region.within(first, last)
    if found is None:
        return
    into_rows, index = found
    # Torch copies few of the small dtypes: without a cast, integers of the same size are copied.
    carrier = dtype if result.dtype != dtype else _carrier(dtype)
    view = raw.view(carrier).view(last - first, *shape[1:])
    into = result if result.dtype != dtype else result.view(carrier)
    into[into_rows].copy_(view[index])


def _carrier(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype of the same size, if there is one."""
    import torch

    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sizes.get(dtype.itemsize, dtype)


def _wait(collectives: list[Pending]) -> None:
    for collective in collectives:
        collective.wait()
