"""Process groups as sharding needs them: who is where, small messages, and agreeing on errors.

Two planes. *Control* is a gloo channel over all ranks: headers, wants and error flags go there, on
the CPU, whatever backend the data takes, and never between the caller's own collectives. *Data*
goes by another, among the ranks of one node or all; in an NCCL group of one node by that itself.

An error of one rank ends all of them: every phase closes with `Group.agree`, as a `Phase` does,
which raises the same `RankError` everywhere. A rank that is killed breaks its connections; the
others then get a RankError, too.
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

__all__ = ["Flag", "Group", "PeerFailed", "Phase", "SingleGroup", "is_told"]


def is_told(error: BaseException) -> bool:
    """Whether all ranks know of an error: it came out of `Group.agree`, and is not told again."""
    return isinstance(error, RankError) or getattr(error, "_fastst_told", False)


class PeerFailed(Exception):  # noqa: N818 - control flow; never leaves the package
    """Another rank has failed, and tells how when all agree; what came is not complete."""


class SingleGroup:
    """A group of this process alone, as fastsafetensors names it."""

    def rank(self) -> int:
        """Always 0."""
        return 0

    def size(self) -> int:
        """Always 1."""
        return 1


def _node() -> str:
    """What ranks of one machine have in common: they share a page cache."""
    given = current().node_id
    if given:
        return given
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


class Flag:
    """Whether any rank has failed, asked without waiting for the answer yet."""

    def __init__(self, value: torch.Tensor, pending: Pending | None) -> None:
        self._value, self._pending = value, pending

    def raised(self) -> bool:
        """Wait for all ranks' answers.

        Raises:
            RankError: a rank is gone.
        """
        if self._pending is not None:
            self._pending.wait()
        return bool(self._value.item())


class Phase:
    """A ``with`` block of work on all ranks, whose end is `Group.agree`. Made by `Group.phase`.

    Attributes:
        value: of this rank, for the others.
        told: every rank's value, once the phase is over.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self.value: Any = None
        self.told: list[Any] = []

    def __enter__(self) -> Phase:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and is_told(error):
            return
        try:
            ours = None if isinstance(error, PeerFailed) else error
            self.told = self._group.agree(ours, self.value)
        finally:
            ours = None
            del error, trace  # a traceback keeps this frame


class Group:
    """This process among its peers.

    Attributes:
        rank: our place in the group, 0 to size - 1. Never a device's number.
        size: how many there are.
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
        """The group that a caller means. Collective the first time that it is asked for.

        Args:
            pg: a torch ProcessGroup; a `SingleGroup`, or another object whose ``size()`` is 1;
                None: this process alone.

        Raises:
            TypeError: it is something else.
            RankError: the ranks could not be reached.
            FaststError: this thread is in the middle of the same call, which a signal's handler
                or a finalizer has interrupted. The other ranks wait for that call's messages.
        """
        if isinstance(pg, Group):
            return pg
        if pg is None or _is_single(pg):
            return cls(None)
        import torch.distributed as dist

        if pg is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is no member of the process group")
        if not isinstance(pg, dist.ProcessGroup):
            raise TypeError(f"no process group: {pg!r}")
        with shared:
            # One for each: threads that first use different groups must not wait for each other.
            making = _making.setdefault(pg, _Making())
        with making.guard.lock(lambda: None):
            found = _groups.get(pg)
            if found is None:
                if making.under_way:
                    raise FaststError("this thread is just connecting the process group's ranks")
                making.under_way = True
                try:
                    found = _groups[pg] = cls(pg)
                finally:
                    making.under_way = False
        return found

    @property
    def nodes(self) -> list[int]:
        """For each rank, the number of its node, in the order of their first ranks.

        Known once all have said something: names of nodes go with the first values.
        """
        assert self._nodes is not None
        return self._nodes

    @property
    def node_ranks(self) -> list[int]:
        """Ranks on our node, ascending."""
        return [rank for rank in range(self.size) if self.nodes[rank] == self.nodes[self.rank]]

    # ---- control ----

    def gather(self, value: Any) -> list[Any]:
        """What every rank said, by rank. Collective.

        Raises:
            RankError: a rank is gone.
        """
        if self._control is None:
            self._check_single()
            return [value]
        if self._nodes is None:
            told = self._control.objects((value, _node()))
            names = [name for _, name in told]
            self._nodes = [list(dict.fromkeys(names)).index(name) for name in names]
            return [one for one, _ in told]
        return self._control.objects(value)

    def agree(self, error: BaseException | None, value: Any = None) -> list[Any]:
        """End a phase: every rank's value, or one error for all. Collective.

        Args:
            error: what went wrong here, if anything.
            value: for the others.

        Raises:
            RankError: something went wrong on a rank, the lowest of which is named; caused by
                ``error``, if it went wrong here, too.
            TypeError, ValueError, LookupError: ``error`` itself, where it is one and all ranks
                say the same: an argument that is wrong everywhere.
            BaseException: ``error``, where it is an interrupt.
        """
        said = None if error is None else f"{type(error).__name__}: {error}"
        if error is not None:
            # A traceback keeps frames, and these memory; users and shells keep tracebacks.
            traceback.clear_frames(error.__traceback__)
        answers = self.gather((said, value))
        if error is not None and not isinstance(error, Exception):
            error._fastst_told = True  # type: ignore[attr-defined]
            raise error
        arguments = (TypeError, ValueError, LookupError)
        if isinstance(error, arguments) and all(one[0] == said for one in answers):
            raise error
        for rank, (cause, _) in enumerate(answers):
            if cause is not None:
                raise RankError(rank, cause) from error
        return [answer for _, answer in answers]

    def phase(self) -> Phase:
        """A ``with`` block that ends with `agree`, on the error raised in it or its value.

        Collective. An error that all ranks know already is not told again.
        """
        return Phase(self)

    def flag(self, failed: bool) -> Flag:
        """Tell the others whether we have failed, and ask whether they have; does not wait."""
        import torch

        value = torch.tensor([int(failed)])
        if self._control is None:
            self._check_single()
            return Flag(value, None)
        return Flag(value, self._control.maximum(value))

    def _check_single(self) -> None:
        if self.size > 1:
            raise RankError(None, "the process was forked, or ends: its process group is gone")

    # ---- data ----

    def channel(self, ranks: list[int], device: str) -> Channel:
        """Connections of some ranks for data of a kind of device. Collective on them, once."""
        found = self._channels.get(tuple(ranks))
        if found is None:
            import torch.distributed as dist

            kind = "gloo"
            if device != "cpu" and "nccl" in str(dist.get_backend(self._pg)):
                kind = "own" if len(ranks) == self.size else "nccl"
            found = Channel(self._pg, ranks, "data", kind)
            if kind == "gloo":
                import torch

                # Nobody goes on, and dies of what it does then, while others still connect:
                # gloo tries again, and waits for the group's timeout each time.
                found.maximum(torch.tensor([0])).wait()
            self._channels[tuple(ranks)] = found
        return found


class _Making:
    """One group's ranks connect. A forked child connects none: see `_forget`."""

    def __init__(self) -> None:
        self.guard = Guard()
        self.under_way = False


_alive: weakref.WeakSet[Group] = weakref.WeakSet()
_groups: weakref.WeakKeyDictionary[Any, Group] = weakref.WeakKeyDictionary()
_making: weakref.WeakKeyDictionary[Any, _Making] = weakref.WeakKeyDictionary()


def _is_single(pg: object) -> bool:
    import sys

    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and hasattr(dist, "ProcessGroup") and isinstance(pg, dist.ProcessGroup):
        return False
    size = getattr(pg, "size", None)
    return callable(size) and size() == 1


def _forget() -> None:
    """Let go of torch's groups: a forked child is nobody's peer.

    At exit, too: gloo's threads abort the process if their group is only taken apart after
    torch itself.
    """
    for group in list(_alive):
        group._pg = group._control = None
        group._channels.clear()
    _groups.clear()
    _making.clear()


def _forget_in_child() -> None:
    """The same, but torch's objects are never taken apart: that waits for threads of the parent."""
    import ctypes

    kept = [(group._pg, group._control, dict(group._channels)) for group in list(_alive)]
    if kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    _forget()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_forget)
