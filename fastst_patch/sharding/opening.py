"""Opening the files of a sharded load on all ranks, and making sure that they are the same.

Each rank first opens the files that it sees, and reports their paths, sizes and headers, its
device, and the options that all ranks must agree on. One exchange of these reports ends the
opening, before any data moves: sizes and headers must be equal, and the common options are decided.
Further exchanges happen only for files that stock must read or that some ranks cannot see. By then
all ranks know whether there are any.
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
from ..dropin.eligibility import opened_for
from ..errors import Fallback, NameClashError, RankError
from ..files.base import OpenedFile, open_checked
from ..files.remote import StandInFile, is_remote, not_by_stock, shown
from ..sources.base import RemoteError
from .groups import Group
from .source import Source

if TYPE_CHECKING:
    import torch

__all__ = ["Opening", "in_turns", "open_together"]

UNIT = 32 << 20
"""Most bytes that gloo or NCCL exchange at a time. Four units and as many parts are in use at once.
Half of `device_memory_budget` bounds these, so small budgets make small units."""
UNIT_MIN = 128 << 10
"""Smallest unit, however small the budget: each unit costs a round, milliseconds on few cores."""

_UNSEEN = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ESTALE)
"""Errors of opening a file that this rank cannot see, and another rank may."""


@dataclasses.dataclass(frozen=True)
class Opening:
    """Files that are open, and values that the ranks agreed on.

    Attributes:
        sources: the files, in the order in which they were named.
        where: by name, the number of the file, and of the tensor in it.
        device: where tensors go.
        target: the device in use; None: the CPU, or stock.
        fallback: why stock loads to this device, on all ranks; None when it does not.
        mapped: whether on every rank tensors come from maps of the files that it sees.
        unit_bytes: bytes exchanged at a time.
        read_once: ``node`` or ``job``.
    """

    sources: list[Source]
    where: dict[str, tuple[int, int]]
    device: torch.device
    target: Device | None
    fallback: str | None
    mapped: bool
    unit_bytes: int
    read_once: str


@dataclasses.dataclass(frozen=True)
class _FileReport:
    """One rank's findings at a path; sent to the others.

    Attributes:
        error: the system's error number where the rank cannot see the file; else 0.
        text: of the error.
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
class _RankReport:
    """One rank's findings; sent to the others.

    Attributes:
        paths: of the files; None where the rank cannot see the folder or index that lists them.
        files: its findings at each path.
        kind: of device.
        fallback: as of `Opening`, for this rank alone.
        unit_bytes: as of `Opening`, for this rank alone.
        read_once: as of `Opening`, for this rank alone.
    """

    paths: list[str] | None
    files: list[_FileReport]
    kind: str
    fallback: str | None
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
        RankError: a rank failed, no rank can see a file, or two ranks see different ones.
        NameClashError: a name is in two files.
        ValueError: an argument is wrong on all ranks, or they load to devices of several kinds.
    """
    opened: list[OpenedFile | None] = []
    target: Device | None = None
    fallback: str | None = None
    with group.phase() as phase:
        if read_once not in ("node", "job"):
            raise ValueError(f"read_once={read_once!r}: allowed are 'node' and 'job'")
        torch_device = parse_device(device)
        try:
            if torch_device.type not in ("cpu", "cuda"):
                raise Fallback(f"device {str(torch_device)!r} is not accelerated")
            target = device_of(torch_device)
        except Fallback as error:
            fallback = error.reason
        paths = None if isinstance(files, FileNotFoundError) else _ordered(files)
        open_all = functools.partial(_open_all, config, target, opened)
        found = open_all(paths or ())
        kind = "the CPU" if target is None else "a device"
        phase.value = _RankReport(paths, found, kind, fallback, _unit_bytes(config), read_once)
    reports: list[_RankReport] = phase.gathered
    if any(report.paths is None for report in reports):
        reports = _with_listed_paths(files, reports, group, open_all)
    # Ranks may have different options; all use the same fallback, unit size and `read_once`.
    fallback = next((report.fallback for report in reports if report.fallback is not None), None)
    sources, mapped = _make_sources(reports, opened, group)
    remote = next((source for source in sources if is_remote(source.path)), None)
    if remote is not None and fallback is not None:
        raise not_by_stock(shown(remote.path), Fallback(fallback))
    if len({report.kind for report in reports}) > 1 and fallback is None:
        raise ValueError(
            f"some ranks load to {reports[0].kind} and others do not; ranks exchange only between"
            " devices of one kind: give all ranks the same kind"
        )
    return Opening(
        sources,
        _index(sources, group),
        torch_device,
        target,
        fallback,
        mapped,
        min(report.unit_bytes for report in reports),
        "job" if any(report.read_once == "job" for report in reports) else "node",
    )


# ---- on one rank ----


def in_turns(files: Mapping[int, Sequence[str]]) -> list[tuple[str, int]]:
    """Paths with their ranks, as fastsafetensors orders them: each rank's first file, and so on."""
    longest = max((len(paths) for paths in files.values()), default=0)
    return [
        (paths[at], rank)
        for at in range(longest)
        for rank, paths in files.items()
        if at < len(paths)
    ]


def _ordered(files: Mapping[int, Sequence[str]] | Sequence[str]) -> list[str]:
    return [path for path, _ in in_turns(files)] if isinstance(files, Mapping) else list(files)


def _unit_bytes(config: Config) -> int:
    given = config.device_memory_budget
    return UNIT if given is None else max(min(UNIT, given // 8), UNIT_MIN)


def _open_all(
    config: Config,
    target: Device | None,
    opened: list[OpenedFile | None],
    paths: Sequence[str],
) -> list[_FileReport]:
    """Open files, which are added to ``opened``; None for one that was not opened."""
    reports = []
    for path in paths:
        one, report = _open(path, config, target)
        opened.append(one)
        reports.append(report)
    return reports


def _open(
    path: str, config: Config, target: Device | None
) -> tuple[OpenedFile | None, _FileReport]:
    if engine.native_error() is not None and not is_remote(path):
        os.stat(path)
        return None, _FileReport(fallback=engine.native_error())
    try:
        file, layout = open_checked(path, config)
        opened = opened_for(file, layout, config, target)
        tensors.check(layout)
        if not tensors.ordinary_mode():
            raise Fallback("a torch mode or default device is in force")
    except StandInFile as found_:
        return _open(found_.url, config, target)
    except Fallback as fallback:
        if is_remote(path):
            raise not_by_stock(shown(path), fallback) from None
        return None, _FileReport(fallback=fallback.reason)
    except OSError as error:
        if error.errno in _UNSEEN and not isinstance(error, RemoteError):
            return None, _FileReport(error=error.errno, text=os.strerror(error.errno))
        raise
    version = b"" if file.feed is None else repr(file.feed.identity).encode()
    digest = hashlib.blake2b(engine.header_of(layout) + version).hexdigest()
    return opened, _FileReport(size=file.size, digest=digest, mapped=opened.mapped)


# ---- on all ranks ----


def _with_listed_paths(
    files: object,
    reports: Sequence[_RankReport],
    group: Group,
    open_all: Callable[[Sequence[str]], list[_FileReport]],
) -> list[_RankReport]:
    """Open, on ranks that cannot see the list of files, the paths of the first rank that can.

    Collective. Raises RankError where no rank can see the list.
    """
    mine = reports[group.rank]
    listed = next((report.paths for report in reports if report.paths is not None), None)
    if listed is None:
        group.agree(files if isinstance(files, FileNotFoundError) else None)
        raise AssertionError  # every rank has an error, so `agree` raises
    with group.phase() as phase:
        if mine.paths is None:
            mine = dataclasses.replace(mine, paths=listed, files=open_all(listed))
        phase.value = mine
    return phase.gathered


def _make_sources(
    reports: Sequence[_RankReport], opened: Sequence[OpenedFile | None], group: Group
) -> tuple[list[Source], bool]:
    """The files, and whether all ranks take tensors from their maps.

    Collective if stock reads a file, or a rank cannot see one.
    """
    paths = reports[group.rank].paths or []
    _check_same_paths([report.paths or [] for report in reports])
    mapped = True
    sources, partly_seen = [], []
    for number, path in enumerate(paths):
        found = [report.files[number] for report in reports]
        _check_same_file(path, found)
        fallback = next(
            (f"rank {rank}: {one.fallback}" for rank, one in enumerate(found) if one.fallback), None
        )
        readers = [rank for rank, one in enumerate(found) if not one.error]
        mine = opened[number] if fallback is None else None
        layout = mine.layout if mine is not None else None
        names = layout.names if layout is not None else ()
        sources.append(Source(path, names, readers, mine, fallback, layout))
        if fallback is None:
            mapped = mapped and all(one.mapped for one in found)
            if len(readers) < group.size:
                partly_seen.append(number)
    _open_by_stock(sources, group)
    _send_headers(sources, partly_seen, group)
    return sources, mapped


def _open_by_stock(sources: Sequence[Source], group: Group) -> None:
    """Open by stock the files that the engine does not read. Collective if there are any."""
    by_stock = [source for source in sources if source.fallback is not None]
    if not by_stock:
        return
    with group.phase():
        for source in by_stock:
            source.open_by_stock()


def _index(sources: Sequence[Source], group: Group) -> dict[str, tuple[int, int]]:
    """Number of the file, and of the tensor in it, by name.

    Collective if stock reads a file, because its header was not compared.

    Raises:
        NameClashError: a name is in two files.
        RankError: a name is in two files on one rank alone.
    """
    where: dict[str, tuple[int, int]] = {}
    clash: NameClashError | None = None
    for number, source in enumerate(sources):
        for i, name in enumerate(source.names):
            if name in where:
                clash = NameClashError(
                    f"tensor {name!r} is in two files, {shown(sources[where[name][0]].path)} and"
                    f" {shown(source.path)}; names must be unique"
                )
            where[name] = number, i
    if any(source.fallback is not None for source in sources):
        group.agree(clash)
    if clash is not None:
        raise clash
    return where


def _check_same_paths(listed: Sequence[list[str]]) -> None:
    """Raise, alike on all ranks, unless all name the same files."""
    for rank, paths in enumerate(listed):
        if paths != listed[0]:
            odd = next((p for p in [*paths, *listed[0]] if (p in paths) != (p in listed[0])), None)
            difference = "in another order" if odd is None else f"such as {shown(odd)!r}"
            raise RankError(
                rank,
                f"it loads {len(paths)} files where rank 0 loads {len(listed[0])}, {difference};"
                " all ranks must name the same files",
            )


def _check_same_file(path: str, found: Sequence[_FileReport]) -> None:
    """Raise, alike on all ranks, unless the ranks that see a file see the same one."""
    seeing = [(rank, one) for rank, one in enumerate(found) if not one.error]
    if not seeing:
        unseen = OSError(found[0].error, found[0].text, path)
        raise RankError(0, f"{type(unseen).__name__}: {unseen}") from unseen
    first, reference = seeing[0]
    if any(one.fallback for _, one in seeing):
        return
    for rank, one in seeing:
        if (one.size, one.digest) != (reference.size, reference.digest):
            raise RankError(
                rank,
                f"{shown(path)}: it sees another file than rank {first}: {one.size} bytes with"
                f" header {one.digest[:12]}, not {reference.size} with {reference.digest[:12]};"
                " give every rank the same version",
            )


def _send_headers(sources: Sequence[Source], numbers: Sequence[int], group: Group) -> None:
    """Send the headers of files to ranks that cannot see them. Collective if there are any.

    Args:
        sources: all files.
        numbers: of the files that some rank cannot see.
        group: the ranks.
    """
    if not numbers:
        return
    headers: dict[int, tuple[bytes, int]] = {}
    with group.phase() as phase:
        for number in numbers:
            source = sources[number]
            if source.readers[0] == group.rank and source.opened is not None:
                headers[number] = engine.header_of(source.layout), source.opened.file.size
        phase.value = headers
    with group.phase():
        for number in numbers:
            source = sources[number]
            if source.opened is None:
                header, size = phase.gathered[source.readers[0]][number]
                source.set_layout(engine.parse_header(header, size))
