"""Process groups as sharding needs them: nodes, small messages, and agreement on errors.

There are two kinds of channels. The *control* channel is gloo over all ranks, on the CPU, whatever
backend the data takes. It carries headers, requests and error flags, and it never mixes with the
caller's own collectives. *Data* channels connect the ranks of one node, or all ranks; in an NCCL
group of one node this is the caller's group itself.

An error of one rank ends the load on all ranks: every phase ends with `Group.agree`, which raises
the same `RankError` on all of them. A rank that is killed breaks its connections, and the others
raise a RankError, too.
"""

from __future__ import annotations

import atexit
import os
import socket
import traceback
import weakref
from typing import TYPE_CHECKING, Any

from ..config import current
from ..errors import FaststError, RankError
from ..locks import Guard, shared
from .channel import Channel, Pending

if TYPE_CHECKING:
    import torch

__all__ = ["Flag", "Group", "PeerFailed", "Phase", "SingleGroup", "is_agreed"]


def is_agreed(error: BaseException) -> bool:
    """Whether `Group.agree` raised an error: all ranks know it, and it is not sent again."""
    return isinstance(error, RankError) or getattr(error, "_fastst_agreed", False)


class PeerFailed(Exception):  # noqa: N818 - control flow; never leaves the package
    """Another rank has failed. The next `Group.agree` raises its error; the data is incomplete."""


class SingleGroup:
    """A group of this process alone, as fastsafetensors names it."""

    def rank(self) -> int:
        """Always 0."""
        return 0

    def size(self) -> int:
        """Always 1."""
        return 1


def _node() -> str:
    """An identifier of this machine, whose ranks share a page cache."""
    given = current().node_id
    if given:
        return given
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


class Flag:
    """Whether any rank has failed. The exchange of this has started; `raised` waits for it."""

    def __init__(self, value: torch.Tensor, pending: Pending | None) -> None:
        self._value, self._pending = value, pending

    def raised(self) -> bool:
        """Wait for all ranks' flags, and return whether any is set.

        Raises:
            RankError: a rank is gone.
        """
        if self._pending is not None:
            self._pending.wait()
        return bool(self._value.item())


class Phase:
    """A ``with`` block of work on all ranks that ends with `Group.agree`. Made by `Group.phase`.

    Attributes:
        value: of this rank, for the others.
        gathered: every rank's value, by rank, once the phase is over.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self.value: Any = None
        self.gathered: list[Any] = []

    def __enter__(self) -> Phase:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and is_agreed(error):
            return
        try:
            ours = None if isinstance(error, PeerFailed) else error
            self.gathered = self._group.agree(ours, self.value)
        finally:
            ours = None
            del error, trace  # the traceback refers to this frame


class Group:
    """This process among its peers.

    Attributes:
        rank: of this process in the group, 0 to size - 1. It is no device number.
        size: number of ranks.
    """

    def __init__(self, pg: Any) -> None:
        self._pg = pg
        self._control: Channel | None = None
        self._channels: dict[tuple[int, ...], Channel] = {}
        _alive.add(self)
        self._nodes: list[int] | None = None
        if pg is None:
            self.rank, self.size, self._nodes = 0, 1, [0]
            return
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(pg), dist.get_world_size(pg)
        self._control = Channel(pg, list(range(self.size)), "control", "gloo")

    @classmethod
    def of(cls, pg: object = None) -> Group:
        """The `Group` of a caller's process group. Collective the first time for each.

        Args:
            pg: a torch ProcessGroup; a `SingleGroup`, or another object whose ``size()`` is 1;
                None: this process alone.

        Raises:
            TypeError: it is something else.
            RankError: the ranks could not be reached.
            FaststError: a signal handler or a finalizer calls this while its thread is inside the
                same call. The other ranks wait for that call's messages.
        """
        if isinstance(pg, Group):
            return pg
        if pg is None or _is_single(pg):
            return cls(None)
        import torch.distributed as dist

        if pg is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not a member of the process group")
        if not isinstance(pg, dist.ProcessGroup):
            raise TypeError(f"{pg!r} is not a process group")
        with shared:
            # A lock for each group: threads that connect different ones must not wait for another.
            connecting = _connecting.setdefault(pg, _Connecting())
        with connecting.guard.lock(lambda: None):
            found = _groups.get(pg)
            if found is None:
                if connecting.in_progress:
                    raise FaststError("this thread is already connecting the process group's ranks")
                connecting.in_progress = True
                try:
                    found = _groups[pg] = cls(pg)
                finally:
                    connecting.in_progress = False
        return found

    @property
    def nodes(self) -> list[int]:
        """Each rank's node number. Nodes are numbered in the order of their first ranks.

        Known after the first `gather`, which also sends the names of nodes.
        """
        assert self._nodes is not None
        return self._nodes

    @property
    def node_ranks(self) -> list[int]:
        """Ranks on this rank's node, ascending."""
        return [rank for rank in range(self.size) if self.nodes[rank] == self.nodes[self.rank]]

    # ---- control ----

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Collective.

        Raises:
            RankError: a rank is gone.
        """
        if self._control is None:
            self._check_single()
            return [value]
        if self._nodes is None:
            gathered = self._control.all_gather_objects((value, _node()))
            names = [name for _, name in gathered]
            self._nodes = [list(dict.fromkeys(names)).index(name) for name in names]
            return [one for one, _ in gathered]
        return self._control.all_gather_objects(value)

    def agree(self, error: BaseException | None, value: Any = None) -> list[Any]:
        """End a phase: return every rank's value, or raise one error on all. Collective.

        Args:
            error: of this rank, if any.
            value: for the others.

        Raises:
            RankError: some rank failed; it names the lowest one. Its cause is ``error``, if this
                rank failed, too.
            TypeError, ValueError, LookupError: ``error`` itself, where it is one of these and all
                ranks have the same: an argument that is wrong everywhere.
            BaseException: ``error`` itself, where it is an interrupt.
        """
        message = None if error is None else f"{type(error).__name__}: {error}"
        if error is not None:
            # Frames of the traceback refer to memory; users and shells keep tracebacks.
            traceback.clear_frames(error.__traceback__)
        gathered = self.gather((message, value))
        if error is not None and not isinstance(error, Exception):
            error._fastst_agreed = True  # type: ignore[attr-defined]
            raise error
        arguments = (TypeError, ValueError, LookupError)
        if isinstance(error, arguments) and all(theirs == message for theirs, _ in gathered):
            raise error
        for rank, (cause, _) in enumerate(gathered):
            if cause is not None:
                raise RankError(rank, cause) from error
        return [one for _, one in gathered]

    def phase(self) -> Phase:
        """A ``with`` block that ends with `agree`, on the error raised in it or its value.

        Collective. An error that `agree` raised inside the block is not sent again.
        """
        return Phase(self)

    def flag(self, failed: bool) -> Flag:
        """Start exchanging whether a rank has failed, this one or another; does not wait."""
        import torch

        value = torch.tensor([int(failed)])
        if self._control is None:
            self._check_single()
            return Flag(value, None)
        return Flag(value, self._control.maximum(value))

    def _check_single(self) -> None:
        if self.size > 1:
            raise RankError(None, "the process was forked, or is ending: its process group is gone")

    # ---- data ----

    def channel(self, ranks: list[int], device: str) -> Channel:
        """The data channel of some ranks for a kind of device. Collective on them, once."""
        found = self._channels.get(tuple(ranks))
        if found is None:
            import torch.distributed as dist

            kind = "gloo"
            if device != "cpu" and "nccl" in str(dist.get_backend(self._pg)):
                kind = "own" if len(ranks) == self.size else "nccl"
            found = Channel(self._pg, ranks, "data", kind)
            if kind == "gloo":
                import torch

                # Wait until all are connected. Where a rank goes on and fails while others still
                # connect to it, gloo retries, and waits for the group's timeout each time.
                found.maximum(torch.tensor([0])).wait()
            self._channels[tuple(ranks)] = found
        return found


class _Connecting:
    """Whether a thread connects the ranks of one group. A forked child forgets it: `_forget`."""

    def __init__(self) -> None:
        self.guard = Guard()
        self.in_progress = False


_alive: weakref.WeakSet[Group] = weakref.WeakSet()
_groups: weakref.WeakKeyDictionary[Any, Group] = weakref.WeakKeyDictionary()
_connecting: weakref.WeakKeyDictionary[Any, _Connecting] = weakref.WeakKeyDictionary()


def _is_single(pg: object) -> bool:
    import sys

    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and hasattr(dist, "ProcessGroup") and isinstance(pg, dist.ProcessGroup):
        return False
    size = getattr(pg, "size", None)
    return callable(size) and size() == 1


def _forget() -> None:
    """Let go of torch's groups, in a forked child and at exit.

    A forked child is no member of them. At exit, gloo's threads abort the process if their group
    is destroyed after torch itself.
    """
    for group in list(_alive):
        group._pg = group._control = None
        group._channels.clear()
    _groups.clear()
    _connecting.clear()


def _forget_in_child() -> None:
    """As `_forget`, but leak torch's objects: destroying them waits for threads of the parent."""
    import ctypes

    kept = [(group._pg, group._control, dict(group._channels)) for group in list(_alive)]
    if kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    _forget()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_forget)
