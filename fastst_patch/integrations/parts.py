"""A load of an engine that takes parts of the tensors, as each rank of several does.

    given: a view of the file's map   ->  narrowed by the engine  ->  copied into a parameter
           (`deferred.py`)                 nothing is read             the part is read, or waits

The ranks do not communicate, because a rank may load alone. What a rank takes of a tensor is known
when it copies it. What it will take of the next ones is predicted: of a tensor whose name differs
in its numbers alone, the same part. Predicted parts are on their way before they are copied:

- to a device in memory of their own, contiguous parts through the file's ring, others copied by
  workers from the map, run by run, so that only the part crosses the bus;
- on the CPU into the page cache. Ranks of one machine share it: what all of them need is read
  ahead in turns (`readahead_share`).

A wrong prediction costs what was read ahead, at most ``device_memory_budget``.

Small tensors are not deferred: to defer one takes longer than to copy it. They are read ahead into
the page cache, all of them. On the CPU there is nothing to gain in files that are cached: none of
their tensors is deferred.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .. import tensors
from ..dropin.eligibility import fell_back, opened_for
from ..errors import Fallback
from ..files.cpu import HostFile
from ..files.cuda import DeviceFile, bounds_ahead
from ..files.file_order import groups_of
from ..files.part_order import PartOrder
from ..files.parts import Item, Part, apart, extent_of, itemsize_of, parts_ahead
from ..files.prefetcher import Group, Pending, Prefetcher
from ..files.readahead import AHEAD, WORKERS_FROM
from ..files.readahead_share import in_turn
from ..loader.arguments import Settings
from ..loader.headers import Entry, open_entries
from ..loader.local_files import bar_of
from ..loader.messages import explained
from ..locks import shared
from ..runs import Runs
from .deferred import DeferredTensor, plain
from .engines import Counts, Wanted, check_mode
from .uploads import PendingUpload

if TYPE_CHECKING:
    import torch

    from ..device import Device
    from ..layout import FileLayout

__all__ = ["Parts"]

_log = logging.getLogger("fastst_patch")

RUN = 512
"""Smallest contiguous run of a part, in bytes, that workers copy; see `tensor_parallel.RUN`."""

LONG_RUN = 256 << 10
"""Runs from this length on are read one by one. A driver's call for each takes 1 to 3 us; shorter
runs are packed into one copy, from the map."""

SMALL = 1 << 20
"""Tensors of fewer bytes are not deferred. To defer one takes some 60 us of a core. Stock took 60
us for one of 64 KiB, of which half was copied, and 150 us for one of 1 MiB."""


class _Moving:
    """A `Pending` of parts that several jobs move. An item is an `Item`."""

    def __init__(self) -> None:
        self._of: dict[Item, tuple[Pending, Any]] = {}

    def add(self, item: Item, pending: Pending, name: Any) -> None:
        """Add a part, which its pending knows by a name."""
        self._of[item] = pending, name

    def landed(self) -> bool:
        """Whether nothing moves any more."""
        return all(pending.landed() for pending, _ in self._of.values())

    def take(self, item: Item) -> torch.Tensor:
        """A part, usable on any stream. Raises as `DeviceFile.tensor`."""
        pending, name = self._of.pop(item)
        return pending.take(name)


class _Packed:
    """A `Pending` of parts that workers copy from the map; items are views of it."""

    def __init__(self, upload: PendingUpload, parts: dict[int, Part]) -> None:
        self._upload = upload
        self._parts = parts

    def landed(self) -> bool:
        """Whether nothing moves any more."""
        return self._upload.landed()

    def take(self, view: torch.Tensor) -> torch.Tensor:
        """A part, usable on any stream. Raises as `PendingUpload.take`."""
        return self._parts[id(view)].shaped(self._upload.take(view))


class _Cached:
    """A `Pending` of parts that are read into the page cache. They are used from the map."""

    def landed(self) -> bool:
        """Whether nothing moves that is of this process: always."""
        return True

    def take(self, item: Item) -> torch.Tensor:
        """Refuse: there is nothing but the map."""
        raise KeyError(item)


@dataclasses.dataclass(eq=False)
class _File:
    """An open file.

    Attributes:
        path: as the engine gave it.
        layout: of its tensors.
        host: its map.
        device: reads parts to the device; None for a load to the CPU.
    """

    path: str
    layout: FileLayout
    host: HostFile
    device: DeviceFile | None


class _Given:
    """The `Source` of one tensor that was given to the engine."""

    def __init__(
        self, load: Parts, file: _File, position: int, i: int, tensor: torch.Tensor
    ) -> None:
        self.storage = tensor.untyped_storage()._cdata
        self.dtype = tensor.dtype
        self.alive = load.alive
        self.file = file
        self.position = position
        self.i = i
        self.counted: set[str] = set()  # devices that count it as a tensor
        self._load = load
        self._settled = False

    @property
    def over(self) -> bool:
        """See `Source`."""
        return self._load.over

    def part(self, view: torch.Tensor, into: torch.Tensor) -> torch.Tensor | None:
        """See `Source`."""
        if self._settled or self._load.over or not tensors.ordinary_mode():
            return None
        # A changed tensor is not what is in the file. `detach` shares the version, and ``.data``
        # is a DeferredTensor, which tells of its changes itself.
        part = self._part(view)
        if part is None or view._version or view.requires_grad:
            self._load.count(self, "cpu", view.nbytes)
            return None
        return self._load.taken(self, part, into)

    def used(self, view: torch.Tensor) -> None:
        """See `Source`."""
        if not self._load.over:
            part = self._part(view)
            if part is not None:
                self._load.used(self, part)
            self._load.count(self, "cpu", view.nbytes)

    def settle(self, view: torch.Tensor) -> None:
        """See `Source`."""
        self._settled = True
        self.used(view)

    def _part(self, view: torch.Tensor) -> Part | None:
        if view.dtype != self.dtype or view.is_inference() or view.is_conj() or view.is_neg():
            return None
        part = Part.of(view)
        return part if part.is_box() else None


def _device_of(target: Device) -> torch.device:
    """A device as its tensors show it."""
    import torch

    return target.runtime.empty([0], torch.uint8, target.ordinal).device


class Parts:
    """One load of an engine, of whose tensors this process takes parts, or few.

    Args:
        wanted: what the engine asks for. On the CPU, tensors are views of the files' maps; to a
            device, parts are read there where the engine copies them without a cast.
        turn: the number of this rank among those that read the same files.
        turns: how many these are.

    Attributes:
        over: whether the load has ended.
        alive: deferred tensors that exist, by their ids.

    Raises:
        Fallback: the engine's own loop has to do it.
        OptionError: an option has a bad name or value.
        OSError, SafetensorError: a file cannot be opened.
    """

    def __init__(self, wanted: Wanted, turn: int = 0, turns: int = 1) -> None:
        check_mode()
        self._wanted = wanted
        self._turn, self._turns = turn, turns
        self.over = False
        settings = Settings(wanted.device, "pt", nogds=True, options=wanted.options)
        if settings.fallback is not None:
            raise settings.fallback
        self._config = settings.config
        if self._config.verify:
            raise Fallback("verify is on, and compares whole tensors")
        self._target = settings.target
        self._torch_device: Any = None
        self._room = 0
        entries = open_entries([(path, 0) for path in wanted.files], settings)
        self._files: list[_File | None] = [self._opened(entry) for entry in entries]
        keep = wanted.keep or (lambda name: True)
        self._numbers = [
            array("Q", [i for i, name in enumerate(entry.layout.names) if keep(name)])
            for entry in entries
        ]
        self._least = [self._least_deferred(file) for file in self._files if file is not None]
        self._position = 0  # among those that are deferred
        budget = self._config.device_memory_budget
        most, nbytes = bounds_ahead(budget, mapped=self._target is None)
        if self._target is not None:
            self._room = self._target.room() - most
            self._torch_device = _device_of(self._target)
        self._order = PartOrder(
            [
                (entry.layout, [i for i in some if entry.layout.nbytes(i) >= least])
                for entry, some, least in zip(entries, self._numbers, self._least, strict=True)
            ],
            nbytes,
        )
        self._prefetcher = Prefetcher(self._order, lambda: most)
        self.alive: weakref.WeakValueDictionary[int, DeferredTensor] = weakref.WeakValueDictionary()
        self._counts = Counts(wanted.reason)
        if self._target is not None:
            self._counts.reason = (
                "tensors that are small, cast, or not copied are used from the map"
            )
        self._bar = bar_of(entries, self._numbers) if wanted.progress else None

    def _opened(self, entry: Entry) -> _File:
        if entry.file is None:
            assert entry.fallback is not None
            raise entry.fallback
        tensors.check(entry.layout)
        host = HostFile(entry.file, entry.layout, self._config)
        device = None
        if self._target is not None:
            made = opened_for(entry.file, entry.layout, self._config, self._target)
            assert isinstance(made, DeviceFile)
            device = made
            host.account.path = "mmap"
        elif not host.mapped:
            raise Fallback("an option excludes maps, of which parts are taken on the CPU")
        return _File(entry.path, entry.layout, host, device)

    def pairs(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, file by file, in offset order.

        Closing the iterator lets go of what was read ahead.

        Raises:
            OSError, MemoryError, SafetensorError: a part cannot be read; raised where it is copied.
        """
        started = time.perf_counter()
        try:
            for k, numbers in enumerate(self._numbers):
                file = self._files[k]
                assert file is not None
                yield from self._pairs_of(file, numbers, self._least[k])
                self._files[k] = None
        finally:
            self._end(time.perf_counter() - started)

    def _least_deferred(self, file: _File) -> int:
        """From how many bytes on tensors of a file are deferred."""
        cached = self._target is None and SMALL and not file.host.ahead_of.cold()
        return file.layout.data_bytes + 1 if cached else SMALL

    def _pairs_of(
        self, file: _File, numbers: array[int], least: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        layout, names = file.layout, file.layout.names
        made = tensors.import_batch(file.host.map(), layout, numbers)
        made.reverse()
        ahead = self._small_ahead(file, [i for i in numbers if layout.nbytes(i) < least])
        count = total = 0
        try:
            for i in numbers:
                nbytes = layout.nbytes(i)
                if nbytes < least:
                    count, total = count + 1, total + nbytes
                    if i in ahead:
                        self._read_small(file, ahead[i])
                    yield names[i], made.pop()
                else:
                    self._prefetcher.expect(self._position, self._start)
                    yield names[i], self._given(file, i, made.pop())
                    self._position += 1
                if self._bar is not None:
                    self._bar.update(nbytes)
        finally:
            with shared:
                self._counts.use(file.host.account, "cpu", count, total)

    def _given(self, file: _File, i: int, tensor: torch.Tensor) -> DeferredTensor:
        return DeferredTensor.over(tensor, _Given(self, file, self._position, i, tensor))

    def _end(self, seconds: float) -> None:
        """Let go of everything. Tensors that the engine keeps are plain from now on."""
        self.over = True
        self._prefetcher.drop()
        for reference in self.alive.valuerefs():  # a copy: other threads may add tensors
            tensor = reference()
            if tensor is not None:
                plain(tensor)
        self._files.clear()
        if self._bar is not None:
            self._bar.close()
        self._counts.emit(self._wanted, seconds)

    # ---- what is used ----

    def used(self, given: _Given, part: Part) -> None:
        """Note that a part is used from the map."""
        key = given.position, part
        on_cpu = given.file.device is None
        if not on_cpu or self._prefetcher.hand_out(key, self._start) is None:
            self.read_ahead(given.file, [(given.i, part)])

    def taken(self, given: _Given, part: Part, into: torch.Tensor) -> torch.Tensor | None:
        """A part on the device that it is copied into; None: it is copied from the map."""
        file, fallback = given.file, None
        if file.device is None:
            self.used(given, part)
        elif self._moves(given, part, into):
            try:
                moved = self._moved(given, file.device, (given.i, part))
            except (Fallback, MemoryError) as error:
                fallback = Fallback.alone(error)
            except Exception as error:
                raise explained(error, file.path, file.layout.names[given.i]) from error
            else:
                self.count(given, file.device.device, moved.nbytes)
                return moved
        if fallback is not None:
            file.host.account.reason = fallback.reason
            fell_back(self._config, self._wanted.call, file.path, fallback)
        self.count(given, "cpu", part.numel * given.dtype.itemsize)
        return None

    def _moved(self, given: _Given, device: DeviceFile, item: Item) -> torch.Tensor:
        pending = self._prefetcher.hand_out((given.position, item[1]), self._start)
        if pending is None:
            pending = self._moving(given.file, device, [item])
        moved: torch.Tensor = pending.take(item)
        return moved

    def _moves(self, given: _Given, part: Part, into: torch.Tensor) -> bool:
        """Whether a part goes through our hands to the device where it is copied."""
        itemsize = given.dtype.itemsize
        if into.device != self._torch_device or into.dtype != given.dtype:
            return False
        if part.numel * itemsize > self._room:
            reason = "parts that do not fit beside the model stay on the CPU"
            given.file.host.account.reason = reason
            return False
        return part.dense or part.run * itemsize >= RUN

    def count(self, given: _Given, device: str, nbytes: int) -> None:
        """Count bytes that the engine has copied, or used in another way."""
        file = given.file
        account = file.host.account
        if device != "cpu":
            assert file.device is not None
            account = file.device.account
        with shared:  # engines copy in several threads
            made = device not in given.counted
            given.counted.add(device)
            self._counts.use(account, device, int(made), nbytes)

    # ---- reading ----

    def _start(self, group: Group) -> Pending | None:
        """Start a group; where that cannot be done nothing more is read ahead."""
        file = self._files[group.source]
        if file is None:
            return None
        try:
            if file.device is None:
                return self.read_ahead(file, group.items)
            return self._moving(file, file.device, group.items)
        except (Fallback, MemoryError, OSError) as error:
            # What uses one of these parts raises it; until then it does not matter.
            _log.debug("%s is not read ahead: %s", file.path, error)
            error.__traceback__ = None
            self._order.clear()
            return None

    def _moving(self, file: _File, device: DeviceFile, items: Sequence[Item]) -> _Moving:
        """Start moving parts to the device. Raises as `DeviceFile.tensor`."""
        moving = _Moving()
        for some in apart(file.layout, items):
            ways: tuple[list[Item], list[Item]] = [], []
            for item in some:
                ways[self._is_packed(file.layout, device, item)].append(item)
            read, packed = ways
            if read:
                pending = parts_ahead(device, read)
                for item in read:
                    moving.add(item, pending, item)
            if packed:
                self._pack(file, packed, moving)
        return moving

    @staticmethod
    def _is_packed(layout: FileLayout, device: DeviceFile, item: Item) -> bool:
        """Whether workers pack a part from the map: if an option does not say how it is read."""
        i, part = item
        cached = device._mode in ("auto", "buffered", "direct-if-cold")
        return cached and not part.dense and part.run * itemsize_of(layout, i) < LONG_RUN

    def _pack(self, file: _File, items: Sequence[Item], moving: _Moving) -> None:
        assert self._target is not None
        numbers = array("Q", [i for i, _ in items])
        made = tensors.import_batch(file.host.map(), file.layout, numbers)
        views = [part.sorted_view(t) for t, (_, part) in zip(made, items, strict=True)]
        parts = {id(view): part for view, (_, part) in zip(views, items, strict=True)}
        pending = _Packed(PendingUpload(views, self._target, self._config), parts)
        for item, view in zip(items, views, strict=True):
            moving.add(item, pending, view)

    def read_ahead(self, file: _File, items: Sequence[Item]) -> Pending:
        """Start reading parts into the page cache."""
        alone: list[tuple[int, int]] = []
        shared: list[tuple[int, int]] = []
        for item in items:
            begin, end = extent_of(file.layout, item)
            whole = end - begin == file.layout.nbytes(item[0])
            others_need_it = self._turns > 1 and (whole or not item[1].dense)
            (shared if others_need_it else alone).append((begin, end))
        extents = in_turn(sorted(alone), sorted(shared), self._turn, self._turns)
        file.host.ahead_of.ranges(file.host.map(), extents)
        return _CACHED

    def _small_ahead(self, file: _File, numbers: list[int]) -> dict[int, list[int]]:
        """Start reading small tensors of a file into the page cache.

        Returns:
            More of them, to be read when the tensor of that number is given.
        """
        if not numbers or not file.host.ahead_of.cold():
            return {}
        groups = [group for group, _ in groups_of(file.layout, numbers, AHEAD // 2)]
        for group in groups[:1]:
            self._read_small(file, group)
        return {one[0]: following for one, following in pairwise(groups)}

    def _read_small(self, file: _File, numbers: Iterable[int]) -> None:
        found = Runs(map(file.layout.extent, numbers))
        if found.nbytes >= WORKERS_FROM:
            extents = in_turn([], found.ranges, self._turn, self._turns)
            file.host.ahead_of.ranges(file.host.map(), extents)


_CACHED = _Cached()
