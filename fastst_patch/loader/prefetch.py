"""Tensors of several files read ahead in one order, within one budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import tensors
from ..errors import Fallback
from ..files.base import TensorFile
from ..files.cpu import HostFile
from ..files.cuda import bounds_ahead
from ..files.file_order import FileOrder
from ..files.prefetcher import MOST_ITEMS, Group, Pending, Prefetcher
from ..files.remote import bounds_of_network

if TYPE_CHECKING:
    import torch

__all__ = ["FilesPrefetcher"]

_log = logging.getLogger("fastst_patch")

_NEAR = 8
"""Requests so close behind each other are a walk: a consumer may leave some tensors out."""

_LAG = 64
"""Tensors by which a walk passes a group before it gives up what was left out there."""


def _reads_by_network(file: TensorFile) -> bool:
    """Whether it is a remote file whose tensors go to the CPU."""
    return isinstance(file, HostFile) and file.file.feed is not None


class FilesPrefetcher:
    """Reads tensors of files ahead. Usable from any thread.

    Args:
        files: in the order of reading.
        numbers: of the tensors of each that may be asked for, ascending.
        budget: ``device_memory_budget``: most bytes read and not taken.
        block_bytes: most bytes of one group, if less than the budget makes it; a larger tensor
            is a group of its own.
        files_ahead: how many files behind the one in use may be started; None: any number.
        held: bytes that count against the budget beside what waits here, such as tensors handed
            out; however many they are, one group is still read ahead at any time.
    """

    def __init__(
        self,
        files: Sequence[TensorFile],
        numbers: Sequence[Sequence[int]],
        budget: int | None,
        *,
        block_bytes: int | None = None,
        files_ahead: int | None = None,
        held: Callable[[], int] = lambda: 0,
    ) -> None:
        mapped = bool(files) and isinstance(files[0], HostFile) and files[0].mapped
        most, nbytes = bounds_ahead(budget, mapped=mapped)
        if files and _reads_by_network(files[0]):
            most, nbytes = bounds_of_network(files[0].config)
        if block_bytes is not None:
            nbytes = min(block_bytes, nbytes)

        def room() -> int:
            return max(most - held(), nbytes) if most else 0

        self._files = files
        self._order = FileOrder(
            [(file.layout, some) for file, some in zip(files, numbers, strict=True)],
            nbytes,
            tensors=MOST_ITEMS,
            near=_NEAR,
            lag=_LAG,
            files_ahead=files_ahead,
        )
        self._prefetcher = Prefetcher(self._order, room)

    def begin(self) -> None:
        """Start reading what will be asked for first. Returns at once."""
        self._prefetcher.expect(None, self._start)

    def take(self, k: int, i: int) -> torch.Tensor:
        """Tensor i of file k, usable at once.

        Raises:
            Fallback: stock must do it.
            OSError, MemoryError, SafetensorError: its bytes could not be read.
        """
        opened = self._files[k]
        if not tensors.ordinary_mode():
            return opened.tensor(i)
        pending: Pending | None
        pending = self._prefetcher.hand_out(self._order.position(k, i), self._start)
        if pending is not None:
            return pending.take(i)
        alone = isinstance(opened, HostFile) and not _reads_by_network(opened)
        if k in self._order.left_alone or alone:
            return opened.tensor(i)
        return opened.ahead([i]).take(i)

    def drop(self) -> None:
        """Forget what was read ahead; what is in flight is cancelled. It is read anew if asked."""
        self._prefetcher.drop()

    def _start(self, group: Group) -> Pending | None:
        """Start a group; where that cannot be done its file is left alone."""
        k: int = group.source
        opened = self._files[k]
        try:
            return opened.ahead(group.items)
        except (Fallback, MemoryError, OSError) as error:
            # The request for one of these tensors raises it; until then it does not matter.
            _log.debug("%s is not read ahead: %s", opened.device, error)
            error.__traceback__ = None
            self._order.left_alone.add(k)
            return None
