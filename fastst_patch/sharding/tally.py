"""What was taken of each file, for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..report import LoadReport, emit
from .source import Source

if TYPE_CHECKING:
    import torch

__all__ = ["Tally"]


class Tally:
    """Counts what one rank takes of files, until they are reported.

    Args:
        call: who takes, for reports.
        device: where tensors go.
    """

    def __init__(self, call: str, device: str) -> None:
        self._call = call
        self._device = device
        self._taken: dict[str, list[float]] = {}  # path -> bytes, tensors, seconds

    def count(self, source: Source, result: Mapping[Any, torch.Tensor], seconds: float) -> None:
        """Add tensors taken of a file."""
        taken = self._taken.setdefault(source.path, [0, 0, 0.0])
        taken[0] += sum(tensor.nbytes for tensor in result.values())
        taken[1] += len(result)
        taken[2] += seconds

    def report(self, source: Source, refused: str | None) -> None:
        """Report what was taken of a file since the last report.

        Args:
            source: the file.
            refused: why stock reads to this device, if it does.
        """
        nbytes, tensors, seconds = self._taken.pop(source.path, (0, 0, 0.0))
        if not seconds:
            return
        note, path, resident = source.doubt or refused, "stock", None
        if note is None:
            path = "exchange"  # of what others read
            if source.opened is not None:
                account = source.opened.account
                path, note, resident = account.path, account.note, account.resident
        counts = int(nbytes), int(tensors), seconds
        emit(LoadReport(self._call, source.path, self._device, path, *counts, resident, note))
