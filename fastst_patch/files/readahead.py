"""Reads a mapped file ahead: all of it, tensors that are named, or tensors that are predicted.

Workers bring extents into the page cache while the program runs, in the order of use. No call
waits for them. Extents that a probe finds cached are left out; where no probe can tell, workers
find out themselves.
"""

from __future__ import annotations

from array import array

from .. import engine
from ..config import Config
from ..layout import FileLayout, plan_rows
from ..machine import io_threads
from ..report import Account
from ..runs import Runs
from .base import progress_bar
from .pattern import AccessPattern, Walk

__all__ = ["AHEAD", "HUGE_PAGE", "WORKERS_FROM", "ReadAhead"]

MIB = 1 << 20
WORKERS_FROM = 1 * MIB
"""Fewest bytes for which workers are woken; a thread costs about 30 us."""

HUGE_PAGE = 2 * MIB

AHEAD = 64 * MIB
"""Most bytes read ahead of a handle whose order of requests is known."""

PROBED_WHOLE = 64 * MIB
"""Extents up to this size are probed page by page. That takes 12 us for 19 MB in large folios; to
wake a worker and to find out how much memory is free takes some 300 us a file."""

RESERVE = 512 * MIB
"""Read-ahead stops when less memory than this (or a tenth of what was free) is left."""

SOME_ROWS, WHOLE = 1, 2  # how much of a tensor was read ahead, or found cached

LOOKS_AT = 2
"""At this request a handle looks whether the file is cached: before its names are sorted, to see in
which order they are requested, which takes 0.3 ms for 4,000."""

Part = tuple[int, int, int] | None
"""Rows of a tensor's first dimension, and how many it has; None: all of it."""


def _rows_part(layout: FileLayout, i: int, rows: tuple[int, int] | None) -> Part:
    if rows is None:
        return None
    return rows[0], rows[1], layout.shape(i)[0]


class ReadAhead:
    """Read-ahead of one mapped file, whose map is given to every call. Usable from any thread.

    No call takes a lock. Where threads meet, an extent may be read ahead twice, and the second
    time finds it cached; or it is not read ahead, and the kernel reads it on demand.
    """

    def __init__(
        self, file: engine.File, layout: FileLayout, config: Config, account: Account
    ) -> None:
        self._file = file
        self._layout = layout
        self._config = config
        self._account = account
        self._pattern = AccessPattern(layout)
        self._started = bytearray(len(layout.names))  # by tensor: 0, SOME_ROWS or WHOLE
        self._asked = 0  # requests
        self._alone = 0  # bytes of requests that were not predicted
        self._all_ahead = False  # the whole file was started
        self._calm: bool | None = None  # the file seems to be cached; None: not looked yet
        self._all_cached = False  # the file is certainly cached
        self._resident: float | None = None  # cached fraction of the file at the last look
        self._looked = False  # whether the report has the fraction that was cached at first
        self._reserve: int | None = None  # bytes of memory that read-ahead leaves free

    def everything(self, arena: engine.Arena) -> None:
        """Start reading ahead all that is not cached, by offset; shows the progress, if wanted."""
        layout = self._layout
        if self._config.io == "mmap" or layout.data_bytes < WORKERS_FROM:
            return
        job = None
        cached = self._note_residency(layout.data_begin, layout.data_bytes)
        if not cached:
            # Where samples find everything cached, one worker makes sure of the rest.
            threads = 1 if self._resident == 1.0 else io_threads(self._config.threads)
            whole = layout.data_begin, layout.data_begin + layout.data_bytes
            job = self._start(arena, Runs([whole]), threads)
        self._all_ahead = True
        if self._config.progress and (cached or job is not None):
            with progress_bar(self._file.path, layout.data_bytes) as advance:
                if job is not None:
                    job.wait(lambda stats: advance(stats.bytes_done))
                advance(layout.data_bytes)

    def tensors(self, arena: engine.Arena, wanted: array[int]) -> engine.Job | None:
        """Start reading ahead some tensors; workers find out what of them is not cached.

        Returns the job, which goes on if it is dropped; None where there is none.
        """
        return self.ranges(arena, Runs(map(self._layout.extent, wanted)))

    def ranges(self, arena: engine.Arena, runs: Runs) -> engine.Job | None:
        """Start reading ahead some of the file, as `tensors` does."""
        if self._config.io == "mmap" or runs.nbytes < WORKERS_FROM:
            return None
        if self._account.resident is None:
            whole = self._layout.data_begin, self._layout.data_bytes
            self._all_cached = self._note_residency(*whole)
        if self._all_cached:
            return None
        # Where samples find everything cached, one worker makes sure of the rest.
        threads = 1 if self._account.resident == 1.0 else io_threads(self._config.threads)
        return self._start(arena, runs, threads)

    def extents(self, arena: engine.Arena, extents: Runs, threads: int) -> engine.Job | None:
        """Start reading ahead some extents, and stop predicting requests; returns as `tensors`.

        Args:
            arena: the file's map.
            extents: in the order of use.
            threads: most workers.
        """
        self._all_ahead = True
        if self._config.io == "mmap" or extents.nbytes < WORKERS_FROM:
            return None
        if self._note_residency(self._layout.data_begin, self._layout.data_bytes):
            return None
        # Where samples find everything cached, one worker makes sure of the rest.
        return self._start(arena, extents, 1 if self._resident == 1.0 else threads)

    def cold(self) -> bool:
        """Whether reading the file ahead is worth it: not all of it is known to be cached."""
        layout = self._layout
        if self._config.io == "mmap" or layout.data_bytes < WORKERS_FROM:
            return False
        self._note_residency(layout.data_begin, layout.data_bytes)
        return self._resident != 1.0

    def _note_residency(self, begin: int, nbytes: int) -> bool:
        """Look how much is cached, for the report; return whether all of it certainly is.

        Large extents are sampled; workers look at every chunk themselves. The report gets the
        first finding only: later ones include what was read ahead.
        """
        self._resident = self._sampled(begin, nbytes)
        if self._resident is None:
            return False
        if not self._looked:
            self._looked = True
            self._account.resident = self._resident
        if self._resident < 1.0:
            self._account.path = "mmap+readahead"
        return self._resident == 1.0 and nbytes <= PROBED_WHOLE

    def _sampled(self, begin: int, nbytes: int) -> float | None:
        """The cached fraction of an extent, by samples where it is large; None: unknown."""
        samples, size = 16, min(nbytes, 256 << 10)
        if nbytes <= PROBED_WHOLE:
            samples, size = 1, nbytes
        step = max((nbytes - size) // max(samples - 1, 1), 1)
        resident = looked = 0
        for k in range(samples):
            found, probe = self._file.residency(min(begin + k * step, begin + nbytes - size), size)
            if probe == "none":
                return None
            resident, looked = resident + found, looked + size
        return resident / looked

    def _start(
        self,
        arena: engine.Arena,
        extents: Runs,
        threads: int,
        chunk_bytes: int | None = None,
    ) -> engine.Job | None:
        """Start reading extents ahead. That goes on if the job is dropped.

        None when there is no memory for it: the kernel then reads on demand, as for stock.
        """
        if self._reserve is None:  # asked once: that takes longer than to start a job
            headroom = engine.memory_headroom()
            self._reserve = min(RESERVE, headroom // 10) if headroom is not None else 0
        try:
            return engine.prefetch(
                self._file,
                arena,
                extents.flat,
                threads=threads,
                chunk_bytes=chunk_bytes or self._config.chunk_bytes,
                reserve_bytes=self._reserve,
            )
        except MemoryError:
            return None

    @property
    def calm(self) -> bool:
        """Whether requests for less than `WORKERS_FROM` bytes start nothing."""
        return self._calm is True or self._all_ahead or self._config.io == "mmap"

    def request(self, arena: engine.Arena, i: int, rows: tuple[int, int] | None = None) -> None:
        """Start reading tensor i, or some rows of it, and the tensors predicted to come next."""
        if self._config.io == "mmap" or self._all_ahead:
            return
        part = _rows_part(self._layout, i, rows)
        begin, end = self._wanted(i, part)
        self._asked += 1
        if self._asked == LOOKS_AT and self._calm is None:
            self._look()
        if self._calm and (end - begin < WORKERS_FROM or self._is_cached(begin, end)):
            return
        walk = self._pattern.request(i)
        if walk is not None and self._calm is None:
            self._look()  # before as much as AHEAD is gone through, tensor by tensor
            if self._calm and end - begin < WORKERS_FROM:
                return
        if walk is not None and walk.nbytes <= AHEAD // 2:
            self._follow(arena, walk, i, part)
        elif walk is None and self._started[i] != WHOLE and end - begin >= WORKERS_FROM:
            # A smaller one takes a few faults, which the kernel serves.
            self._read_alone(arena, i, part, begin, end)

    def _read_alone(self, arena: engine.Arena, i: int, part: Part, begin: int, end: int) -> None:
        """Read ahead what was asked for of tensor i, a request that was not predicted."""
        if self._started[i]:  # other rows were asked for before: the rest will be, too
            part, end = None, self._layout.extent(i)[1]
        self._started[i] = SOME_ROWS if part else WHOLE
        self._alone += end - begin
        if part is None and self._alone > self._layout.data_bytes // 4:
            begin, end = self._with_neighbours(i, begin)
            self._bring(arena, [(begin, end)])
        else:
            self._bring(arena, [(begin, end)], min(self._config.chunk_bytes, HUGE_PAGE))

    def _with_neighbours(self, i: int, begin: int) -> tuple[int, int]:
        """The extent of tensor i and of unread tensors behind it.

        A program that has read a quarter of the file in no order is likely to read all of it.
        """
        end, last = self._layout.extent(i)[1], begin + AHEAD // 2
        for j in range(i + 1, len(self._started)):
            if self._started[j] or end >= last:
                break
            self._started[j] = WHOLE
            end = self._layout.extent(j)[1]
        return self._by_huge_pages(begin, end)

    def _by_huge_pages(self, begin: int, end: int) -> tuple[int, int]:
        """An extent, widened to the huge pages that it touches."""
        return begin - begin % HUGE_PAGE, min(-(-end // HUGE_PAGE) * HUGE_PAGE, self._file.size)

    def _follow(self, arena: engine.Arena, walk: Walk, i: int, part: Part) -> None:
        """Read ahead tensor i, which is asked for now, and the tensors that a walk predicts."""
        extents: list[tuple[int, int]] = []
        started, j = self._started, i
        while True:
            begin, end = self._wanted(j, part)
            nbytes = 0 if started[j] else end - begin
            if nbytes:
                started[j] = SOME_ROWS if part else WHOLE
                if walk.dense and part is None:  # neighbours in the same pages are next
                    begin, end = self._by_huge_pages(begin, end)
                extents.append((begin, end))
            if j != i:
                walk.add(j, nbytes)
            following = walk.foresee() if walk.nbytes < AHEAD else None
            if following is None:
                break
            j = following
        self._bring(arena, Runs(extents).ranges)

    def _wanted(self, i: int, part: Part) -> tuple[int, int]:
        """The extent of tensor i, or of its rows in the same proportion as ``part``."""
        begin, end = self._layout.extent(i)
        if part is None:
            return begin, end
        rows = self._layout.shape(i)[:1]
        if not rows or rows[0] * part[0] % part[2] or rows[0] * part[1] % part[2]:
            return begin, end
        first, last = plan_rows(
            self._layout, i, rows[0] * part[0] // part[2], rows[0] * part[1] // part[2]
        )
        return begin + first, begin + last

    def _is_cached(self, begin: int, end: int) -> bool:
        return self._file.residency(begin, end - begin)[0] == end - begin

    def _bring(
        self,
        arena: engine.Arena,
        extents: list[tuple[int, int]],
        chunk_bytes: int | None = None,
    ) -> None:
        """Start reading ahead the extents that are not all cached, in their order."""
        missing = []
        resident = total = 0
        for begin, end in extents:
            found, probe = self._file.residency(begin, end - begin)
            resident, total = resident + found, total + end - begin
            if found < end - begin:
                missing.append((begin, end))
        if not total:
            return
        if self._account.resident is None and probe != "none":
            self._account.resident = resident / total
        if missing:
            self._calm = False
            self._account.path = "mmap+readahead"
            self._start(arena, Runs(missing), io_threads(self._config.threads), chunk_bytes)
        elif self._calm is None:
            self._look()

    def _look(self) -> None:
        """Find out whether the file seems to be cached.

        If so, nothing is read ahead until a request meets bytes that are not cached.
        """
        found = self._sampled(self._layout.data_begin, self._layout.data_bytes)
        self._calm = found == 1.0
        if self._account.resident is None:
            self._account.resident = found
