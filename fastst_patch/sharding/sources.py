"""The files of a sharded load: opened by the ranks that can see them, and certainly the same.

Every rank opens every file. What they found is compared before anything moves: sizes and
headers must be equal; a file that some ranks cannot see is described to them by those that can.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import engine, stock, tensors
from ..config import Config
from ..device import Target
from ..errors import Doubt, RankError
from ..layout import FileLayout
from ..ondevice import DeviceFile
from ..onhost import HostFile
from ..opened import OpenedFile, open_checked
from .groups import Group
from .schedule import Extent

if TYPE_CHECKING:
    import torch

__all__ = ["Source", "open_sources", "paths_in_turn"]

_UNSEEN = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ESTALE)
"""What opening a file says that this rank cannot see, and another may."""


@dataclasses.dataclass(eq=False)
class Source:
    """One file of the load, as this rank has it.

    Attributes:
        path: as the caller named it.
        names: of its tensors, in file order.
        readers: ranks that can read it.
        opened: the file; None where this rank cannot see it, or stock reads it.
        doubt: why stock reads it, on all ranks; None when it does not.
    """

    path: str
    names: tuple[str, ...]
    readers: list[int]
    opened: OpenedFile | None
    doubt: str | None
    _layout: FileLayout | None
    _stock: Any = None  # a handle

    @functools.cached_property
    def described(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor, as torch holds it."""
        if self._layout is None:
            return [(tuple(t.shape), t.dtype) for t in map(self.by_stock, range(len(self.names)))]
        found = []
        for i in range(len(self.names)):
            shape, dtype = tensors.shape_and_dtype(self._layout, i)
            found.append((tuple(shape), dtype))
        return found

    def describe(self, i: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of tensor i, as torch holds it."""
        return self.described[i]

    @functools.cached_property
    def extents(self) -> list[Extent]:
        """Where each tensor lies."""
        layout, found = self.layout, []
        for i, (shape, _) in enumerate(self.described):
            begin, end = layout.extent(i)
            rows = shape[0] if shape else 1
            found.append(Extent(begin, rows, (end - begin) // rows if rows else 0))
        return found

    @property
    def layout(self) -> FileLayout:
        """Of the file; not where stock reads it."""
        assert self._layout is not None
        return self._layout

    @property
    def mapped(self) -> bool:
        """Whether this rank takes its tensors from the file's map."""
        return self.opened is not None and self.opened.mapped

    def by_stock(self, i: int) -> torch.Tensor:
        """Tensor i as stock loads it, to the CPU."""
        if self._stock is None:
            self._stock = stock.safe_open(self.path, framework="pt", device="cpu")
        result: torch.Tensor = self._stock.get_tensor(self.names[i])
        return result

    def close(self) -> None:
        """Let go of the file. Tensors stay."""
        self.opened = self._stock = None


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What one rank found at a path; goes to the others.

    Attributes:
        error: number of the system's error; 0 for none.
        text: of it.
        size: of the file.
        digest: of its header.
        doubt: why stock must read it.
    """

    error: int = 0
    text: str = ""
    size: int = 0
    digest: str = ""
    doubt: str | None = None


def _open(path: str, config: Config, target: Target | None) -> tuple[OpenedFile | None, _Seen]:
    if engine.native_error() is not None:
        os.stat(path)
        return None, _Seen(doubt=engine.native_error())
    try:
        file, layout = open_checked(path)
        opened: OpenedFile = (
            HostFile(file, layout, config)
            if target is None
            else DeviceFile(file, layout, config, target)
        )
        tensors.check(layout)
        if not tensors.ordinary_mode():
            raise Doubt("a torch mode or default device is in force")
    except Doubt as doubt:
        return None, _Seen(doubt=doubt.reason)
    except OSError as error:
        if error.errno in _UNSEEN:
            return None, _Seen(error=error.errno, text=os.strerror(error.errno))
        raise
    header = os.pread(file.fd, layout.data_begin, 0)
    return opened, _Seen(size=file.size, digest=hashlib.blake2b(header).hexdigest())


def open_sources(
    paths: list[str], group: Group, config: Config, target: Target | None
) -> list[Source]:
    """Open files and compare them over the ranks. Collective; paths are the same everywhere.

    Raises:
        RankError: a rank failed, nobody can see a file, or two ranks see different ones.
    """
    opened: list[OpenedFile | None] = []
    seen: list[_Seen] = []
    problem: BaseException | None = None
    try:
        for path in paths:
            one, what = _open(path, config, target)
            opened.append(one)
            seen.append(what)
    except BaseException as error:
        problem = error
    try:
        found: list[tuple[list[str], list[_Seen]]] = group.agree(problem, (paths, seen))
    finally:
        problem = None  # and with it the frame that its traceback keeps
    _compare_names([names for names, _ in found])
    for number, path in enumerate(paths):
        _compare(path, [views[number] for _, views in found])
    sources, lacking = [], []
    try:
        for number, path in enumerate(paths):
            views = [views[number] for _, views in found]
            doubt = next((f"rank {r}: {v.doubt}" for r, v in enumerate(views) if v.doubt), None)
            readers = [rank for rank, view in enumerate(views) if not view.error]
            one = opened[number] if doubt is None else None
            source = Source(path, (), readers, one, doubt, one.layout if one else None)
            sources.append(source)
            if doubt is not None:
                source._stock = stock.safe_open(path, framework="pt", device="cpu")
                source.names = tuple(_stock_names(source._stock))
            elif one is not None:
                source.names = one.layout.names
            if doubt is None and len(readers) < group.size:
                lacking.append(number)
    except BaseException as error:
        problem = error
    try:
        group.agree(problem)
    finally:
        problem = None
    _describe(sources, lacking, group)
    return sources


def _stock_names(handle: Any) -> list[str]:
    in_file_order = getattr(handle, "offset_keys", handle.keys)
    return list(in_file_order())


def _compare_names(named: list[list[str]]) -> None:
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


def _compare(path: str, views: list[_Seen]) -> None:
    """Raise, alike on all ranks, unless those that see a file see the same one."""
    able = [(rank, view) for rank, view in enumerate(views) if not view.error]
    if not able:
        unseen = OSError(views[0].error, views[0].text, path)
        raise RankError(0, f"{type(unseen).__name__}: {unseen}") from unseen
    first, reference = able[0]
    if any(view.doubt for _, view in able):
        return
    for rank, view in able:
        if (view.size, view.digest) != (reference.size, reference.digest):
            raise RankError(
                rank,
                f"{path}: it sees another file than rank {first}: {view.size} bytes with header"
                f" {view.digest[:12]}, not {reference.size} with {reference.digest[:12]}; give"
                " every rank the same version",
            )


def _describe(sources: list[Source], lacking: list[int], group: Group) -> None:
    """Tell ranks that cannot see a file what is in it. Collective."""
    if not lacking:
        return
    headers: dict[int, tuple[bytes, int]] = {}
    problem: BaseException | None = None
    try:
        for number in lacking:
            source = sources[number]
            if source.readers[0] == group.rank and source.opened is not None:
                file, begin = source.opened.file, source.layout.data_begin
                headers[number] = os.pread(file.fd, begin - 8, 8), file.size
    except BaseException as error:
        problem = error
    try:
        told = group.agree(problem, headers)
    finally:
        problem = None
    try:
        for number in lacking:
            source = sources[number]
            if source.opened is None:
                header, size = told[source.readers[0]][number]
                source._layout = engine.parse_header(header, size)
                source.names = source._layout.names
    except BaseException as error:
        problem = error
    try:
        group.agree(problem)
    finally:
        problem = None


def paths_in_turn(files: Mapping[int, Sequence[str]]) -> list[str]:
    """Files of all ranks, one of each in turn, as fastsafetensors orders them."""
    longest = max((len(paths) for paths in files.values()), default=0)
    return [paths[at] for at in range(longest) for paths in files.values() if at < len(paths)]
