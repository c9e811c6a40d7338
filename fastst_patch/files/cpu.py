"""A file whose tensors are loaded to the CPU.

=================  ==========================================================================
path               what happens
=================  ==========================================================================
mmap               private zero-copy map; nothing is copied
mmap+readahead     the same, and workers pull what is not cached, in the order of use
buffered, direct   parallel reads into one huge-page arena, tensors at 256-byte boundaries
owned              parallel reads into one torch allocation per tensor
http, s3, ...      parallel reads of a remote file into such an arena or such allocations
=================  ==========================================================================

A handle on a file without a map reads each tensor when it is asked for; on a remote one it also
reads ahead, in the order of the requests.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .. import engine, tensors
from ..config import Config
from ..errors import Fallback
from ..layout import FileLayout, described, plan_arena, plan_rows
from ..locks import once, shared
from ..machine import io_threads
from ..runs import Runs
from .base import OpenedFile, places_in_arena, progress_bar
from .network_ahead import NetworkAhead
from .pending import PendingHostRows, PendingHostTensors
from .readahead import HUGE_PAGE, ReadAhead
from .remote import ranges

if TYPE_CHECKING:
    import torch

__all__ = ["HostFile"]

MIB = 1 << 20
CHUNK_MIN = 64 << 10
"""The smallest ``chunk_bytes`` that is allowed."""

LOOK_EVERY = 64 * MIB
"""Bytes of reads between two looks at the memory that is left. A look takes some 0.1 ms."""


class HostFile(OpenedFile):
    """An open file whose tensors go to the CPU. Usable from any thread.

    Holds the descriptor and, from the first tensor on, the map; tensors handed out hold the
    map themselves and outlive this object.
    """

    _taken = 0  # bytes of all files since the last look; a race only moves the next look

    def __init__(self, file: engine.File, layout: FileLayout, config: Config) -> None:
        super().__init__(file, layout, config)
        self.account.path = self._path_name()
        self.mapped = self.account.path == "mmap"
        self._network = NetworkAhead(self) if file.feed is not None else None
        if file.feed is not None and (config.io not in ("auto", "buffered")):
            self.account.reason = f"io={config.io!r} is for local files"
        self._map: engine.Arena | None = None
        self._storage: torch.UntypedStorage | None = None  # of the whole map

    @once
    def ahead_of(self) -> ReadAhead:
        """Its read-ahead, made for the first tensor: of many files only the header is read."""
        return ReadAhead(self.file, self.layout, self.config, self.account)

    # ---- which path ----

    def _path_name(self) -> str:
        config = self.config
        if self.file.feed is not None:
            return self.file.feed.scheme
        if self.owned:
            return "owned"
        if config.io in ("buffered", "direct"):
            return config.io
        return "direct" if config.page_cache == "drop" else "mmap"

    @property
    def _direct(self) -> bool:
        if self.file.feed is not None:
            return False
        return self.config.io == "direct" or (
            self.config.io == "auto" and self.config.page_cache == "drop"
        )

    # ---- tensors ----

    def tensor(self, i: int, *, for_slice: bool = False) -> torch.Tensor:
        """Tensor i, usable at once; ``for_slice``: as stock makes a tensor to slice it.

        Raises:
            Fallback: stock must do it.
            OSError, MemoryError, SafetensorError: its bytes could not be read.
        """
        result = self._made(i, for_slice)
        self.count(1, self.layout.nbytes(i))
        return result

    def part(
        self, i: int, index: Any, rows: tuple[int, int] | None = None, *, ahead: bool = True
    ) -> torch.Tensor:
        """The result of stock's slice for an index into tensor i. Raises as `tensor`.

        Args:
            i: number of the tensor.
            index: as torch takes it.
            rows: first row that it needs, and the row behind the last; None: all.
            ahead: whether to read ahead in a mapped file.
        """
        whole = self._made(i, for_slice=True, ahead=ahead, rows=rows)
        result = self.index(whole, index)
        self.count(1, result.nbytes if self.mapped else whole.nbytes)
        return result

    def _made(
        self, i: int, for_slice: bool, ahead: bool = True, rows: tuple[int, int] | None = None
    ) -> torch.Tensor:
        tensors.check(self.layout, i)
        if not tensors.ordinary_mode():
            return self._in_mode(i, for_slice)
        if not self.mapped:
            read: torch.Tensor = self._read_one(i)
            return read
        if ahead:
            self.ahead_of.request(self.map(), i, rows)
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
            self.ahead_of.everything(arena)
            made = tensors.import_batch(arena, layout)
        else:
            made = self._read(range(len(layout.names)))
        self.count(len(made), layout.data_bytes)
        return dict(zip(layout.names, made, strict=True))

    def ahead(self, numbers: Sequence[int]) -> PendingHostTensors:
        """Start loading tensors that will be requested, each as often as its number is given.

        In a mapped file they are made at once, and workers read ahead what is not cached of them.

        Raises:
            Fallback: stock must do it, or a torch mode is in force, in which the caller makes
                tensors one by one.
            OSError, MemoryError: there is no map, or no memory.
        """
        self.check()
        asked = Counter(numbers)
        wanted = array("Q", sorted(asked))
        job = None
        if self.mapped:
            arena = self.map()
            made = tensors.import_batch(arena, self.layout, wanted)
            self.ahead_of.tensors(arena, wanted)
        else:
            self._require_room(sum(map(self.layout.nbytes, wanted)))
            made, arena, segments, _ = self._places(wanted)
            job = self.read_into(arena, segments)
        return PendingHostTensors(self, dict(zip(wanted, made, strict=True)), job, asked)

    def rows_ahead(self, wanted: Sequence[tuple[int, int, int]]) -> PendingHostRows:
        """Start loading rows that will be requested; raises as `ahead`.

        Args:
            wanted: number of the tensor, the first row, and the row behind the last; one item of
                each tensor.
        """
        self.check()
        wanted = sorted(wanted)
        places = []
        for rows in wanted:
            begin = self.layout.extent(rows[0])[0]
            first, last = plan_rows(self.layout, *rows)
            places.append((begin + first, begin + last))
        if self.mapped:
            arena, numbers = self.map(), array("Q", [i for i, _, _ in wanted])
            whole = tensors.import_batch(arena, self.layout, numbers)
            self.ahead_of.extents(arena, Runs(places), io_threads(self.config.threads))
            cut = [t[start:stop] for t, (_, start, stop) in zip(whole, wanted, strict=True)]
            return PendingHostRows(self, dict(zip(wanted, cut, strict=True)), None)
        self._require_room(sum(end - begin for begin, end in places))
        made = [tensors.empty(self.layout, i, stop - start) for i, start, stop in wanted]
        arena, segments = places_in_arena(
            [(begin, end - begin, t) for (begin, end), t in zip(places, made, strict=True)]
        )
        job = self.read_into(arena, segments)
        return PendingHostRows(self, dict(zip(wanted, made, strict=True)), job)

    def rows(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of tensor i's first dimension, read alone; not for mapped files."""
        self.check(i)
        if self._network is not None and (start, stop) == (0, self.layout.shape(i)[0]):
            whole: torch.Tensor = self._read_one(i)
            self.count(1, self.layout.nbytes(i))
            return whole
        first, last = plan_rows(self.layout, i, start, stop)
        self._require_room(last - first)
        result: torch.Tensor = self._empty(i, stop - start)
        begin = self.layout.extent(i)[0] + first
        self._run(*self._over([(begin, last - first, result)]), last - first)
        self.count(1, last - first)
        return result

    def _in_mode(self, i: int, for_slice: bool) -> torch.Tensor:
        """Tensor i by the same torch calls as stock's, for torch modes to act on.

        Over our own map, so that it shows what was changed in place through earlier tensors.
        """
        if self._network is not None:
            return self._read_in_mode(i, for_slice)
        if not self.mapped:
            raise Fallback("a torch mode or default device is in force")
        if self._storage is None:
            self._storage = tensors.whole_storage(self.map())
        return tensors.by_stocks_recipe(self._storage, self.layout, i, for_slice)

    def _read_in_mode(self, i: int, for_slice: bool) -> torch.Tensor:
        """The same over memory of its own, for a remote file, which stock cannot read."""
        layout, nbytes = self.layout, self.layout.nbytes(i)
        arena = engine.alloc_arena(max(nbytes, 1))
        self._run(arena, array("Q", (layout.extent(i)[0], nbytes, 0)), nbytes)
        alone = described([("", layout.dtype(i), layout.shape(i), nbytes)])
        return tensors.by_stocks_recipe(tensors.whole_storage(arena), alone, 0, for_slice)

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
                    if self._map is None:  # a signal handler may have made one
                        self._map = made
                found = self._map
        return found

    def keep_to(self, wanted: array[int]) -> None:
        """Keep the kernel from reading more of a mapped file than the given extents.

        Call it before the map is used.

        Args:
            wanted: flat triples (file offset, bytes, ignored) of these extents, by offset.
        """
        if self.config.io != "mmap":  # which leaves reading to the kernel
            self.map().keep_to(wanted)

    # ---- what torch does here, and NumPy in `ArrayFile` ----

    def _import(
        self,
        arena: engine.Arena,
        wanted: array[int] | None = None,
        offsets: array[int] | None = None,
    ) -> list[Any]:
        return tensors.import_batch(arena, self.layout, wanted, offsets)

    def _empty(self, i: int, rows: int | None = None) -> Any:
        return tensors.empty(self.layout, i, rows)

    def _over(self, places: Sequence[tuple[int, int, Any]]) -> tuple[engine.Arena, array[int]]:
        return places_in_arena(places)

    # ---- read into memory of our own ----

    def _require_room(self, nbytes: int) -> None:
        """Raise Fallback when a read does not fit the memory; stock's map needs none.

        Linux hands out more memory than there is, and kills a process that then writes to it.
        """
        taken = HostFile._taken = HostFile._taken + nbytes
        if taken < LOOK_EVERY:
            return
        headroom = engine.memory_headroom()
        threads, chunk_bytes = self._workers()
        if headroom is not None and nbytes + threads * max(chunk_bytes, HUGE_PAGE) > headroom:
            text = f"{nbytes} bytes do not fit the memory that is left ({headroom})"
            if self._network is not None:
                raise MemoryError(f"{self.file.path}: {text}")
            raise Fallback(text)
        HostFile._taken = 0

    def _read_one(self, i: int) -> Any:
        """Tensor i of a file without a map."""
        if self._network is not None:
            return self._network.take(self, i)
        return self._read([i])[0]

    def start(self, numbers: Iterable[int]) -> tuple[list[Any], engine.Job]:
        """Start reading tensors of a file without a map, ascending; they share the job."""
        made, arena, segments, nbytes = self._places(array("Q", numbers))
        self._require_room(nbytes)
        return made, self.read_into(arena, segments)

    def _read(self, wanted: Iterable[int]) -> list[Any]:
        chosen = array("Q", wanted)
        self._require_room(sum(map(self.layout.nbytes, chosen)))
        made, arena, segments, nbytes = self._places(chosen)
        self._run(arena, segments, nbytes)
        return made

    def _places(self, wanted: array[int]) -> tuple[list[Any], engine.Arena, array[int], int]:
        """Tensors over memory that is yet to be filled: tensors, arena, segments and bytes."""
        if self.owned:
            made = [self._empty(i) for i in wanted]
            places = [
                (self.layout.extent(i)[0], self.layout.nbytes(i), tensor)
                for i, tensor in zip(wanted, made, strict=True)
            ]
            return made, *self._over(places), sum(nbytes for _, nbytes, _ in places)
        plan = plan_arena(self.layout, wanted)
        arena = engine.alloc_arena(plan.arena_bytes)
        made = self._import(arena, plan.tensors, plan.offsets)
        return made, arena, plan.segments, plan.data_bytes

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

        With O_DIRECT a worker has no request at the disk while it copies what it has read. So
        there are more workers, and their chunks are small enough for all to stay in the CPU cache.
        """
        if self._network is not None:
            return ranges(self.config)
        threads, chunk_bytes = io_threads(self.config.threads), self.config.chunk_bytes
        if not self._direct or self.config.threads:
            return threads, chunk_bytes
        return 2 * threads, max(chunk_bytes // 4, CHUNK_MIN)

    def read_into(self, arena: engine.Arena, segments: array[int]) -> engine.Job:
        """Start reading extents into host memory."""
        threads, chunk_bytes = self._workers()
        return engine.read(
            self.file,
            arena,
            segments,
            threads=threads,
            chunk_bytes=chunk_bytes,
            mode="direct" if self._direct else "buffered",
            drop_cache=self.config.page_cache == "drop" and self._network is None,
        )

    def stop(self) -> None:
        """See `OpenedFile`."""
        if self._network is not None:
            self._network.stop()

    def note(self, job: engine.Job) -> None:
        """Put into the account how a finished job has read its bytes."""
        refused = job.stats().direct_errno
        if self._direct and refused:
            if self.account.path == "direct":
                self.account.path = "buffered"
            self.account.reason = f"O_DIRECT was refused ({os.strerror(refused)})"
