"""Opening a loader's files and reading their headers, in parallel; no tensor's bytes are read."""

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
from ..files.remote import (
    StandInFile,
    is_remote,
    local_file,
    not_by_stock,
    open_remote,
    refused_url,
    shown,
)
from ..layout import FileLayout
from .arguments import Settings
from .messages import explained
from .stock_file import StockFile, layout_of

__all__ = ["Entry", "open_entries"]

_THREADS = 8
"""Headers read at a time: enough to hide the latency of network file systems."""

_THREADS_FROM = 4
"""Number of files from which threads save more than they cost."""


@dataclasses.dataclass(eq=False)
class Entry:
    """A file whose header was read. Holds its descriptor, unless stock must read it.

    Attributes:
        path: as the caller gave it.
        rank: the rank that the caller named it for.
        layout: of its tensors.
        file: open; None when stock must read it.
        fallback: why stock must read it.
    """

    path: str
    rank: int
    layout: FileLayout
    file: engine.File | None
    fallback: Fallback | None

    def opened(
        self, call: str, config: Config, target: Device | None, device: str, note: str | None
    ) -> OpenedFile | StockFile:
        """The file for loading tensors, with an account of its own.

        Args:
            call: the name of the caller's function, for reports.
            config: options.
            target: the device for the engine.
            device: the device for stock.
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
                if self.file.feed is not None:
                    raise not_by_stock(self.file.path, fallback) from None
        assert fallback is not None
        try:
            by_stock = StockFile(self.path, self.layout, config, device, fallback, file=self.file)
        except Exception as error:
            raise explained(error, self.path) from error
        fell_back(config, call, self.path, fallback)
        return by_stock


def open_entries(wanted: Sequence[tuple[str, int]], settings: Settings) -> list[Entry]:
    """Open files and validate their headers; no tensor's bytes are read.

    Args:
        wanted: paths, each with its rank.
        settings: of the loader.

    Raises:
        OSError, SafetensorError: the error of the first file, in order, that cannot be opened. The
            type is stock's, the message names the file. No file stays open then.
    """
    if len(wanted) < _THREADS_FROM:
        return [_open(path, rank, settings) for path, rank in wanted]
    with ThreadPoolExecutor(min(_THREADS, len(wanted)), "fastst-headers") as pool:
        return list(pool.map(lambda one: _open(one[0], one[1], settings), wanted))


def _open(path: str, rank: int, settings: Settings) -> Entry:
    fallback = settings.fallback
    if is_remote(path):
        local = local_file(path, settings.config)
        if local is None:
            if fallback is not None:
                raise not_by_stock(shown(path), fallback)
            remote, layout = open_remote(path, settings.config)
            return Entry(path, rank, layout, remote, None)
        path = local
    if fallback is None:
        try:
            error = engine.native_error()
            if error is not None:
                raise Fallback(error)
            check_size(path, settings.config)
            check_descriptors()
            file, layout = open_checked(path, settings.config)
            return Entry(path, rank, layout, file, None)
        except StandInFile as found:
            return _open(found.url, rank, settings)
        except (OSError, MemoryError, Fallback) as error:
            fallback = Fallback.alone(error)
    try:
        with stock.safe_open(path, "pt", "cpu"):  # stock raises its own error for a bad file
            return Entry(path, rank, layout_of(path), None, fallback)
    except Exception as error:
        url = refused_url(path, error)
        if url is None:
            raise explained(error, path) from error
    return _open(url, rank, settings)
