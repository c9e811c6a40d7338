"""``handle.prefetch()``: tensors that are read in the background, and each handed out once.

The interface, the checks of a plan and the exceptions are those of safetensors 0.9. Beside it, the
CPU is a device, a plan may cut any dimension, and what waits to be taken has a bound. A tensor
that was not read ahead, or was given up for another one, is read when it is taken.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import safetensors

from .. import report, stock, tensors
from ..config import Config
from ..device import find_device
from ..dtypes import PACKED
from ..errors import Fallback
from ..files.base import OpenedFile
from ..files.cpu import HostFile
from ..files.cuda import bounds_ahead
from ..files.pending import PendingHostRows, PendingHostTensors
from ..files.prefetcher import MOST_ITEMS, Group, Pending, Prefetcher
from ..files.remote import bounds_of_network
from ..layout import ARENA_ALIGNMENT
from ..locks import shared
from ..sources.base import RemoteError
from .eligibility import complain, fell_back, opened_for, same
from .prefetch_plan import Wanted, wanted_of
from .slices import indexed, repr_as, stock_over

if TYPE_CHECKING:
    import torch

__all__ = ["UPSTREAM", "PrefetchLoader", "open_loader"]

_log = logging.getLogger("fastst_patch")

_WINDOW = 64
"""How many of the next tensors an iteration looks at for one that has landed, as stock does."""

_ALREADY = "tensor already delivered (prefetch hands each tensor out once, via take or iteration)"
_CLOSED = "prefetch loader closed"
_NO_RUNTIME = (
    "no CUDA runtime is loaded in this process; import a CUDA-enabled framework (torch) before"
    " calling prefetch()"
)

_MOST_THREADS = 64
"""The most that the option ``threads`` allows."""

UPSTREAM = "prefetch" in stock.HANDLE_METHODS
"""Whether the installed safetensors has ``prefetch``."""


class PrefetchLoader:
    """The tensors of a plan, on their way to a device. Usable from many threads at once.

    Holds the file, whether its handle is closed or not. Tensors handed out outlive it.

    Args:
        opened: the file, for this loader alone.
        plan: what to load, in the order of the file.
    """

    def __init__(self, opened: OpenedFile, plan: Sequence[Wanted]) -> None:
        budget = opened.config.device_memory_budget
        most, nbytes = bounds_ahead(budget, mapped=opened.mapped)
        if opened.file.feed is not None and opened.device == "cpu":
            most, nbytes = bounds_of_network(opened.config)
        names = opened.layout.names
        self._plan = {names[wanted.i]: wanted for wanted in plan}
        self._left = dict(self._plan)  # not handed out
        self._stock_handle: Any = None
        self._order = _PlanOrder(_groups(plan, nbytes))
        self._prefetcher = Prefetcher(self._order, lambda: most)
        self._opened: OpenedFile | None = opened
        with opened.account:
            self._prefetcher.expect(None, self._start)
        _alive[id(self)] = self

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance(loader, safetensors.PrefetchLoader) holds
        return getattr(safetensors, "PrefetchLoader", PrefetchLoader)

    def __repr__(self) -> str:
        """Stock's text with the address of this object."""
        return repr_as(self, self.__class__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise stock's exception: loaders cannot be pickled."""
        raise TypeError(f"cannot pickle '{self.__class__.__module__}.PrefetchLoader' object")

    # ---- the interface ----

    def names(self) -> list[str]:
        """Names of the tensors of the plan, in file order."""
        return list(self._plan)

    def __len__(self) -> int:
        return len(self._plan)

    def take(self, name: str) -> torch.Tensor:
        """A tensor of the plan, usable on any stream. Each can be taken once.

        Raises:
            SafetensorError: the tensor is not in the plan, was taken, or could not be read, in
                which case it may be taken again; or the loader is closed.
        """
        if not isinstance(name, str):
            raise TypeError(f"'{type(name).__name__}' object is not an instance of 'str'")
        if name not in self._plan:
            raise stock.SafetensorError(f"tensor {name} is not in the prefetch plan")
        opened = self._opened
        if opened is None and name in self._left:
            raise stock.SafetensorError(f"{name}: {_CLOSED}")
        wanted = self._left.pop(name, None)
        if opened is None or wanted is None:
            raise stock.SafetensorError(f"{name}: {_ALREADY}")
        return self._handed_out(opened, wanted, f"{name}: ")

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors not taken yet, with their names, those first that have landed."""
        left = deque(tuple(self._left))
        while left:
            at = self._order.first_landed(self._plan[name].i for name in islice(left, _WINDOW))
            name = left[at]
            del left[at]
            opened = self._opened
            if opened is None and name in self._left:
                raise stock.SafetensorError(_CLOSED)
            wanted = self._left.pop(name, None)
            if opened is not None and wanted is not None:
                yield name, self._handed_out(opened, wanted, "")

    def close(self) -> None:
        """Stop reading, let go of what was not taken, and report. May be repeated."""
        with shared:
            opened, self._opened = self._opened, None
        if opened is None:
            return
        self._order.stop()
        self._prefetcher.drop()
        self._stock_handle = None
        opened.account.emit("prefetch", opened.file.path, opened.device)

    def __enter__(self) -> PrefetchLoader:
        """Return the loader itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()

    def __del__(self, _at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        # When Python exits, the report's module may be gone already.
        if not _at_exit() and hasattr(self, "_opened"):  # else the constructor was interrupted
            self.close()

    def tell(self) -> None:
        """Report what was handed out since the last report."""
        opened = self._opened
        if opened is not None:
            opened.account.emit("prefetch", opened.file.path, opened.device, last=False)

    # ---- inside ----

    def _handed_out(self, opened: OpenedFile, wanted: Wanted, subject: str) -> torch.Tensor:
        """A tensor that the caller has taken out of `_left`; it is put back if that fails."""
        try:
            try:
                with opened.account:
                    result = self._moved(opened, wanted)
            except (Fallback, MemoryError) as error:
                fallback = Fallback.alone(error)
            except (OSError, stock.SafetensorError) as error:
                raise stock.SafetensorError(f"{subject}io error: {_as_rust(error)}") from error
            else:
                return self._verified(opened, wanted, result) if opened.config.verify else result
            if tensors.ordinary_mode():
                self._prefetcher.drop()  # what was read ahead may be the memory that is missing
            result = self._by_stock(opened, wanted)
        except BaseException:
            self._left[opened.layout.names[wanted.i]] = wanted
            raise
        opened.account.reason = fallback.reason
        fell_back(opened.config, "prefetch", opened.file.path, fallback)
        return result

    def _moved(self, opened: OpenedFile, wanted: Wanted) -> torch.Tensor:
        pending: Pending | None = self._prefetcher.hand_out(wanted.i, self._start)
        if pending is None or not tensors.ordinary_mode():
            return _alone(opened, wanted)
        return pending.take(wanted)

    def _start(self, group: Group) -> Pending | None:
        """Start a group; where that cannot be done now, another request tries again."""
        opened = self._opened
        if opened is None:  # closed by another thread
            return None
        try:
            return _PendingGroup(opened, group.items)
        except (Fallback, MemoryError, OSError) as error:
            # The request for one of these tensors raises it; until then it does not matter.
            _log.debug("%s is not read ahead: %s", opened.device, error)
            error.__traceback__ = None
            self._order.not_started(group)
            return None

    def _by_stock(self, opened: OpenedFile, wanted: Wanted) -> torch.Tensor:
        name, index = opened.layout.names[wanted.i], wanted.index
        handle = self._stock_handle
        if opened.file.feed is not None:
            handle = stock_over(opened, numbers=[wanted.i])
        elif handle is None:
            handle = self._stock_handle = stock_over(opened)
        if index is None or opened.layout.dtype(wanted.i) in PACKED:  # which stock does not slice
            whole: torch.Tensor = handle.get_tensor(name)
            return whole if index is None else whole[index]
        result: torch.Tensor = handle.get_slice(name)[index]
        return result

    def _verified(self, opened: OpenedFile, wanted: Wanted, ours: torch.Tensor) -> torch.Tensor:
        theirs = self._by_stock(opened, wanted)
        if same(ours, theirs):
            return ours
        complain(opened.config, opened.file.path, f"tensor {opened.layout.names[wanted.i]!r}")
        return theirs


# Not a WeakSet: iterating over one raises where another thread opens a loader meanwhile.
_alive: weakref.WeakValueDictionary[int, PrefetchLoader] = weakref.WeakValueDictionary()


def _tell_all() -> None:
    for found in _alive.valuerefs():
        loader = found()
        if loader is not None:
            loader.tell()


report.before_the_end(_tell_all)


def _as_rust(error: Exception) -> str:
    """The text that stock's language has for a read that failed."""
    if isinstance(error, RemoteError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)} (os error {error.errno})"
    return "failed to fill whole buffer"  # the file was cut


def _alone(opened: OpenedFile, wanted: Wanted) -> torch.Tensor:
    """A tensor that is read now, and nothing after it."""
    if wanted.index is not None:
        return indexed(opened, wanted.i, wanted.index)
    if isinstance(opened, HostFile):
        return opened.tensor(wanted.i)
    return opened.ahead([wanted.i]).take(wanted.i)


class _PendingGroup:
    """A `Pending` of whole tensors and of rows. Raises as `OpenedFile.ahead`."""

    def __init__(self, opened: OpenedFile, group: Sequence[Wanted]) -> None:
        whole = [wanted.i for wanted in group if wanted.index is None]
        rows = [wanted.rows for wanted in group if wanted.index is not None]
        self._opened = opened
        self._whole: Pending | None = opened.ahead(whole) if whole else None
        self._rows: Pending | None = opened.rows_ahead(rows) if rows else None

    def landed(self) -> bool:
        """Whether nothing moves any more. Never blocks."""
        return all(one is None or one.landed() for one in (self._whole, self._rows))

    def stop(self) -> None:
        """End reading ahead what is dropped next; other reads end when they are dropped."""
        for one in (self._whole, self._rows):
            if isinstance(one, (PendingHostTensors, PendingHostRows)):
                one.stop()

    def take(self, wanted: Wanted) -> torch.Tensor:
        """One of the tensors, usable at once. Raises as `OpenedFile.tensor`."""
        if wanted.index is None:
            assert self._whole is not None
            return self._whole.take(wanted.i)
        assert self._rows is not None
        return self._opened.index(self._rows.take(wanted.rows), wanted.rest)


def _groups(plan: Sequence[Wanted], nbytes: int) -> list[Group]:
    """Split a plan into groups of some bytes, in its order; a larger tensor is one of its own.

    All of a group counts until its last tensor is taken: until then its job keeps the memory.
    """
    groups: list[Group] = []
    for wanted in plan:
        group = groups[-1] if groups else None
        padded = -(-wanted.nbytes // ARENA_ALIGNMENT) * ARENA_ALIGNMENT
        if group is None or group.nbytes + padded > nbytes or len(group.items) == MOST_ITEMS:
            group = Group(None)
            groups.append(group)
        group.items.append(wanted)
        group.waiting.add(wanted.i)
        group.nbytes = group.held = group.nbytes + padded
    return groups


class _PlanOrder:
    """An `Order`: the groups of a plan, each started once; keys are numbers of tensors."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = {key: group for group in groups for key in group.waiting}
        self._next = dict.fromkeys(groups)  # not started, as an ordered set
        self._asked: Hashable = None

    def first_landed(self, keys: Iterable[int]) -> int:
        """Place of the first tensor in whose group nothing moves any more; 0 where there is none.

        Called without the lock: a group that lands meanwhile is found by the next call.
        """
        looked_at = None
        for at, key in enumerate(keys):
            group = self._groups[key]
            pending = None if group is looked_at else group.pending
            if pending is not None and pending.landed():
                return at
            looked_at = group
        return 0

    def stop(self) -> None:
        """End reading ahead the groups of which something was not handed out."""
        for group in dict.fromkeys(self._groups.values()):
            pending = group.pending
            if pending is not None:
                pending.stop()

    def not_started(self, group: Group) -> None:
        """Note that a group could not be started: the tensor asked for last is read alone."""
        if self._asked in group.waiting:
            group.items = [wanted for wanted in group.items if wanted.i != self._asked]
            group.waiting.remove(self._asked)
        if not group.items:
            self._next.pop(group, None)

    def expected(self, what: Any) -> bool:
        """See `Order`."""
        return True

    def requested(self, key: Hashable, waiting: Mapping[Hashable, Group]) -> Group | None:
        """The tensor's group, unless it was given up."""
        self._asked = key
        group = waiting.get(key)
        if group is None and key in self._groups[key].waiting and self._groups[key] in self._next:
            group = self._groups[key]
        return group

    def next(self, waiting: Mapping[Hashable, Group]) -> Group | None:
        """See `Order`."""
        return next(iter(self._next), None)

    def started(self, group: Group) -> None:
        """See `Order`."""
        self._next.pop(group, None)

    def gives_up(self, oldest: Group, now: bool) -> bool:
        """Whether something is asked of the other group: reading ahead alone gives up nothing."""
        return now

    def clear(self) -> list[Group]:
        """See `Order`."""
        groups = list(self._next)
        self._next.clear()
        return groups


# ---- opening ----


def open_loader(opened: OpenedFile, args: Any, kwargs: Any) -> PrefetchLoader:
    """What ``prefetch`` of a handle returns.

    Args:
        opened: the handle's file.
        args: of the call.
        kwargs: of the call.

    Raises:
        Fallback: the installed safetensors, which has ``prefetch``, must do or refuse it.
        TypeError, OverflowError, ValueError, SafetensorError: the texts of safetensors 0.9.
    """
    try:
        plan, device, threads = _bound(*args, **kwargs)
    except (TypeError, OverflowError) as error:
        if UPSTREAM:
            raise Fallback.alone(error) from None
        raise
    try:
        target = find_device(opened.device_argument if device is None else device)
        config = _with_threads(opened.config, threads)
        mine = opened_for(opened.file, opened.layout, config, target)
    except Fallback as error:
        if UPSTREAM:
            raise
        fallback = Fallback.alone(error)
    else:
        return PrefetchLoader(mine, wanted_of(opened.layout, plan))
    _check_kind(device)
    wanted_of(opened.layout, plan)
    import torch

    has_runtime = torch.version.cuda or torch.version.hip
    raise stock.SafetensorError(fallback.reason if has_runtime else _NO_RUNTIME)


_AS_CONFIGURED: Any = object()


def _bound(plan: Any = None, *, device: Any = None, threads: Any = _AS_CONFIGURED) -> Any:
    if plan is not None and not isinstance(plan, dict):
        raise TypeError(f"'{type(plan).__name__}' object is not an instance of 'dict'")
    if threads is not _AS_CONFIGURED:
        threads = operator.index(threads)
        threads.to_bytes(8, "little")  # raises as stock does
    return plan, device, threads


_bound.__qualname__ = "safe_open.prefetch"  # for the interpreter's texts


def _with_threads(config: Config, threads: Any) -> Config:
    """Options of a loader; the argument and the option are bounds, both."""
    if threads is _AS_CONFIGURED:
        return config
    most = config.threads or _MOST_THREADS
    return dataclasses.replace(config, threads=max(min(threads, most), 1))


def _check_kind(device: object) -> None:
    """Raise stock's exception for a device that does not exist, or that is no CUDA device."""
    with stock.small_file(b"{}      ") as file:
        stock.call(stock.safe_open, (file.name, "pt", device), {})
    if isinstance(device, str) and not device.startswith("cuda"):
        kind, _, number = device.partition(":")
        shown = kind if kind == "mps" else f"{kind}:{number or 0}"
        raise stock.SafetensorError(f"prefetch loads to cuda devices, not {shown}")
