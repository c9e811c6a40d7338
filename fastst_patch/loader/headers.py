"""Files that were named to a loader: their headers, read in parallel, and nothing else yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .. import engine, stock
from ..config import Config
from ..device import Device
from ..dropin.eligibility import check_descriptors, check_size, fell_back, opened_for
from ..errors import Fallback
from ..files.base import OpenedFile, open_checked
from ..layout import FileLayout
from .arguments import Settings
from .messages import explained
from .stock_file import StockFile, layout_of

__all__ = ["Entry", "open_entries"]

_TOGETHER = 8
"""Headers read at a time: enough to hide the latency of network file systems."""

_ALONE = 4
"""Up to so many files threads cost more than they save."""


@dataclasses.dataclass(eq=False)
class Entry:
    """A file whose header is known. Holds its descriptor, unless stock has to read it.

    Attributes:
        path: as the caller gave it.
        rank: that reads it.
        layout: what is in it.
        file: open; None when stock has to read it.
        fallback: why.
    """

    path: str
    rank: int
    layout: FileLayout
    file: engine.File | None
    fallback: Fallback | None

    def opened(
        self, call: str, config: Config, target: Device | None, device: str, note: str | None
    ) -> OpenedFile | StockFile:
        """The file on its way to tensors, with an account of its own.

        Args:
            call: who wants it, for reports.
            config: options.
            target: for the engine.
            device: for stock.
            note: for its report.
        """
        fallback = self.fallback
        if self.file is not None:
            try:
                made = opened_for(self.file, self.layout, config, target)
                made.account.reason = note
                return made
            except Fallback as error:
                fallback = Fallback.alone(error)
        assert fallback is not None
        try:
            left = StockFile(self.path, self.layout, config, device, fallback)
        except Exception as error:
            raise explained(error, self.path) from error
        fell_back(config, call, self.path, fallback)
        return left


def open_entries(wanted: Sequence[tuple[str, int]], settings: Settings) -> list[Entry]:
    """Open files and validate their headers; no tensor's bytes are read.

    Args:
        wanted: paths, each with the rank that reads it.
        settings: of the loader.

    Raises:
        OSError, SafetensorError: of the first file in order that cannot be opened; the type is
            stock's, the message names the file. None stays open then.
    """
    if len(wanted) < _ALONE:
        return [_open(path, rank, settings) for path, rank in wanted]
    with ThreadPoolExecutor(min(_TOGETHER, len(wanted)), "fastst-headers") as pool:
        return list(pool.map(lambda one: _open(one[0], one[1], settings), wanted))


def _open(path: str, rank: int, settings: Settings) -> Entry:
    fallback = settings.fallback
    if fallback is None:
        try:
            error = engine.native_error()
            if error is not None:
                raise Fallback(error)
            check_size(path, settings.config)
            check_descriptors()
            file, layout = open_checked(path)
            return Entry(path, rank, layout, file, None)
        except (OSError, MemoryError, Fallback) as error:
            fallback = Fallback.alone(error)
    try:
        with stock.safe_open(path, "pt", "cpu"):  # its own words for what is wrong
            return Entry(path, rank, layout_of(path), None, fallback)
    except Exception as error:
        raise explained(error, path) from error
