"""Process groups as sharding needs them: who is where, small messages, and agreeing on errors.

Two planes. *Control* is a gloo group of our own over the same ranks: headers, wants and error
flags go there, on the CPU, whatever backend the data takes, and never between the caller's own
collectives. *Data* is the caller's group, or a part of it: the ranks of one node.

An error of one rank ends all of them: every phase closes with `Group.agree`, which raises the
same `RankError` everywhere. A rank that is killed breaks its connections; what the others then
get is a RankError, too.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..config import current
from ..errors import RankError
from ..locks import fork_safe

if TYPE_CHECKING:
    import torch

__all__ = ["Flag", "Group", "SingleGroup", "lost"]

_lock = threading.Lock()
fork_safe(_lock)


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

    def __init__(self, value: torch.Tensor, work: Any) -> None:
        self._value, self._work = value, work

    def raised(self) -> bool:
        """Wait for all ranks' answers.

        Raises:
            RankError: a rank is gone.
        """
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise lost(error) from error
        return bool(self._value.item())


def lost(error: BaseException) -> RankError:
    """What becomes of torch's error when a peer no longer answers."""
    return RankError(None, f"the group lost a rank, or the network: {error}")


class Group:
    """This process among its peers.

    Attributes:
        rank: our place in the group, 0 to size - 1. Never a device's number.
        size: how many there are.
        nodes: for each rank, the number of its node; nodes are numbered as they first appear.
    """

    def __init__(self, pg: Any) -> None:
        self._pg = pg
        self._control: Any = None
        self._parts: dict[tuple[int, ...], Any] = {}
        _alive.add(self)
        if pg is None:
            self.rank, self.size, self.nodes = 0, 1, [0]
            return
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(pg), dist.get_world_size(pg)
        self._members = dist.get_process_group_ranks(pg)
        self._control = self._new_group(self._members, "gloo")
        names = self.gather(_node())
        self.nodes = [list(dict.fromkeys(names)).index(name) for name in names]

    @classmethod
    def of(cls, pg: object = None) -> Group:
        """The group that a caller means. Collective the first time that it is asked for.

        Args:
            pg: a torch ProcessGroup; a `SingleGroup`, or another object whose ``size()`` is 1;
                None: this process alone.

        Raises:
            TypeError: it is something else.
            RankError: the ranks could not be reached.
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
        with _lock:
            found = _groups.get(pg)
        if found is None:
            found = cls(pg)
            with _lock:
                found = _groups.setdefault(pg, found)
        return found

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
        if self._single():
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value, group=self._control)
        except RuntimeError as error:
            raise lost(error) from error
        return found

    def agree(self, error: BaseException | None, value: Any = None) -> list[Any]:
        """End a phase: every rank's value, or one error for all. Collective.

        Args:
            error: what went wrong here, if anything.
            value: for the others.

        Raises:
            RankError: something went wrong on a rank, the lowest of which is named; caused by
                ``error`` where that is ours. An interrupt of our own is raised as it is.
        """
        said = None if error is None else f"{type(error).__name__}: {error}"
        answers = self.gather((said, value))
        if error is not None and not isinstance(error, Exception):
            raise error
        for rank, (cause, _) in enumerate(answers):
            if cause is not None:
                raise RankError(rank, cause) from (error if rank == self.rank else None)
        return [answer for _, answer in answers]

    def flag(self, failed: bool) -> Flag:
        """Tell the others whether we have failed, and ask whether they have; does not wait."""
        import torch

        value = torch.tensor([int(failed)])
        if self._single():
            return Flag(value, None)
        import torch.distributed as dist

        try:
            work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._control, async_op=True)
        except RuntimeError as error:
            raise lost(error) from error
        return Flag(value, work)

    def _single(self) -> bool:
        if self._control is None and self.size > 1:
            raise RankError(None, "the process was forked, or ends: its process group is gone")
        return self.size == 1

    # ---- data ----

    def data(self, ranks: list[int]) -> Any:
        """The torch group of some of our ranks, with the caller's backends. Collective on them."""
        if ranks == list(range(self.size)):
            return self._pg
        found = self._parts.get(tuple(ranks))
        if found is None:
            import torch.distributed as dist

            members = [self._members[rank] for rank in ranks]
            found = self._new_group(members, dist.get_backend(self._pg))
            self._parts[tuple(ranks)] = found
        return found

    def member(self, rank: int) -> int:
        """The number by which torch's collectives know one of our ranks."""
        return self._members[rank]

    def _new_group(self, members: list[int], backend: str) -> Any:
        import torch.distributed as dist

        try:
            return dist.new_group(
                members,
                timeout=_timeout(self._pg),
                backend=backend,
                use_local_synchronization=True,
            )
        except RuntimeError as error:
            raise lost(error) from error


_alive: weakref.WeakSet[Group] = weakref.WeakSet()
_groups: weakref.WeakKeyDictionary[Any, Group] = weakref.WeakKeyDictionary()


def _is_single(pg: object) -> bool:
    import sys

    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and hasattr(dist, "ProcessGroup") and isinstance(pg, dist.ProcessGroup):
        return False
    size = getattr(pg, "size", None)
    return callable(size) and size() == 1


def _timeout(pg: Any) -> timedelta | None:
    """How long the caller's group waits; None where torch does not say."""
    import torch

    for device in ("cpu", "cuda"):
        try:
            backend = pg._get_backend(torch.device(device))
            found = backend.options._timeout
        except (RuntimeError, AttributeError):
            continue
        if isinstance(found, timedelta):
            return found
    return None


def _forget() -> None:
    """Let go of torch's groups: a forked child is nobody's peer.

    At exit, too: gloo's threads abort the process if their group is only taken apart after
    torch itself.
    """
    for group in list(_alive):
        group._pg = group._control = None
        group._parts.clear()
    _groups.clear()


os.register_at_fork(after_in_child=_forget)
atexit.register(_forget)
