"""Read-ahead of a handle whose tensors go to the CPU from a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import Fallback
from .pending import UNREAD
from .prefetcher import Group, Prefetcher
from .remote import ahead_bytes, ranges
from .request_order import RequestOrder

if TYPE_CHECKING:
    from .cpu import HostFile

__all__ = ["NetworkAhead", "request_order"]


def request_order(opened: Any) -> RequestOrder:
    """The order of requests to one remote file: groups of two ranges, or less of a small budget."""
    nbytes = min(2 * ranges(opened.config)[1], ahead_bytes(opened.config) // 3)
    return RequestOrder(opened.layout, max(nbytes, 1))


class NetworkAhead:
    """Hands out the tensors of one remote file, and reads the next ones meanwhile.

    Usable from any thread. The file is passed to each call and not kept, so that its memory does
    not wait for the garbage collector.

    Args:
        opened: the file.
    """

    def __init__(self, opened: HostFile) -> None:
        most = ahead_bytes(opened.config)
        self._prefetcher = Prefetcher(request_order(opened), lambda: most)

    def take(self, opened: HostFile, i: int) -> Any:
        """Tensor i, or the array. Raises as `HostFile.tensor`."""
        pending: _Pending | None
        pending = self._prefetcher.hand_out(i, lambda group: _start(opened, group))
        if pending is None:
            return _Pending(opened, [i], asked=True).take(i)
        try:
            return pending.take(i)
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C
                self._prefetcher.drop()
            if pending.asked or not isinstance(error, UNREAD):
                raise
        # What failed may belong to another tensor of the group, or was cancelled.
        return _Pending(opened, [i], asked=True).take(i)

    def stop(self) -> None:
        """Cancel what is read ahead. Tensors that are asked for later are read then."""
        self._prefetcher.drop()


def _start(opened: HostFile, group: Group) -> _Pending | None:
    if not group.held:
        return _Pending(opened, group.items, asked=True)
    if not opened.may_start(group.items):
        return None
    try:
        return _Pending(opened, group.items, asked=False)
    except (Fallback, MemoryError, OSError) as error:  # whoever asks for it gets the error
        error.__traceback__ = None
        return None


class _Pending:
    """A `Pending` of tensors that one job reads.

    Attributes:
        asked: whether it was started for a request, and not ahead of one.
    """

    def __init__(self, opened: HostFile, numbers: list[int], *, asked: bool) -> None:
        self.asked = asked
        made, self._job = opened.start(numbers)
        self._waiting = dict(zip(numbers, made, strict=True))
        self._ends = {i: opened.layout.extent(i)[1] for i in numbers}

    def landed(self) -> bool:
        """See `Pending`."""
        return self._job.stats().done

    def take(self, i: int) -> Any:
        """See `Pending`."""
        result = self._waiting.pop(i)
        self._job.wait_until(self._ends[i])
        return result
