"""`ShardedFiles`: files opened by all ranks together, from which each takes its parts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import device as devices
from ..config import Config
from ..decide import complain, fell_back, same
from ..errors import Doubt
from ..machine import io_threads
from ..onhost import HostFile
from ..report import LoadReport, emit
from . import mapped
from .exchange import Circle, Memory, Mover, Step, move
from .groups import Group
from .rules import Owner, Part, Plan, Rule, Take, rules_of, take_of
from .schedule import Key, Rows, pack, split
from .sources import Source, open_sources
from .taking import everything, flat, joined

if TYPE_CHECKING:
    import torch

__all__ = ["ShardedFiles"]

MIB = 1 << 20
UNIT = 32 * MIB
"""Bytes that are exchanged at a time. Four units and as many parts are in use at once; with
half of `device_memory_budget` as their bound, small budgets make small units."""


class ShardedFiles:
    """Files opened by the ranks of a group, headers compared; each rank takes its parts.

    Tensors own their memory and outlive this object. Methods marked collective are called by
    all ranks in the same order.

    Attributes:
        group: the ranks.
        sources: the files, in the order in which they were named.
    """

    def __init__(
        self,
        files: Mapping[int, Sequence[str]] | Sequence[str],
        group: Group,
        device: object,
        config: Config,
        *,
        read_once: str = "node",
        call: str = "load_sharded",
    ) -> None:
        """Open files. Collective.

        Args:
            files: paths, the same on all ranks; or by rank, as fastsafetensors has it, which
                makes no difference to who reads them.
            group: the ranks.
            device: where tensors go: a torch.device, its text, or the number of a CUDA device;
                None: the CPU. ``"cuda"`` is the current device.
            config: in force for the files.
            read_once: ``node``: every node reads what its ranks need once; ``job``: one rank of
                all reads it, and the network carries it to the others.
            call: for reports.

        Raises:
            RankError: a rank failed, nobody sees a file, ranks see different files, or a name
                is in two files.
            ValueError: ``read_once`` is something else.
        """
        if read_once not in ("node", "job"):
            raise ValueError(f"read_once={read_once!r}: allowed are 'node' and 'job'")
        self.group = group
        self._config = config
        self._call = call
        paths = _in_turn(files) if isinstance(files, Mapping) else list(files)
        self._target: devices.Target | None = None
        self._refused: str | None = None
        problem: BaseException | None = None
        try:
            self._device = _named(device)
            self._target = _target_of(self._device)
        except Doubt as doubt:
            self._refused = doubt.reason
        except BaseException as error:
            problem = error
        refusals = group.agree(problem, self._refused)
        self._refused = next((said for said in refusals if said is not None), None)
        self._memory = Memory(self._target)
        self.sources: list[Source] = open_sources(paths, group, config, self._target)
        self._where: dict[str, tuple[int, int]] = {}
        problem = None
        for number, source in enumerate(self.sources):
            for i, name in enumerate(source.names):
                if name in self._where:
                    other = self.sources[self._where[name][0]].path
                    problem = ValueError(
                        f"tensor {name!r} is in two files, {other} and {source.path}; names"
                        " must be unique"
                    )
                self._where[name] = number, i
        mapped = all(source.mapped for source in self.sources if source.opened is not None)
        kind = "the CPU" if self._target is None else "a device"
        told = group.agree(problem, (mapped, self._own_unit_bytes(), read_once, kind))
        # Options may differ: what all must do alike is settled here.
        self._mapped_everywhere = all(one[0] for one in told)
        self._unit_bytes = min(one[1] for one in told)
        self._read_once = "job" if any(one[2] == "job" for one in told) else "node"
        if len({one[3] for one in told}) > 1 and self._refused is None:
            raise ValueError(
                f"some ranks load to {told[0][3]} and others do not; what they exchange must be"
                " on devices of one kind"
            )

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
        """Let go of the files. Tensors stay."""
        for source in self.sources:
            source.close()

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
        source = self.sources[number]
        return self.group.size == 1 or (source.doubt is None and self._from_map(source))

    def take(self, name: str, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
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
        shape, _ = self.describe(name)
        if dim < -1:
            raise ValueError(f"tensor {name!r}: dim is -1 for the whole tensor, or 0 and more")
        rule = None if dim == -1 else dim
        size = self.group.size
        takes = [take_of(rule, name, shape, rank, size) for rank in range(size)]
        result = self._one(name, takes, dtype)
        assert result is not None  # every rank takes its part
        return result

    def push(
        self, name: str, dst_rank: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor | None:
        """The whole tensor for one rank, None for the others. Collective unless `local`."""
        shape, _ = self.describe(name)
        rule, size = Owner(dst_rank), self.group.size
        takes = [take_of(rule, name, shape, rank, size) for rank in range(size)]
        if takes[self.group.rank] is None and self.local(name):
            return None
        return self._one(name, takes, dtype)

    def _one(
        self, name: str, takes: Sequence[Take | None], dtype: torch.dtype | None
    ) -> torch.Tensor | None:
        number, i = self._where[name]
        needs = [{i: take} if take is not None else {} for take in takes]
        source = self.sources[number]
        wanted = [flat(source, need) for need in needs]
        mine, every = needs[self.group.rank], not self.local(name)
        found = self._load_file(source, mine, wanted, dtype, every=every)
        return found.get(i)

    def load(self, plan: Plan = None, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """This rank's parts of all tensors, in file order. Collective.

        Args:
            plan: see `rules`; ranks may have different ones.
            dtype: for all floating tensors, cast where they go.

        Raises:
            RankError: a rank failed; its plan, reading, memory.
        """
        group = self.group
        problem: BaseException | None = None
        mine: list[dict[int, Take] | None] = []
        flats: list[Any] = []
        try:
            rules = rules_of(plan, self._described, self._where, group.size)
            for source in self.sources:
                takes = self._takes(source, rules)
                mine.append(takes)
                flats.append(flat(source, takes))
        except BaseException as error:
            problem = error
        told = group.agree(problem, flats)
        result: dict[str, torch.Tensor] = {}
        for number, source in enumerate(self.sources):
            needs = [flats[number] for flats in told]
            found = self._load_file(source, mine[number], needs, dtype, every=True)
            result.update((source.names[i], found[i]) for i in sorted(found))
        return result

    def _described(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            name: one
            for source in self.sources
            for name, one in zip(source.names, source.described, strict=True)
        }

    def _takes(self, source: Source, rules: Mapping[str, Rule]) -> dict[int, Take] | None:
        """What this rank takes of a file, by tensor; None for all of it."""
        wanted = [rules.get(name) for name in source.names]
        if all(rule is None or rule == "replicate" for rule in wanted):
            return None
        rank, size = self.group.rank, self.group.size
        takes = {}
        for i, (rule, name) in enumerate(zip(wanted, source.names, strict=True)):
            take = take_of(rule, name, source.describe(i)[0], rank, size)
            if take is not None:
                takes[i] = take
        return takes

    # ---- one file ----

    def _load_file(
        self,
        source: Source,
        takes: dict[int, Take] | None,
        needs: Sequence[Sequence[int]],
        dtype: torch.dtype | None,
        *,
        every: bool,
    ) -> dict[int, torch.Tensor]:
        """What this rank takes of one file's tensors.

        Args:
            source: the file.
            takes: by tensor; None for all of it.
            needs: of every rank, as `schedule.split` takes them.
            dtype: to cast floating tensors to.
            every: whether all ranks take part in this, to agree on errors.
        """
        started = time.perf_counter()
        doubt = source.doubt or self._refused
        from_map = doubt is None and self._from_map(source)
        zero_copy = takes is None and from_map and dtype is None
        if takes is None:
            takes = {} if zero_copy else everything(source)
        parts = {(i, k): part for i, take in takes.items() for k, part in enumerate(take.parts)}
        found: dict[Key, torch.Tensor] = {}
        problem: BaseException | None = None
        if doubt is None and not from_map:
            found = self._moved(source, parts, needs, dtype)
        else:
            try:
                if doubt is not None:
                    found = self._by_stock(source, parts, dtype)
                    fell_back(self._config, self._call, source.path, Doubt(doubt))
                elif zero_copy:
                    found = self._all_mapped(source, needs)
                else:
                    found = self._mapped(source, parts, needs, dtype)
            except BaseException as error:
                if not every:
                    raise
                problem = error
            if every:
                self.group.agree(problem)
        if self._config.verify and doubt is None and source.opened is not None:
            every_part = parts or {(i, 0): take.parts[0] for i, take in everything(source).items()}
            self._verify(source, every_part, found, dtype)
        if zero_copy:
            result = {i: tensor for (i, _), tensor in found.items()}
        else:
            result = {i: joined(found, i, take) for i, take in takes.items()}
        self._report(source, result, time.perf_counter() - started)
        return result

    def _verify(
        self,
        source: Source,
        parts: dict[Key, Part],
        found: dict[Key, torch.Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        for key, theirs in self._by_stock(source, parts, dtype).items():
            if not same(found[key], theirs):
                complain(self._config, source.path, f"tensor {source.names[key[0]]!r}")
                found[key] = theirs

    def _by_stock(
        self, source: Source, parts: dict[Key, Part], dtype: torch.dtype | None
    ) -> dict[Key, torch.Tensor]:
        import torch

        found = {}
        for key, part in parts.items():
            whole = source.by_stock(key[0])
            piece = whole[part.index].clone(memory_format=torch.contiguous_format)
            found[key] = piece.to(device=self._device, dtype=_cast(piece.dtype, dtype))
        return found

    def _from_map(self, source: Source) -> bool:
        """Whether all ranks take a file's tensors from its map, and exchange nothing."""
        by_network = self._read_once == "job" and len(set(self.group.nodes)) > 1
        seen = len(source.readers) == self.group.size
        return seen and self._mapped_everywhere and not by_network

    def _all_mapped(
        self, source: Source, needs: Sequence[Sequence[int]]
    ) -> dict[Key, torch.Tensor]:
        opened = source.opened
        assert isinstance(opened, HostFile)
        if self.group.size > 1:
            self._read_ahead(source, opened, needs)
        else:
            opened.read_ahead_all()
        return {(i, 0): tensor for i, tensor in enumerate(mapped.take_all(opened))}

    def _mapped(
        self,
        source: Source,
        parts: dict[Key, Part],
        needs: Sequence[Sequence[int]],
        dtype: torch.dtype | None,
    ) -> dict[Key, torch.Tensor]:
        opened = source.opened
        assert isinstance(opened, HostFile)
        if self._config.io != "mmap":
            self._read_ahead(source, opened, needs)
        found = mapped.take(opened, source.extents, parts)
        for key, tensor in found.items():
            wanted = _cast(tensor.dtype, dtype)
            if wanted != tensor.dtype:
                found[key] = tensor.to(wanted)
        return found

    def _read_ahead(self, source: Source, opened: HostFile, needs: Sequence[Sequence[int]]) -> None:
        ranks = self.group.node_ranks
        turn = ranks.index(self.group.rank)
        alone, shared = split(source.extents, [needs[rank] for rank in ranks], range(len(ranks)))
        extents = mapped.share(source.extents, alone[turn], shared, turn, len(ranks))
        if not len(extents):
            return
        threads = io_threads(self._config.threads)
        opened.read_ahead(extents, max(threads // len(ranks), 2))

    def _circle(self, source: Source) -> Circle:
        """Who exchanges a file: our node, or everybody where a node cannot see it."""
        group = self.group
        nodes = {group.nodes[rank] for rank in source.readers}
        everybody = self._read_once == "job" or len(nodes) < len(set(group.nodes))
        ranks = list(range(group.size)) if everybody else group.node_ranks
        return Circle(group, ranks, [rank for rank in source.readers if rank in ranks])

    def _moved(
        self,
        source: Source,
        parts: dict[Key, Part],
        needs: Sequence[Sequence[int]],
        dtype: torch.dtype | None,
    ) -> dict[Key, torch.Tensor]:
        """Read into memory of our own, each byte by one rank of those that exchange."""
        group = self.group
        problem: BaseException | None = None
        results: dict[Key, torch.Tensor] = {}
        steps: list[Step] = []
        mover: Mover | None = None
        try:
            circle = self._circle(source)
            steps = self._steps(source, circle, parts, needs, dtype)
            for key, part in parts.items():
                wanted = _cast(source.describe(key[0])[1], dtype)
                results[key] = self._memory.empty(part.size, wanted)
            mover = Mover(source, circle, self._memory, steps, parts=parts, results=results)
            mover.allocate()
        except BaseException as error:
            problem = error
        counts = group.agree(problem, len(steps))
        assert mover is not None
        try:
            move(mover, max(counts), group)
        except BaseException as error:
            problem = error
            results.clear()
        del mover
        group.agree(problem)
        return results

    def _steps(
        self,
        source: Source,
        circle: Circle,
        parts: dict[Key, Part],
        needs: Sequence[Sequence[int]],
        dtype: torch.dtype | None,
    ) -> list[Step]:
        readers = [circle.ranks.index(rank) for rank in circle.readers]
        alone, shared = split(source.extents, [needs[rank] for rank in circle.ranks], readers)
        rows = alone[circle.ranks.index(self.group.rank)]
        own: list[Rows] = []
        rest: list[Rows] = []
        for row in rows:
            kind = source.describe(row[0])[1]
            single = (row[0], 1) not in parts and parts[row[0], 0].contiguous
            straight = single and _cast(kind, dtype) == kind
            (own if straight else rest).append(row)
        size = self._unit_bytes
        return [
            *(Step("shared", unit) for unit in pack(source.extents, shared, size)),
            *(Step("own", unit) for unit in pack(source.extents, own, size)),
            *(Step("alone", unit) for unit in pack(source.extents, rest, size)),
        ]

    def _own_unit_bytes(self) -> int:
        given = self._config.device_memory_budget
        return UNIT if given is None else max(min(UNIT, given // 8), 1)

    def _report(self, source: Source, found: dict[int, torch.Tensor], seconds: float) -> None:
        opened, note, path = source.opened, source.doubt or self._refused, "stock"
        resident = None
        if note is None:
            path = "exchange"
            if opened is not None:
                path, note, resident = (
                    opened.account.path,
                    opened.account.note,
                    opened.account.resident,
                )
        emit(
            LoadReport(
                self._call,
                source.path,
                "cpu" if self._target is None else self._target.name,
                path,
                sum(tensor.nbytes for tensor in found.values()),
                len(found),
                seconds,
                resident,
                note,
            )
        )


def _named(device: object) -> torch.device:
    """As torch means it: ``"cuda"`` is the current device, not the first, nor the rank's.

    Raises:
        RuntimeError, TypeError: it is none.
    """
    import torch

    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cuda", device)
    named: Any = "cpu" if device is None else device
    return torch.device(named)


def _target_of(named: torch.device) -> devices.Target | None:
    if named.type not in ("cpu", "cuda"):
        raise Doubt(f"device {str(named)!r} is not accelerated")
    return devices.torch_target(named)


def _cast(kind: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and kind.is_floating_point else kind


def _in_turn(files: Mapping[int, Sequence[str]]) -> list[str]:
    """Files of all ranks, one of each in turn, as fastsafetensors orders them."""
    longest = max((len(paths) for paths in files.values()), default=0)
    return [paths[at] for at in range(longest) for paths in files.values() if at < len(paths)]
