"""`ShardedFiles`: files opened by all ranks together, from which each takes its parts."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ..config import Config
from ..dropin.eligibility import fell_back
from ..errors import Fallback, RankError
from ..files.base import progress_bar
from ..files.cpu import HostFile
from ..machine import io_threads
from . import mapped
from .exchange import COMMON_UNIT, Exchange, Memory, move
from .groups import Group, PeerFailed, is_told
from .opening import open_together
from .requests import (
    Request,
    by_stock,
    cast,
    everything,
    flat,
    joined,
    part_bytes,
    parts_of,
    takes_of,
    verify,
)
from .schedule import Key, split
from .shared_buffer import Offer, SharedBuffer
from .source import Source
from .spec import Owner, Plan, Region, Shard, rules_of, take_of
from .steps import circle_of, steps_of

if TYPE_CHECKING:
    import torch

__all__ = ["ShardedFiles"]

SETTLED = 8 << 30
"""Bytes of files after which ranks that exchange nothing tell each other how it goes."""


class ShardedFiles:
    """Files opened by the ranks of a group, headers compared; each rank takes its parts.

    Tensors own their memory and outlive this object. Methods marked collective are called by
    all ranks in the same order.

    Attributes:
        group: the ranks.
        config: in force for the files.
        sources: these, in the order in which they were named.
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
            files: paths, the same on all ranks; or by rank, as fastsafetensors has it, which
                makes no difference to who reads them; or why this rank cannot see what lists
                them: it takes the others' word then.
            group: the ranks.
            device: where tensors go: a torch.device, its text, or the number of a CUDA device;
                None: the CPU. ``"cuda"`` is the current device.
            config: in force for the files.
            read_once: ``node``: every node reads what its ranks need once; ``job``: one rank of
                all reads it, and the network carries it to the others.
            contiguous: copy parts of maps that are not complete rows.
            call: for reports.

        Raises:
            RankError: a rank failed, nobody sees a file, or ranks see different files.
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
        self._refused = opening.refused
        self._mapped_everywhere = opening.mapped
        self._unit_bytes = opening.unit_bytes
        self._read_once = opening.read_once
        target = opening.target
        self._memory = Memory(target)
        self._commons = SharedBuffer(group)

    # ---- what is there ----

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
        return self.sources[number].describe(i)

    def close(self) -> None:
        """Report what was taken, and let go of the files. Tensors stay."""
        target = self._memory.target
        for source in self.sources:
            account = source.account
            if self._refused is not None and source.fallback is None:
                account.path, account.reason, account.resident = "stock", self._refused, None
            if account.seconds:
                account.emit(self._call, source.path, "cpu" if target is None else target.name)
            source.close()
        self._commons.close()

    def __enter__(self) -> ShardedFiles:
        """Return the object itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()

    # ---- taking ----

    def local(self, name: str) -> bool:
        """Whether `take` of a tensor needs no other rank: it comes from the file's map."""
        number, _ = self._where[name]
        return self._is_local(self.sources[number])

    def _is_local(self, source: Source) -> bool:
        return self.group.size == 1 or (source.fallback is None and self._from_map(source))

    def take(self, name: str, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
        """This rank's part of a tensor. Collective unless it is `local`.

        Args:
            name: of the tensor.
            dim: the dimension to be cut as ``torch.chunk`` does; -1: the whole tensor.
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
            rule, size = None if dim == -1 else dim, self.group.size
            takes = [take_of(rule, name, shape, rank, size) for rank in range(size)]
        except Exception as error:
            self.refuse(name, error)
        result = self._one(name, takes, dtype, f"takes tensor {name!r}, dim={dim}")
        assert result is not None  # every rank takes its part
        return result

    def push(
        self, name: str, dst_rank: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor | None:
        """The whole tensor for one rank, None for the others. Collective unless `local`."""
        try:
            shape, _ = self.describe(name)
            rule, size = Owner(dst_rank), self.group.size
            takes = [take_of(rule, name, shape, rank, size) for rank in range(size)]
        except Exception as error:
            self.refuse(name, error)
        if takes[self.group.rank] is None and self.local(name):
            return None
        return self._one(name, takes, dtype, f"pushes tensor {name!r} to rank {dst_rank}")

    def refuse(self, name: str, error: Exception) -> NoReturn:
        """Raise an error of arguments, on all ranks where others wait for us to take a tensor.

        Args:
            name: of the tensor that was asked for, which may not exist.
            error: what is wrong here; raised itself where all ranks are wrong in the same way.

        Raises:
            RankError: otherwise, where taking is collective.
        """
        alone = (
            self.local(name)
            if name in self._where
            else all(self._is_local(source) for source in self.sources)
        )
        if not alone:
            self.group.agree(error)
        raise error

    def _one(
        self, name: str, takes: Sequence[Shard | None], dtype: torch.dtype | None, said: str
    ) -> torch.Tensor | None:
        number, i = self._where[name]
        source, mine = self.sources[number], takes[self.group.rank]
        needs = [array("q", (0, 0) if take is None else take.rows) for take in takes]
        request = Request({} if mine is None else {i: mine}, needs, dtype, (i,), said)
        return self._load_file(source, request, every=not self.local(name)).get(i)

    def read_ahead(self) -> None:
        """Start reading ahead what is taken from maps, each rank of a node a share of it.

        For callers that take tensor by tensor. Not collective; ends by itself when memory is
        short, or nobody uses the files any more.
        """
        everything = Request(None, [()] * self.group.size, None, None)
        for number in range(len(self.sources)):
            self._read_ahead(number, everything, cold=True)

    def load(self, plan: Plan = None, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """This rank's parts of all tensors, in file order. Collective.

        Args:
            plan: see `rules`; ranks may have different ones.
            dtype: for all floating tensors, cast where they go.

        Raises:
            RankError: a rank failed; its plan, reading, memory.
        """
        group = self.group
        mine: list[dict[int, Shard] | None] = []
        flats: list[Any] = []
        cold: list[bool] = []  # looked at before anybody reads
        with group.phase() as phase:
            rules = rules_of(plan, self._described, self._where, group.size)
            for source in self.sources:
                takes = takes_of(source, rules, group.rank, group.size)
                mine.append(takes)
                flats.append(flat(source, takes))
                cold.append(self._reads_ahead(source) and _host(source).ahead_of.cold())
            phase.value = flats, cold
        requests = [
            Request(takes, [flats[number] for flats, _ in phase.told], dtype, None)
            for number, takes in enumerate(mine)
        ]
        cold = [any(some) for some in zip(*(one for _, one in phase.told), strict=True)]
        problem: BaseException | None = None
        result: dict[str, torch.Tensor] = {}
        unsettled = 0
        with self._bar(requests) as advance:
            for number, source in enumerate(self.sources):
                found: dict[int, torch.Tensor] = {}
                try:
                    if problem is None:
                        # The next file, too, so that storage does not wait while parts are copied.
                        for ahead in range(number and number + 1, min(number + 2, len(cold))):
                            self._read_ahead(ahead, requests[ahead], cold[ahead])
                        found = self._load_file(source, requests[number], every=False)
                except PeerFailed:
                    result.clear()
                except BaseException as error:
                    if is_told(error):
                        raise
                    problem = error
                    result.clear()
                result.update((source.names[i], found[i]) for i in sorted(found))
                unsettled += SETTLED if source.fallback is not None else source.layout.data_bytes
                if self._must_settle(number, unsettled):
                    unsettled = 0
                    try:
                        group.agree(problem)
                    finally:
                        if problem is not None:
                            found.clear()
                        problem = None  # and with it the frame that its traceback keeps
                advance(sum(tensor.nbytes for tensor in result.values()))
        return result

    def _must_settle(self, number: int, unsettled: int) -> bool:
        """Whether ranks agree on errors after a file: each round of that costs milliseconds.

        Not while all take from maps, where nobody waits for another.

        Args:
            number: of the file.
            unsettled: bytes of the files since they last did, this one's included.
        """
        here = self.sources[number : number + 2]
        return len(here) < 2 or unsettled >= SETTLED or not all(map(self._from_map, here))

    @contextlib.contextmanager
    def _bar(self, requests: Sequence[Request]) -> Iterator[Callable[[int], None]]:
        if not self.config.progress:
            yield lambda done: None
            return
        with progress_bar(self._call, sum(
            part_bytes(source, request.takes)
            for source, request in zip(self.sources, requests, strict=True)
        )) as advance:  # fmt: skip
            yield advance

    def _described(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            name: one
            for source in self.sources
            for name, one in zip(source.names, source.described, strict=True)
        }

    # ---- one file ----

    def _load_file(
        self, source: Source, request: Request, *, every: bool
    ) -> dict[int, torch.Tensor]:
        """What this rank takes of one file's tensors.

        Args:
            source: the file.
            request: what is wanted.
            every: whether all ranks take part in this, to agree on errors.
        """
        started = time.perf_counter()
        if every:
            with self.group.phase() as phase:
                result = self._taken(source, request)
                phase.value = request.said, None
            _check_alike(phase.told)
        else:
            result = self._taken(source, request)
        account = source.account
        account.bytes += sum(tensor.nbytes for tensor in result.values())
        account.tensors += len(result)
        account.seconds += time.perf_counter() - started
        return result

    def _taken(self, source: Source, request: Request) -> dict[int, torch.Tensor]:
        fallback = source.fallback or self._refused
        takes, dtype = request.takes, request.dtype
        if takes is None and fallback is None and dtype is None and self._from_map(source):
            result = dict(enumerate(mapped.take_all(_host(source))))
        else:
            takes = everything(source) if takes is None else takes
            found = self._parts(source, request, parts_of(takes))
            result = {i: joined(found, i, take) for i, take in takes.items()}
        if self.config.verify and fallback is None and source.opened is not None:
            takes = everything(source) if takes is None else takes
            verify(source, takes, result, dtype, device=self._device, config=self.config)
        return result

    def _parts(
        self, source: Source, request: Request, parts: dict[Key, Region]
    ) -> dict[Key, torch.Tensor]:
        fallback = source.fallback or self._refused
        if fallback is not None:
            found = by_stock(source, parts, request.dtype, self._device)
            fell_back(self.config, self._call, source.path, Fallback(fallback))
            return found
        if not self._from_map(source):
            return self._moved(source, request, parts)
        found = mapped.take(_host(source), source.extents, parts, self._contiguous)
        for key, tensor in found.items():
            wanted = cast(tensor.dtype, request.dtype)
            if wanted != tensor.dtype:
                found[key] = tensor.to(wanted)
        return found

    def _from_map(self, source: Source) -> bool:
        """Whether all ranks take a file's tensors from its map, and exchange nothing."""
        by_network = self._read_once == "job" and len(set(self.group.nodes)) > 1
        seen = len(source.readers) == self.group.size
        return seen and self._mapped_everywhere and not by_network

    def _reads_ahead(self, source: Source) -> bool:
        return source.fallback is None and self._refused is None and self._from_map(source)

    def _read_ahead(self, number: int, request: Request, cold: bool) -> None:
        """Start reading ahead this rank's share of what the node wants of a file.

        Args:
            number: of the file.
            request: of all ranks.
            cold: whether a rank found something missing; else one of them makes sure, of all.
        """
        source, ranks = self.sources[number], self.group.node_ranks
        turn = ranks.index(self.group.rank)
        if not self._reads_ahead(source) or not (cold or turn == number % len(ranks)):
            return
        opened = _host(source)
        if len(ranks) == 1 and request.takes is None:
            opened.ahead_of.everything(opened.map())
            return
        needs = [request.needs[rank] for rank in ranks]
        alone, shared = split(source.extents, needs, range(len(ranks)))
        wanted = mapped.wanted(source.extents, alone, shared)
        opened.keep_to(wanted.flat)
        if cold:
            wanted = mapped.share(source.extents, alone[turn], shared, turn, len(ranks))
        threads = io_threads(self.config.threads)
        opened.ahead_of.extents(opened.map(), wanted, max(threads // len(ranks), 2))

    def _moved(
        self, source: Source, request: Request, parts: dict[Key, Region]
    ) -> dict[Key, torch.Tensor]:
        """Read into memory of our own, each byte by one rank of those that exchange."""
        group = self.group
        results: dict[Key, torch.Tensor] = {}
        wish, common_bytes = Offer(), 0
        try:
            with group.phase() as phase:
                circle = circle_of(source, group, self._read_once)
                in_common = self._memory.target is None and self._commons.possible(circle.ranks)
                unit_bytes = min(self._unit_bytes, COMMON_UNIT) if in_common else self._unit_bytes
                steps, leaves_out = steps_of(source, circle, request, parts, unit_bytes)
                if leaves_out and source.opened is not None:
                    source.opened.file.read_exactly()
                for key, part in parts.items():
                    wanted = cast(source.describe(key[0])[1], request.dtype)
                    results[key] = self._memory.empty(part.size, wanted)
                mover = Exchange(source, circle, self._memory, steps, parts=parts, results=results)
                if in_common:
                    common_bytes = mover.common_bytes
                    wish = self._commons.wish(common_bytes)
                mover.allocate(shared=not common_bytes)
                phase.value = request.said, (len(steps), wish)
            told = _check_alike(phase.told)
            wishes = [wish for _, wish in told]
            everywhere = not any(wish.nbytes for wish in wishes) or self._commons.settle(wishes)
            memory = self._commons.tensor(common_bytes)
            if memory is not None:
                mover.share(memory)
            if not everywhere:  # some rank has no memory in common, and needs buffers of its own
                with group.phase():
                    if common_bytes and memory is None:
                        mover.allocate()
            mover.connect()
            move(mover, max(count for count, _ in told), group)
        except BaseException:
            results.clear()
            self._commons.withdraw()
            raise
        return results


def _check_alike(told: Sequence[tuple[str | None, Any]]) -> list[Any]:
    """Make sure that all ranks ask for the same, or they would mix up tensors.

    Args:
        told: what each rank asks for, in words, and a value, which is returned.

    Raises:
        RankError: alike on all ranks, a rank asks for something else.
    """
    said = told[0][0]
    for rank, (theirs, _) in enumerate(told):
        if theirs != said:
            raise RankError(
                rank,
                f"it {theirs}, where rank 0 {said}; all ranks take the same tensors in the same"
                " order",
            )
    return [value for _, value in told]


def _host(source: Source) -> HostFile:
    """The file of a source that is mapped."""
    assert isinstance(source.opened, HostFile)
    return source.opened
