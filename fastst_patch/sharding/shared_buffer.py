"""Memory of the host that the ranks of one node have in common.

Parts that are exchanged on the host are read straight into it, and every rank copies its own out:
nothing goes through sockets. The first rank of a node makes it, by ``memfd_create``, and tells
the others where; they map it by ``/proc``. It has no name, so that nothing is left behind
however a rank ends, and its pages are there before anybody writes to them. Where it cannot be had,
for instance by ranks in several containers, parts go by gloo.

Ownership: a rank's map belongs to its `SharedBuffer` and to the tensors over it; the memory is
freed with the last of them. The offered descriptor is closed once all ranks have mapped it; before
Python 3.13 a map has a descriptor of its own.
"""

from __future__ import annotations

import dataclasses
import logging
import mmap
import os
import secrets
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import engine
from .groups import Group

if TYPE_CHECKING:
    import torch

__all__ = ["Offer", "SharedBuffer"]

_log = logging.getLogger("fastst_patch")

_NAME = "fastst_patch"
_LEAST, _STEP = 1 << 20, 32 << 20  # bytes that are made at least, and multiples of what is more
_MAPPED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
_TOKEN = 32  # bytes, by which memory is known to be what was meant


@dataclasses.dataclass(frozen=True)
class Offer:
    """What a rank wants to have in common with its node; goes to the others.

    Attributes:
        nbytes: how much; 0 if it has as much, or does without.
        pid, fd, token: where the node's first rank has made it; pid 0 if it has not.
    """

    nbytes: int = 0
    pid: int = 0
    fd: int = -1
    token: bytes = b""


class SharedBuffer:
    """Memory in common with the ranks of our node, made when it is first wanted.

    Args:
        group: the ranks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._map: mmap.mmap | None = None
        self._made: tuple[mmap.mmap, int] | None = None  # offered, and its descriptor
        self._refused = len(group.node_ranks) < 2

    def possible(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks may have memory in common: exactly those of our node do."""
        return not self._refused and list(ranks) == self._group.node_ranks

    def wish(self, nbytes: int) -> Offer:
        """Say what is wanted; the node's first rank makes it first. For `settle`.

        Args:
            nbytes: the same on all ranks of the node.
        """
        if nbytes == 0 or (self._map is not None and len(self._map) >= nbytes):
            return Offer()
        self.withdraw()
        nbytes = _rounded(nbytes)
        if self._group.rank != self._group.node_ranks[0]:
            return Offer(nbytes)
        token = secrets.token_bytes(_TOKEN)
        try:
            _, fd = self._made = _make(nbytes, token)
        except (OSError, ValueError, AttributeError) as error:
            _log.debug("no memory in common: %s; parts are exchanged by gloo", error)
            return Offer(nbytes)
        return Offer(nbytes, os.getpid(), fd, token)

    def settle(self, told: Sequence[Offer]) -> bool:
        """Map what was made. Collective, if any rank wished for something.

        Args:
            told: every rank's wish.

        Returns:
            Whether all ranks, of all nodes, have what they wished for. Where one of a node has
            not, nobody of that node does.

        Raises:
            RankError: a rank failed, or is gone.
        """
        ranks = self._group.node_ranks
        wish = told[self._group.rank]
        try:
            with self._group.phase() as phase:
                if wish.nbytes:
                    self._map = self._made[0] if self._made else _join(wish.nbytes, told[ranks[0]])
                phase.value = not wish.nbytes or self._map is not None
        finally:
            self.withdraw()
        if not all(phase.told[rank] for rank in ranks):
            self._map, self._refused = None, True
        return all(phase.told)

    def tensor(self, nbytes: int) -> torch.Tensor | None:
        """The memory's first bytes, if there are as many."""
        import torch

        if self._map is None or len(self._map) < nbytes or not nbytes:
            return None
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes)

    def close(self) -> None:
        """Let go of the memory. What stands on it keeps it; it may be wished for again."""
        self.withdraw()
        self._map = None

    def withdraw(self) -> None:
        """Take back what was offered and is not settled, if anything."""
        made, self._made = self._made, None
        if made is not None:
            os.close(made[1])


def _rounded(nbytes: int) -> int:
    """What is made of a wish, so that tensors taken one by one do not each wish for more."""
    if nbytes > _STEP:
        return -(-nbytes // _STEP) * _STEP
    return max(1 << (nbytes - 1).bit_length(), _LEAST)


def _make(nbytes: int, token: bytes) -> tuple[mmap.mmap, int]:
    """Memory with a descriptor for the others. Raises OSError, ValueError, AttributeError."""
    headroom = engine.memory_headroom()
    if headroom is not None and nbytes > headroom // 2:
        raise OSError(f"{nbytes} bytes do not fit the memory that is left ({headroom})")
    fd = os.memfd_create(_NAME)
    try:
        os.posix_fallocate(fd, 0, nbytes)  # or writing could kill us
        found = mmap.mmap(fd, nbytes, **_MAPPED)
    except BaseException:
        os.close(fd)
        raise
    found[: len(token)] = token
    return found, fd


def _join(nbytes: int, made: Offer) -> mmap.mmap | None:
    """Memory that another rank has made, if it can be had."""
    if not made.pid:
        return None
    path = f"/proc/{made.pid}/fd/{made.fd}"
    try:
        _check(path)  # opening a device might do something
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            _check(f"/proc/self/fd/{fd}")  # it is what it was
            found = mmap.mmap(fd, nbytes, **_MAPPED)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        _log.debug("no memory in common: %s; parts are exchanged by gloo", error)
        return None
    # It may be that of a namesake, in another container.
    return found if found[:_TOKEN] == made.token else None


def _check(path: str) -> None:
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise OSError(f"{path} is something else")
