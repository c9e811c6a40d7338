"""One opened file on its way to CPU tensors.

=================  ==========================================================================
path               what happens
=================  ==========================================================================
mmap               private zero-copy map; nothing is copied
mmap+readahead     the same, and workers pull what is not cached, in the order of use
buffered, direct   parallel reads into one huge-page arena, tensors at 256-byte boundaries
owned              parallel reads into one torch allocation per tensor
=================  ==========================================================================
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from . import engine, tensors
from .config import Config
from .errors import Doubt
from .layout import FileLayout, plan_arena, plan_rows
from .locks import shared
from .machine import io_threads
from .opened import OpenedFile, progress_bar
from .windows import HostAhead

if TYPE_CHECKING:
    import torch

__all__ = ["HostFile"]

MIB = 1 << 20
WORKERS_FROM = 1 * MIB
"""Bytes from which a load is worth waking workers for; a thread costs about 30 us."""

HUGE_PAGE = 2 * MIB

AHEAD = 64 * MIB
"""How far read-ahead runs in front of a handle that is walked in file order."""

PROBED_WHOLE = 64 * MIB
"""Extents up to this size are looked at page by page: 12 us for 19 MB in large folios, where
waking a worker and finding out how much memory is free take some 300 us a file."""

RESERVE = 512 * MIB
"""Read-ahead stops when less memory than this (or a tenth of what was free) is left."""

CHUNK_MIN = 64 << 10
"""The least that ``chunk_bytes`` may be."""

LOOK_EVERY = 64 * MIB
"""Bytes taken for reads from one look at the memory that is left to the next (some 0.1 ms)."""


class HostFile(OpenedFile):
    """An open file whose tensors are the CPU's. Usable from any thread.

    Holds the descriptor and, from the first tensor on, the map; tensors handed out hold the
    map themselves and outlive this object.
    """

    _taken = 0  # by all files since the last look; a race only looks sooner or later

    def __init__(self, file: engine.File, layout: FileLayout, config: Config) -> None:
        super().__init__(file, layout, config)
        self.account.path = self._path_name()
        self._map: engine.Arena | None = None
        self._storage: torch.UntypedStorage | None = None  # of the whole map
        self._covered = (0, 0)  # file range last looked after
        self._all_cached = False  # certainly
        self._resident: float | None = None  # what a look at the whole file found last
        self._looked = False  # whether the report knows what was cached at first
        self._reserve: int | None = None  # bytes of memory that read-ahead leaves

    # ---- which path ----

    def _path_name(self) -> str:
        config = self.config
        if self.owned:
            return "owned"
        if config.io in ("buffered", "direct"):
            return config.io
        return "direct" if config.page_cache == "drop" else "mmap"

    @property
    def mapped(self) -> bool:  # type: ignore[override]
        """Whether tensors are views of the file's map."""
        return self.account.path.startswith("mmap")

    @property
    def _direct(self) -> bool:
        return self.config.io == "direct" or (
            self.config.io == "auto" and self.config.page_cache == "drop"
        )

    # ---- tensors ----

    def tensor(self, i: int, *, for_slice: bool = False) -> torch.Tensor:
        """Tensor i, usable at once; ``for_slice`` as stock makes the one that it slices.

        Raises:
            Doubt: stock must do it.
            OSError, MemoryError, SafetensorError: its bytes could not be read.
        """
        result = self._made(i, for_slice)
        self.count(1, self.layout.nbytes(i))
        return result

    def part(self, i: int, index: Any, *, ahead: bool = True) -> torch.Tensor:
        """What stock's slice gives for an index into tensor i. Raises as `tensor`.

        Args:
            i: number of the tensor.
            index: as torch takes it.
            ahead: whether to read ahead where the file is mapped.
        """
        whole = self._made(i, for_slice=True, ahead=ahead)
        result = self.index(whole, index)
        self.count(1, result.nbytes if self.mapped else whole.nbytes)
        return result

    def _made(self, i: int, for_slice: bool, ahead: bool = True) -> torch.Tensor:
        tensors.check(self.layout, i)
        if not tensors.ordinary_mode():
            return self._in_mode(i, for_slice)
        if not self.mapped:
            return self._read([i])[0]
        if ahead:
            self._look_ahead(i)
        return tensors.import_batch(self.map(), self.layout, array("Q", (i,)))[0]

    def all_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, in offset order. Raises as `tensor`."""
        layout = self.layout
        tensors.check(layout)
        if not layout.names:
            return {}
        if not tensors.ordinary_mode():
            return {name: self.tensor(i) for i, name in enumerate(layout.names)}
        if self.mapped:
            arena = self.map()
            self.read_ahead_all()
            made = tensors.import_batch(arena, layout)
        else:
            made = self._read(range(len(layout.names)))
        self.count(len(made), layout.data_bytes)
        return dict(zip(layout.names, made, strict=True))

    def ahead(self, numbers: Sequence[int]) -> HostAhead:
        """Start bringing in tensors that will be asked for, each as often as its number is given.

        Mapped ones are made at once, and workers read ahead what is not cached of them.

        Raises:
            Doubt: stock must do it, or a torch mode is in force: then they are made one by one.
            OSError, MemoryError: there is no map, or no memory.
        """
        tensors.check(self.layout)
        if not tensors.ordinary_mode():
            raise Doubt("a torch mode or default device is in force")
        asked = Counter(numbers)
        wanted = array("Q", sorted(asked))
        job = None
        if self.mapped:
            arena = self.map()
            made = tensors.import_batch(arena, self.layout, wanted)
            self._read_ahead(arena, wanted)
        else:
            self._require_room(sum(map(self.layout.nbytes, wanted)))
            made, arena, segments, _ = self._places(wanted)
            job = self.read_into(arena, segments)
        return HostAhead(self, dict(zip(wanted, made, strict=True)), job, asked)

    def _read_ahead(self, arena: engine.Arena, wanted: array[int]) -> None:
        """Start reading ahead some mapped tensors; workers look what is not cached of them."""
        if self.config.io == "mmap":
            return
        segments = array("Q")
        total = 0
        for i in wanted:
            begin, end = self.layout.extent(i)
            if segments and segments[-3] + segments[-2] == begin:
                segments[-2] += end - begin
            else:
                segments.extend((begin, end - begin, 0))
            total += end - begin
        if total < WORKERS_FROM:
            return
        if self.account.resident is None:
            whole = self.layout.data_begin, self.layout.data_bytes
            self._all_cached = self._note_residency(*whole)
        if self._all_cached:
            return
        # Where samples find everything cached, one worker makes sure of the rest.
        threads = 1 if self.account.resident == 1.0 else io_threads(self.config.threads)
        self._start(arena, segments, threads)

    def rows(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of tensor i's first dimension, read alone; not for mapped files."""
        tensors.check(self.layout, i)
        first, last = plan_rows(self.layout, i, start, stop)
        self._require_room(last - first)
        result = tensors.empty(self.layout, i, stop - start)
        begin = self.layout.extent(i)[0] + first
        self._fill([(begin, last - first, result)])
        self.count(1, last - first)
        return result

    def _in_mode(self, i: int, for_slice: bool) -> torch.Tensor:
        """Tensor i the way stock makes it, for torch modes to see.

        Over our own map, so that what was changed in place through earlier tensors is there.
        """
        if not self.mapped:
            raise Doubt("a torch mode or default device is in force")
        if self._storage is None:
            self._storage = tensors.whole_storage(self.map())
        return tensors.by_stocks_recipe(self._storage, self.layout, i, for_slice)

    # ---- mapped ----

    def map(self) -> engine.Arena:
        """The file's private map, made on first use.

        Raises:
            MemoryError, OSError: the map was refused.
        """
        found = self._map
        if found is None:
            with shared:
                if self._map is None:
                    made = engine.map_arena(self.file)
                    if self._map is None:  # a signal handler may have made one meanwhile
                        self._map = made
                found = self._map
        return found

    def read_ahead_all(self) -> None:
        """Start reading ahead what is not cached of a mapped file, in its order."""
        layout, arena = self.layout, self.map()
        if self.config.io == "mmap" or layout.data_bytes < WORKERS_FROM:
            return
        job = None
        cached = self._note_residency(layout.data_begin, layout.data_bytes)
        if not cached:
            # Where samples find everything cached, one worker makes sure of the rest.
            threads = 1 if self._resident == 1.0 else io_threads(self.config.threads)
            job = self._start(arena, array("Q", (layout.data_begin, layout.data_bytes, 0)), threads)
        self._covered = (0, self.file.size)
        if self.config.progress and (cached or job is not None):
            with progress_bar(self.file.path, layout.data_bytes) as advance:
                if job is not None:
                    job.wait(lambda stats: advance(stats.bytes_done))
                advance(layout.data_bytes)

    def _look_ahead(self, i: int) -> None:
        """Bring in tensor i's extent, and what follows when the file is walked in order."""
        begin, end = self.layout.extent(i)
        if self.config.io == "mmap" or begin == end:
            return
        low, high = self._covered
        sequential = self.follows_another(i)
        if low <= begin and end <= high:
            if sequential and high - end < AHEAD // 2 and high < self.file.size:
                self._cover(low, high, self._ahead_of(high))
        elif sequential:
            self._cover(begin, begin, max(end, self._ahead_of(begin)))
        elif end - begin >= WORKERS_FROM:  # less is a few faults, which the kernel serves
            self._cover(begin, begin, end)

    def _cover(self, low: int, begin: int, end: int) -> None:
        """Start read-ahead of an extent unless it is cached; (low, end) is covered then."""
        self._covered = (low, end)
        resident, probe = self.file.residency(begin, end - begin)
        if self.account.resident is None and probe != "none":
            self.account.resident = resident / (end - begin)
        if resident < end - begin:
            self.account.path = "mmap+readahead"
            extent = array("Q", (begin, end - begin, 0))
            self._start(self.map(), extent, io_threads(self.config.threads))

    def _ahead_of(self, offset: int) -> int:
        """Where a window of read-ahead ends: at a huge page, which the next one begins with."""
        return min(-(-(offset + AHEAD) // HUGE_PAGE) * HUGE_PAGE, self.file.size)

    def keep_to(self, wanted: array[int]) -> None:
        """Keep the kernel from reading what nobody wants of a mapped file, before it is used.

        Args:
            wanted: flat triples (file offset, bytes, ignored) of all that is wanted, by offset.
        """
        if self.config.io != "mmap":  # that is how the kernel reads by itself
            self.map().keep_to(wanted)

    def read_ahead(self, extents: array[int], threads: int) -> None:
        """Start reading ahead extents of a mapped file that others do not; it runs on by itself.

        Args:
            extents: flat 64-bit triples (file offset, bytes, ignored), in the order of use.
            threads: most workers.
        """
        nbytes = sum(extents[1::3])
        self._covered = (0, self.file.size)
        if self.config.io == "mmap" or nbytes < WORKERS_FROM:
            return
        if self._note_residency(self.layout.data_begin, self.layout.data_bytes):
            return
        # Where samples find everything cached, one worker makes sure of the rest.
        self._start(self.map(), extents, 1 if self._resident == 1.0 else threads)

    def cold(self) -> bool:
        """Whether a look at a mapped file tells that reading it ahead is worth while."""
        layout = self.layout
        if self.config.io == "mmap" or layout.data_bytes < WORKERS_FROM:
            return False
        self._note_residency(layout.data_begin, layout.data_bytes)
        return self._resident != 1.0

    def _note_residency(self, begin: int, nbytes: int) -> bool:
        """Look how much is cached, for the report; whether it is certain that everything is.

        Large extents are sampled; workers look at every chunk themselves. The report is told
        what was found first: later there is what was read ahead.
        """
        samples, size = 16, min(nbytes, 256 << 10)
        if nbytes <= PROBED_WHOLE:
            samples, size = 1, nbytes
        step = max((nbytes - size) // max(samples - 1, 1), 1)
        resident = looked = 0
        for k in range(samples):
            found, probe = self.file.residency(min(begin + k * step, begin + nbytes - size), size)
            if probe == "none":
                self._resident = None
                return False
            resident, looked = resident + found, looked + size
        self._resident = resident / looked
        if not self._looked:
            self._looked = True
            self.account.resident = self._resident
        if resident < looked:
            self.account.path = "mmap+readahead"
        return resident == nbytes

    def _start(self, arena: engine.Arena, extents: array[int], threads: int) -> engine.Job | None:
        """Start read-ahead; it runs on by itself, whatever becomes of the job.

        None when there is no memory for it: the kernel then reads on demand, as for stock.
        """
        if self._reserve is None:  # once: asking costs more than starting
            headroom = engine.memory_headroom()
            self._reserve = min(RESERVE, headroom // 10) if headroom is not None else 0
        try:
            return engine.prefetch(
                self.file,
                arena,
                extents,
                threads=threads,
                chunk_bytes=self.config.chunk_bytes,
                reserve_bytes=self._reserve,
            )
        except MemoryError:
            return None

    # ---- read into memory of our own ----

    def _require_room(self, nbytes: int) -> None:
        """Leave to stock, whose map takes no memory, what would not fit.

        Linux hands out memory that is not there, and kills whoever then writes to it.
        """
        taken = HostFile._taken = HostFile._taken + nbytes
        if taken < LOOK_EVERY:
            return
        headroom = engine.memory_headroom()
        threads, chunk_bytes = self._workers()
        if headroom is not None and nbytes + threads * max(chunk_bytes, HUGE_PAGE) > headroom:
            raise Doubt(f"{nbytes} bytes do not fit the memory that is left ({headroom})")
        HostFile._taken = 0

    def _read(self, wanted: Iterable[int]) -> list[torch.Tensor]:
        chosen = array("Q", wanted)
        self._require_room(sum(map(self.layout.nbytes, chosen)))
        made, arena, segments, nbytes = self._places(chosen)
        self._run(arena, segments, nbytes)
        return made

    def _places(
        self, wanted: array[int]
    ) -> tuple[list[torch.Tensor], engine.Arena, array[int], int]:
        """Tensors over memory that is yet to be filled, and what goes where in it."""
        if self.owned:
            made = [tensors.empty(self.layout, i) for i in wanted]
            places = [
                (self.layout.extent(i)[0], self.layout.nbytes(i), tensor)
                for i, tensor in zip(wanted, made, strict=True)
            ]
            return made, *self._borrow(places)
        plan = plan_arena(self.layout, wanted)
        arena = engine.alloc_arena(plan.arena_bytes)
        made = tensors.import_batch(arena, self.layout, plan.tensors, plan.offsets)
        return made, arena, plan.segments, plan.data_bytes

    def _fill(self, places: list[tuple[int, int, torch.Tensor]]) -> None:
        """Read (file offset, bytes) into tensors that already exist."""
        self._run(*self._borrow(places))

    def _borrow(
        self, places: list[tuple[int, int, torch.Tensor]]
    ) -> tuple[engine.Arena, array[int], int]:
        """Tensors that exist as one arena, which reaches from the lowest to the highest."""
        found = [place for place in places if place[1]]
        segments = array("Q")
        if not found:
            return engine.borrow_arena(0, 0, places), segments, 0
        base = min(tensor.data_ptr() for _, _, tensor in found)
        top = max(tensor.data_ptr() + nbytes for _, nbytes, tensor in found)
        for begin, nbytes, tensor in sorted(found, key=lambda place: place[0]):
            segments.extend((begin, nbytes, tensor.data_ptr() - base))
        total = sum(nbytes for _, nbytes, _ in found)
        return engine.borrow_arena(base, top - base, places), segments, total

    def _run(self, arena: engine.Arena, segments: array[int], nbytes: int) -> None:
        if not nbytes:
            return
        job = self.read_into(arena, segments)
        if self.config.progress:
            with progress_bar(self.file.path, nbytes) as advance:
                job.wait(lambda stats: advance(stats.bytes_done))
        else:
            job.wait()
        self.note(job)

    def _workers(self) -> tuple[int, int]:
        """Most workers on a read, and the bytes that each handles at a time.

        With O_DIRECT a worker that copies what it has read keeps no request at the disk; so there
        are more of them, each with so little that all their buffers stay in the cache.
        """
        threads, chunk_bytes = io_threads(self.config.threads), self.config.chunk_bytes
        if not self._direct or self.config.threads:
            return threads, chunk_bytes
        return 2 * threads, max(chunk_bytes // 4, CHUNK_MIN)

    def read_into(self, arena: engine.Arena, segments: array[int]) -> engine.Job:
        """Start reading extents into memory of the host's."""
        threads, chunk_bytes = self._workers()
        return engine.read(
            self.file,
            arena,
            segments,
            threads=threads,
            chunk_bytes=chunk_bytes,
            mode="direct" if self._direct else "buffered",
            drop_cache=self.config.page_cache == "drop",
        )

    def note(self, job: engine.Job) -> None:
        """Put how a finished job came by its bytes into the account."""
        refused = job.stats().direct_errno
        if self._direct and refused:
            if self.account.path == "direct":
                self.account.path = "buffered"
            self.account.note = f"O_DIRECT was refused ({os.strerror(refused)})"
