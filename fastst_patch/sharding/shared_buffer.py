"""Host memory that the ranks of one node share.

Readers read their parts of exchanged units straight into it, and every rank copies its results
from there, so no data passes through sockets. The first rank of a node makes the memory by
``memfd_create`` and offers it to the others, which map it by ``/proc``. It has no name in a file
system, so nothing is left behind however a rank ends, and its pages are allocated before any rank
writes to them. Ranks that cannot share it, such as those in separate containers, exchange by gloo.

Ownership: a rank's map belongs to its `SharedBuffer` and to the tensors over it; the memory is
freed with the last of them. The offered descriptor is closed once all ranks have mapped it; before
Python 3.13 each map keeps a descriptor of its own.
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
_LEAST, _STEP = 1 << 20, 32 << 20  # smallest size in bytes; larger ones are multiples of `_STEP`
_MAPPED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
_TOKEN = 32  # bytes at the begin of the memory, which prove that it is the offered one


@dataclasses.dataclass(frozen=True)
class Offer:
    """A rank's request for shared memory, and the memory of the node's first rank; sent to all.

    Attributes:
        nbytes: bytes needed; 0 if the rank has as much, or needs none.
        pid: of the process that has made the memory; 0 if none was made here.
        fd: its descriptor in that process.
        token: its first bytes.
    """

    nbytes: int = 0
    pid: int = 0
    fd: int = -1
    token: bytes = b""


class SharedBuffer:
    """Memory shared with the ranks of this node, made when it is first needed.

    Args:
        group: the ranks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._map: mmap.mmap | None = None
        self._made: tuple[mmap.mmap, int] | None = None  # while it is offered; with its descriptor
        self._unavailable = len(group.node_ranks) < 2

    def possible(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks may share memory: exactly the ranks of this node may."""
        return not self._unavailable and list(ranks) == self._group.node_ranks

    def offer(self, nbytes: int) -> Offer:
        """This rank's offer for `accept`; the node's first rank makes the memory.

        Args:
            nbytes: bytes needed, the same on all ranks of the node.
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
            _log.debug("no shared memory: %s; parts are exchanged by gloo", error)
            return Offer(nbytes)
        return Offer(nbytes, os.getpid(), fd, token)

    def accept(self, offers: Sequence[Offer]) -> bool:
        """Map the offered memory. Collective, if any rank needs some.

        Args:
            offers: of every rank.

        Returns:
            Whether all ranks, of all nodes, have the memory that they need. Where one rank of a
            node has none, no rank of that node has.

        Raises:
            RankError: a rank failed, or is gone.
        """
        ranks = self._group.node_ranks
        nbytes = offers[self._group.rank].nbytes
        try:
            with self._group.phase() as phase:
                if nbytes:
                    self._map = self._made[0] if self._made else _map(nbytes, offers[ranks[0]])
                phase.value = not nbytes or self._map is not None
        finally:
            self.withdraw()
        if not all(phase.gathered[rank] for rank in ranks):
            self._map, self._unavailable = None, True
        return all(phase.gathered)

    def tensor(self, nbytes: int) -> torch.Tensor | None:
        """The first ``nbytes`` of the memory; None where it has fewer."""
        import torch

        if self._map is None or len(self._map) < nbytes or not nbytes:
            return None
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes)

    def close(self) -> None:
        """Let go of the memory. Tensors over it keep it; `offer` may be called again."""
        self.withdraw()
        self._map = None

    def withdraw(self) -> None:
        """Withdraw an offer that was not accepted yet, if there is one."""
        made, self._made = self._made, None
        if made is not None:
            os.close(made[1])


def _rounded(nbytes: int) -> int:
    """Bytes to make, rounded up: tensors taken one by one rarely need more than the one before."""
    if nbytes > _STEP:
        return -(-nbytes // _STEP) * _STEP
    return max(1 << (nbytes - 1).bit_length(), _LEAST)


def _make(nbytes: int, token: bytes) -> tuple[mmap.mmap, int]:
    """New memory and its descriptor. Raises OSError, ValueError, AttributeError."""
    headroom = engine.memory_headroom()
    if headroom is not None and nbytes > headroom // 2:
        raise OSError(f"{nbytes} bytes do not fit into the free memory ({headroom} bytes)")
    fd = os.memfd_create(_NAME)
    try:
        os.posix_fallocate(fd, 0, nbytes)  # else a write without memory ends in SIGBUS
        found = mmap.mmap(fd, nbytes, **_MAPPED)
    except BaseException:
        os.close(fd)
        raise
    found[: len(token)] = token
    return found, fd


def _map(nbytes: int, offer: Offer) -> mmap.mmap | None:
    """Map the memory that another rank offers; None where that is impossible."""
    if not offer.pid:
        return None
    path = f"/proc/{offer.pid}/fd/{offer.fd}"
    try:
        _check(path)  # before opening it: opening another file, such as a device, has effects
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            _check(f"/proc/self/fd/{fd}")  # the link may have changed in between
            found = mmap.mmap(fd, nbytes, **_MAPPED)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        _log.debug("no shared memory: %s; parts are exchanged by gloo", error)
        return None
    # In another container, the pid may be that of another process, with memory of its own.
    return found if found[:_TOKEN] == offer.token else None


def _check(path: str) -> None:
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise OSError(f"{path} is not shared memory of fastst_patch")
