"""Opening the files of a sharded load: by every rank, and certainly the same.

What can be found out alone is: paths, headers, the device, what the options ask for. One round of
telling each other what that was ends the opening, before anything moves: sizes and headers must
be equal, and what all have to do alike is settled. Further rounds are for files that stock must
read or that some ranks cannot see; whether there are such is known to all alike by then.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from .. import engine, tensors
from ..config import Config
from ..device import Device, device_of, parse_device
from ..errors import Fallback, NameClashError, RankError
from ..files.base import OpenedFile, open_checked
from ..files.cpu import HostFile
from ..files.cuda import DeviceFile
from .groups import Group
from .source import Source

if TYPE_CHECKING:
    import torch

__all__ = ["Opening", "open_together"]

UNIT = 32 << 20
"""Most bytes that are exchanged at a time, by gloo or NCCL. Four units and as many parts are in use
at once; with half of `device_memory_budget` as their bound, small budgets make small units."""
UNIT_MIN = 128 << 10
"""However small the budget: each unit takes a round, of milliseconds where cores are few."""

_UNSEEN = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ESTALE)
"""What opening a file says that this rank cannot see, and another may."""


@dataclasses.dataclass(frozen=True)
class Opening:
    """Files that are open, and what the ranks settled.

    Attributes:
        sources: the files, in the order in which they were named.
        where: number of the file, and the tensor's there, by name.
        device: where tensors go.
        target: the device in use; None: the CPU, or stock.
        refused: why stock reads to this device, on all ranks; None when it does not.
        mapped: whether every rank takes from maps what it can see.
        unit_bytes: what is exchanged at a time.
        read_once: ``node`` or ``job``.
    """

    sources: list[Source]
    where: dict[str, tuple[int, int]]
    device: torch.device
    target: Device | None
    refused: str | None
    mapped: bool
    unit_bytes: int
    read_once: str


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What one rank found at a path.

    Attributes:
        error: number of the system's error; 0 for none.
        text: of it.
        size: of the file.
        digest: of its header.
        mapped: whether tensors come from its map.
        fallback: why stock must read it.
    """

    error: int = 0
    text: str = ""
    size: int = 0
    digest: str = ""
    mapped: bool = True
    fallback: str | None = None


@dataclasses.dataclass(frozen=True)
class _Said:
    """What one rank found out alone; goes to the others.

    Attributes:
        paths: of the files; None where it cannot see what lists them.
        seen: at each of these.
        kind: of device.
        refused, unit_bytes, read_once: as of `Opening`, here.
    """

    paths: list[str] | None
    seen: list[_Seen]
    kind: str
    refused: str | None
    unit_bytes: int
    read_once: str


def open_together(
    files: Mapping[int, Sequence[str]] | Sequence[str] | FileNotFoundError,
    group: Group,
    device: object,
    config: Config,
    read_once: str,
) -> Opening:
    """Open files on all ranks, and compare them. Collective. Arguments as of `ShardedFiles`.

    Raises:
        RankError: a rank failed, nobody can see a file, or two ranks see different ones.
        NameClashError: a name is in two files.
        ValueError: an argument is wrong on all ranks, or they load to devices of several kinds.
    """
    opened: list[OpenedFile | None] = []
    target: Device | None = None
    refused: str | None = None
    with group.phase() as phase:
        if read_once not in ("node", "job"):
            raise ValueError(f"read_once={read_once!r}: allowed are 'node' and 'job'")
        where = parse_device(device)
        try:
            if where.type not in ("cpu", "cuda"):
                raise Fallback(f"device {str(where)!r} is not accelerated")
            target = device_of(where)
        except Fallback as fallback:
            refused = fallback.reason
        paths = None if isinstance(files, FileNotFoundError) else _in_turn(files)
        find = functools.partial(_open_all, config, target, opened)
        seen = find(paths or ())
        kind = "the CPU" if target is None else "a device"
        phase.value = _Said(paths, seen, kind, refused, _unit_bytes(config), read_once)
    told: list[_Said] = phase.told
    if any(one.paths is None for one in told):
        told = _by_hearsay(files, told, group, find)
    # Options may differ: what all must do alike is settled here.
    refused = next((one.refused for one in told if one.refused is not None), None)
    sources, mapped = _compared(told, opened, group)
    if len({one.kind for one in told}) > 1 and refused is None:
        raise ValueError(
            f"some ranks load to {told[0].kind} and others do not; what they exchange must be"
            " on devices of one kind"
        )
    return Opening(
        sources,
        _index(sources, group),
        where,
        target,
        refused,
        mapped,
        min(one.unit_bytes for one in told),
        "job" if any(one.read_once == "job" for one in told) else "node",
    )


# ---- alone ----


def _in_turn(files: Mapping[int, Sequence[str]] | Sequence[str]) -> list[str]:
    """Files of all ranks, one of each in turn, as fastsafetensors orders them; or as they are."""
    if not isinstance(files, Mapping):
        return list(files)
    longest = max((len(paths) for paths in files.values()), default=0)
    return [paths[at] for at in range(longest) for paths in files.values() if at < len(paths)]


def _unit_bytes(config: Config) -> int:
    given = config.device_memory_budget
    return UNIT if given is None else max(min(UNIT, given // 8), UNIT_MIN)


def _open_all(
    config: Config,
    target: Device | None,
    opened: list[OpenedFile | None],
    paths: Sequence[str],
) -> list[_Seen]:
    """What is found at paths; files are added to ``opened``."""
    found = []
    for path in paths:
        one, seen = _open(path, config, target)
        opened.append(one)
        found.append(seen)
    return found


def _open(path: str, config: Config, target: Device | None) -> tuple[OpenedFile | None, _Seen]:
    if engine.native_error() is not None:
        os.stat(path)
        return None, _Seen(fallback=engine.native_error())
    try:
        file, layout = open_checked(path)
        opened: OpenedFile = (
            HostFile(file, layout, config)
            if target is None
            else DeviceFile(file, layout, config, target)
        )
        tensors.check(layout)
        if not tensors.ordinary_mode():
            raise Fallback("a torch mode or default device is in force")
    except Fallback as fallback:
        return None, _Seen(fallback=fallback.reason)
    except OSError as error:
        if error.errno in _UNSEEN:
            return None, _Seen(error=error.errno, text=os.strerror(error.errno))
        raise
    digest = hashlib.blake2b(engine.header_of(layout)).hexdigest()
    return opened, _Seen(size=file.size, digest=digest, mapped=opened.mapped)


# ---- together ----


def _by_hearsay(
    files: object,
    told: Sequence[_Said],
    group: Group,
    find: Callable[[Sequence[str]], list[_Seen]],
) -> list[_Said]:
    """Ranks that cannot see what lists the files open those that the first of the others has.

    Collective. Raises RankError where no rank can see it.
    """
    mine = told[group.rank]
    listed = next((one.paths for one in told if one.paths is not None), None)
    if listed is None:
        group.agree(files if isinstance(files, FileNotFoundError) else None)
        raise AssertionError  # all ranks have an error to tell
    with group.phase() as phase:
        if mine.paths is None:
            mine = dataclasses.replace(mine, paths=listed, seen=find(listed))
        phase.value = mine
    return phase.told


def _compared(
    told: Sequence[_Said], opened: Sequence[OpenedFile | None], group: Group
) -> tuple[list[Source], bool]:
    """The files, and whether every rank takes from their maps. Collective if stock reads one."""
    paths = told[group.rank].paths or []
    _compare_names([one.paths or [] for one in told])
    mapped = True
    sources, lacking = [], []
    for number, path in enumerate(paths):
        views = [one.seen[number] for one in told]
        _compare(path, views)
        fallback = next(
            (f"rank {r}: {v.fallback}" for r, v in enumerate(views) if v.fallback), None
        )
        readers = [rank for rank, view in enumerate(views) if not view.error]
        one = opened[number] if fallback is None else None
        layout = one.layout if one is not None else None
        names = layout.names if layout is not None else ()
        sources.append(Source(path, names, readers, one, fallback, layout))
        if fallback is None:
            mapped = mapped and all(view.mapped for view in views)
            if len(readers) < group.size:
                lacking.append(number)
    _ask_stock(sources, group)
    _describe(sources, lacking, group)
    return sources, mapped


def _ask_stock(sources: Sequence[Source], group: Group) -> None:
    """Open by stock what the engine does not read. Collective if there is any."""
    by_stock = [source for source in sources if source.fallback is not None]
    if not by_stock:
        return
    with group.phase():
        for source in by_stock:
            source.ask_stock()


def _index(sources: Sequence[Source], group: Group) -> dict[str, tuple[int, int]]:
    """Where each name is. Collective if stock reads a file: its headers were not compared.

    Raises:
        NameClashError: a name is in two files.
        RankError: on one rank alone.
    """
    where: dict[str, tuple[int, int]] = {}
    clash: NameClashError | None = None
    for number, source in enumerate(sources):
        for i, name in enumerate(source.names):
            if name in where:
                clash = NameClashError(
                    f"tensor {name!r} is in two files, {sources[where[name][0]].path} and"
                    f" {source.path}; names must be unique"
                )
            where[name] = number, i
    if any(source.fallback is not None for source in sources):
        group.agree(clash)
    if clash is not None:
        raise clash
    return where


def _compare_names(named: Sequence[list[str]]) -> None:
    """Raise, alike on all ranks, unless all name the same files."""
    for rank, names in enumerate(named):
        if names != named[0]:
            odd = next((n for n in [*names, *named[0]] if (n in names) != (n in named[0])), None)
            what = "in another order" if odd is None else f"such as {odd!r}"
            raise RankError(
                rank,
                f"it loads {len(names)} files where rank 0 loads {len(named[0])}, {what};"
                " all ranks name the same",
            )


def _compare(path: str, views: Sequence[_Seen]) -> None:
    """Raise, alike on all ranks, unless those that see a file see the same one."""
    able = [(rank, view) for rank, view in enumerate(views) if not view.error]
    if not able:
        unseen = OSError(views[0].error, views[0].text, path)
        raise RankError(0, f"{type(unseen).__name__}: {unseen}") from unseen
    first, reference = able[0]
    if any(view.fallback for _, view in able):
        return
    for rank, view in able:
        if (view.size, view.digest) != (reference.size, reference.digest):
            raise RankError(
                rank,
                f"{path}: it sees another file than rank {first}: {view.size} bytes with header"
                f" {view.digest[:12]}, not {reference.size} with {reference.digest[:12]}; give"
                " every rank the same version",
            )


def _describe(sources: Sequence[Source], lacking: Sequence[int], group: Group) -> None:
    """Tell ranks that cannot see a file what is in it. Collective if there is such a file."""
    if not lacking:
        return
    headers: dict[int, tuple[bytes, int]] = {}
    with group.phase() as phase:
        for number in lacking:
            source = sources[number]
            if source.readers[0] == group.rank and source.opened is not None:
                headers[number] = engine.header_of(source.layout), source.opened.file.size
        phase.value = headers
    with group.phase():
        for number in lacking:
            source = sources[number]
            if source.opened is None:
                header, size = phase.told[source.readers[0]][number]
                source.is_told(engine.parse_header(header, size))
