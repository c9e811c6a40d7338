"""`ShardedFiles`: files opened by all ranks together, of which each rank takes its shards."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .. import tensors
from ..config import Config
from ..dropin.eligibility import fell_back
from ..errors import Fallback, FaststError
from ..files.base import progress_bar
from ..files.remote import naming, shown
from .exchange import SHARED_BUFFER_UNIT, Exchange, Memory, Subgroup, plan_steps
from .groups import Group, PeerFailed, is_agreed
from .mapped import host_file, read_ahead, take_regions
from .opening import open_together
from .requests import (
    Request,
    check_same_requests,
    join_regions,
    load_by_stock,
    needed_rows,
    regions_of,
    requested_bytes,
    result_dtype,
    shards_of,
    verify,
    whole_tensors,
)
from .schedule import Key
from .shared_buffer import Offer, SharedBuffer
from .source import Source
from .spec import Owner, Plan, Region, Shard, ShardSpec, shard_of, specs_of

if TYPE_CHECKING:
    import torch

__all__ = ["ShardedFiles"]

AGREE_BYTES = 8 << 30
"""Bytes of files after which ranks that exchange nothing agree on errors."""


@contextlib.contextmanager
def _naming(source: Source) -> Iterator[None]:
    """Let errors name the file. A device's driver that fails is one here: stock loads no shards."""
    name = shown(source.path)
    try:
        with naming(name):
            yield
    except Fallback as fallback:
        raise FaststError(f"{name}: {fallback.reason}") from None


class ShardedFiles:
    """Files opened by the ranks of a group, headers compared; each rank takes its shards.

    Tensors own their memory and outlive this object. All ranks call the methods marked collective
    in the same order.

    Attributes:
        group: the ranks.
        config: in force for the files.
        sources: the files, in the order in which they were named.
    """

    def __init__(
        self,
        files: Mapping[int, Sequence[str]] | Sequence[str] | FileNotFoundError,
        group: Group,
        device: object,
        config: Config,
        *,
        read_once: str = "node",
        contiguous: bool = True,
        call: str = "load_sharded",
    ) -> None:
        """Open files. Collective.

        Args:
            files: paths, the same on all ranks; or paths by rank, as fastsafetensors has it, which
                has no effect on which rank reads them; or the error of a rank that cannot see the
                folder or index that lists the files: it uses the other ranks' paths.
            group: the ranks.
            device: where tensors go: a torch.device, its text, or the number of a CUDA device;
                None: the CPU. ``"cuda"`` is the current device.
            config: in force for the files.
            read_once: ``node``: every node reads what its ranks need once; ``job``: one rank of
                all reads it, and the network carries it to the others.
            contiguous: copy regions of maps that are not complete rows.
            call: for reports.

        Raises:
            RankError: a rank failed, no rank sees a file, or ranks see different files.
            NameClashError: a name is in two files.
            ValueError: an argument is wrong on all ranks, or they load to devices of several
                kinds.
        """
        self.group = group
        self.config = config
        self._call = call
        self._contiguous = contiguous
        opening = open_together(files, group, device, config, read_once)
        self.sources = opening.sources
        self._where = opening.where
        self._device = opening.device
        self._fallback = opening.fallback
        self._mapped_everywhere = opening.mapped
        self._unit_bytes = opening.unit_bytes
        self._read_once = opening.read_once
        self._memory = Memory(opening.target)
        self._shared_buffer = SharedBuffer(group)

    # ---- names and shapes ----

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self._where)

    def where(self, name: str) -> tuple[str, int]:
        """Path of the file that holds a tensor, and the tensor's number there. Raises KeyError."""
        number, i = self._where[name]
        return self.sources[number].path, i

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, as torch holds it. Raises KeyError."""
        number, i = self._where[name]
        return self.sources[number].described[i]

    def close(self) -> None:
        """Report the loaded tensors, and close the files. Tensors stay valid."""
        target = self._memory.target
        for source in self.sources:
            account = source.account
            if self._fallback is not None and source.fallback is None:
                account.path, account.reason, account.resident = "stock", self._fallback, None
            if account.seconds:
                where = "cpu" if target is None else target.name
                account.emit(self._call, shown(source.path), where)
            source.close()
        self._shared_buffer.close()

    def __enter__(self) -> ShardedFiles:
        """Return the object itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()

    # ---- one tensor ----

    def local(self, name: str) -> bool:
        """Whether `take` of a tensor needs no other rank: it comes from the file's map."""
        number, _ = self._where[name]
        return self._is_local(self.sources[number])

    def _is_local(self, source: Source) -> bool:
        return self.group.size == 1 or (source.fallback is None and self._from_map(source))

    def take(self, name: str, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
        """This rank's shard of a tensor. Collective unless the tensor is `local`.

        Args:
            name: of the tensor.
            dim: the dimension to shard as ``torch.chunk`` does; -1: the whole tensor.
            dtype: to cast to.

        Raises:
            KeyError: there is no such tensor.
            ValueError: it has no such dimension.
            RankError: a rank failed.
        """
        try:
            shape, _ = self.describe(name)
            if not -1 <= dim < max(len(shape), 1):
                raise ValueError(
                    f"tensor {name!r} of shape {list(shape)}: dim={dim} is not one of its"
                    " dimensions, nor -1 for the whole tensor"
                )
            shards = self._shards(name, None if dim == -1 else dim)
        except Exception as error:
            self.refuse(name, error)
        result = self._take(name, shards, dtype, f"takes tensor {name!r}, dim={dim}")
        assert result is not None  # every rank takes a shard
        return result

    def push(
        self, name: str, dst_rank: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor | None:
        """The whole tensor on one rank, None on the others. Collective unless `local`."""
        try:
            shards = self._shards(name, Owner(dst_rank))
        except Exception as error:
            self.refuse(name, error)
        if shards[self.group.rank] is None and self.local(name):
            return None
        return self._take(name, shards, dtype, f"pushes tensor {name!r} to rank {dst_rank}")

    def refuse(self, name: str, error: Exception) -> NoReturn:
        """Raise an error of this rank's arguments, also on ranks that wait for it to take a tensor.

        Args:
            name: of the requested tensor, which may not exist.
            error: raised itself where all ranks have the same one, or where taking is `local`.

        Raises:
            RankError: otherwise.
        """
        local = (
            self.local(name)
            if name in self._where
            else all(self._is_local(source) for source in self.sources)
        )
        if not local:
            self.group.agree(error)
        raise error

    def _shards(self, name: str, spec: ShardSpec) -> list[Shard | None]:
        """The shard of each rank."""
        shape, _ = self.describe(name)
        size = self.group.size
        return [shard_of(spec, name, shape, rank, size) for rank in range(size)]

    def _take(
        self, name: str, shards: Sequence[Shard | None], dtype: torch.dtype | None, description: str
    ) -> torch.Tensor | None:
        number, i = self._where[name]
        source, mine = self.sources[number], shards[self.group.rank]
        needs = [array("q", (0, 0) if shard is None else shard.rows) for shard in shards]
        request = Request({} if mine is None else {i: mine}, needs, dtype, (i,), description)
        return self._load_file(source, request, agree=not self.local(name)).get(i)

    def read_ahead(self) -> None:
        """Start reading ahead the files that are mapped, each rank of a node a share of them.

        For callers that take tensor by tensor. Not collective. It ends by itself when memory is
        short, or when the files and their tensors are gone.
        """
        everything = Request(None, [()] * self.group.size, None, None)
        for number in range(len(self.sources)):
            self._read_ahead(number, everything, cold=True)

    # ---- all tensors ----

    def load(self, plan: Plan = None, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """This rank's shards of all tensors, in file order. Collective.

        Args:
            plan: see the module `spec`; ranks may have different plans.
            dtype: for all floating tensors, cast where they go.

        Raises:
            RankError: a rank failed: its plan, reading, or memory.
        """
        requests, cold = self._gather_requests(plan, dtype)
        problem: BaseException | None = None
        result: dict[str, torch.Tensor] = {}
        not_agreed = 0  # bytes of files since ranks last agreed on errors
        with self._bar(requests) as advance:
            for number, source in enumerate(self.sources):
                found: dict[int, torch.Tensor] = {}
                try:
                    if problem is None:
                        # The next file, too: storage is not idle while this one's are copied.
                        first = 0 if number == 0 else number + 1
                        for ahead in range(first, min(number + 2, len(cold))):
                            self._read_ahead(ahead, requests[ahead], cold[ahead])
                        found = self._load_file(source, requests[number], agree=False)
                except PeerFailed:
                    result.clear()
                except BaseException as error:
                    if is_agreed(error):
                        raise
                    problem = error
                    result.clear()
                result.update((source.names[i], found[i]) for i in sorted(found))
                not_agreed += (
                    AGREE_BYTES if source.fallback is not None else source.layout.data_bytes
                )
                if self._must_agree(number, not_agreed):
                    not_agreed = 0
                    try:
                        self.group.agree(problem)
                    finally:
                        if problem is not None:
                            found.clear()
                        problem = None  # its traceback refers to this frame
                advance(sum(tensor.nbytes for tensor in result.values()))
        return result

    def _gather_requests(
        self, plan: Plan, dtype: torch.dtype | None
    ) -> tuple[list[Request], list[bool]]:
        """All ranks' requests for each file, and whether any rank finds it cold. Collective."""
        group = self.group
        mine: list[dict[int, Shard] | None] = []
        needs: list[Any] = []
        cold: list[bool] = []  # found out before any rank reads
        with group.phase() as phase:
            specs = specs_of(plan, self._described, self._where, group.size)
            for source in self.sources:
                shards = shards_of(source, specs, group.rank, group.size)
                mine.append(shards)
                needs.append(needed_rows(source, shards))
                cold.append(self._reads_ahead(source) and host_file(source).ahead_of.cold())
            phase.value = needs, cold
        requests = [
            Request(shards, [needs[number] for needs, _ in phase.gathered], dtype, None)
            for number, shards in enumerate(mine)
        ]
        return requests, [
            any(some) for some in zip(*(one for _, one in phase.gathered), strict=True)
        ]

    def _must_agree(self, number: int, not_agreed: int) -> bool:
        """Whether ranks agree on errors after a file: each agreement costs milliseconds.

        They need not while all tensors come from maps, where no rank waits for another.

        Args:
            number: of the file.
            not_agreed: bytes of the files since the last agreement, including this one.
        """
        here = self.sources[number : number + 2]
        return len(here) < 2 or not_agreed >= AGREE_BYTES or not all(map(self._from_map, here))

    @contextlib.contextmanager
    def _bar(self, requests: Sequence[Request]) -> Iterator[Callable[[int], None]]:
        if not self.config.progress:
            yield lambda done: None
            return
        total = sum(
            requested_bytes(source, request.shards)
            for source, request in zip(self.sources, requests, strict=True)
        )
        with progress_bar(self._call, total) as advance:
            yield advance

    def _described(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            name: one
            for source in self.sources
            for name, one in zip(source.names, source.described, strict=True)
        }

    # ---- one file ----

    def _load_file(
        self, source: Source, request: Request, *, agree: bool
    ) -> dict[int, torch.Tensor]:
        """This rank's shards of one file, by tensor.

        Args:
            source: the file.
            request: of all ranks.
            agree: whether all ranks call this, and agree on errors.
        """
        started = time.perf_counter()
        if agree:
            with self.group.phase() as phase:
                with _naming(source):
                    result = self._load_shards(source, request)
                phase.value = request.description
            check_same_requests(phase.gathered)
        else:
            with _naming(source):
                result = self._load_shards(source, request)
        account = source.account
        account.bytes += sum(tensor.nbytes for tensor in result.values())
        account.tensors += len(result)
        account.seconds += time.perf_counter() - started
        return result

    def _load_shards(self, source: Source, request: Request) -> dict[int, torch.Tensor]:
        fallback = source.fallback or self._fallback
        shards, dtype = request.shards, request.dtype
        if shards is None and fallback is None and dtype is None and self._from_map(source):
            opened = host_file(source)
            result = dict(enumerate(tensors.import_batch(opened.map(), opened.layout)))
        else:
            shards = whole_tensors(source) if shards is None else shards
            found = self._load_regions(source, request, regions_of(shards))
            result = {i: join_regions(found, i, shard) for i, shard in shards.items()}
        if self.config.verify and fallback is None and source.opened is not None:
            shards = whole_tensors(source) if shards is None else shards
            verify(source, shards, result, dtype, device=self._device, config=self.config)
        return result

    def _load_regions(
        self, source: Source, request: Request, regions: dict[Key, Region]
    ) -> dict[Key, torch.Tensor]:
        fallback = source.fallback or self._fallback
        if fallback is not None:
            found = load_by_stock(source, regions, request.dtype, self._device)
            fell_back(self.config, self._call, source.path, Fallback(fallback))
            return found
        if not self._from_map(source):
            return self._exchange(source, request, regions)
        found = take_regions(host_file(source), source.extents, regions, self._contiguous)
        for key, tensor in found.items():
            wanted = result_dtype(tensor.dtype, request.dtype)
            if wanted != tensor.dtype:
                found[key] = tensor.to(wanted)
        return found

    def _from_map(self, source: Source) -> bool:
        """Whether all ranks take a file's tensors from its map, and exchange nothing."""
        by_network = self._read_once == "job" and len(set(self.group.nodes)) > 1
        seen = len(source.readers) == self.group.size
        return seen and self._mapped_everywhere and not by_network

    def _reads_ahead(self, source: Source) -> bool:
        return source.fallback is None and self._fallback is None and self._from_map(source)

    def _read_ahead(self, number: int, request: Request, cold: bool) -> None:
        """Start reading ahead a file; where it is not cold, one rank of the node does so alone."""
        source, ranks = self.sources[number], self.group.node_ranks
        turn = ranks.index(self.group.rank)
        if self._reads_ahead(source) and (cold or turn == number % len(ranks)):
            read_ahead(source, request, ranks, turn, cold)

    def _exchange(
        self, source: Source, request: Request, regions: dict[Key, Region]
    ) -> dict[Key, torch.Tensor]:
        """Read regions into memory of our own; one rank of a subgroup reads each byte."""
        group, buffer = self.group, self._shared_buffer
        results: dict[Key, torch.Tensor] = {}
        offer, buffer_bytes = Offer(), 0
        try:
            with group.phase() as phase, _naming(source):
                subgroup = Subgroup.of(source, group, self._read_once)
                share = self._memory.target is None and buffer.possible(subgroup.ranks)
                size = min(self._unit_bytes, SHARED_BUFFER_UNIT) if share else self._unit_bytes
                steps, leaves_out = plan_steps(source, subgroup, request, regions, size)
                if leaves_out and source.opened is not None:
                    source.opened.file.read_exactly()
                for key, region in regions.items():
                    wanted = result_dtype(source.described[key[0]][1], request.dtype)
                    results[key] = self._memory.empty(region.size, wanted)
                exchange = Exchange(
                    source, subgroup, self._memory, steps, regions=regions, results=results
                )
                if share:
                    buffer_bytes = exchange.shared_buffer_bytes
                    offer = buffer.offer(buffer_bytes)
                exchange.allocate(shared=not buffer_bytes)
                phase.value = request.description, len(steps), offer
            check_same_requests([description for description, _, _ in phase.gathered])
            count = max(count for _, count, _ in phase.gathered)
            offers = [one for _, _, one in phase.gathered]
            everywhere = not any(one.nbytes for one in offers) or buffer.accept(offers)
            memory = buffer.tensor(buffer_bytes)
            if memory is not None:
                exchange.use_shared_buffer(memory)
            if not everywhere:  # ranks without shared memory need buffers of their own
                with group.phase(), _naming(source):
                    if buffer_bytes and memory is None:
                        exchange.allocate()
            exchange.connect()
            exchange.run(count)
        except BaseException:
            results.clear()
            buffer.withdraw()
            raise
        return results
