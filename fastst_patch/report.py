"""Reports: one LoadReport per load, totals, profiles, log lines.

Silent by default: the ``fastst_patch`` logger has a NullHandler. INFO is one line per load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from .locks import shared

__all__ = [
    "SMALL_FILE",
    "STREAMED",
    "Account",
    "LoadReport",
    "Profile",
    "before_the_end",
    "count",
    "count_small",
    "listen",
    "profile",
    "tell",
    "tell_unfinished",
    "totals",
]

_log = logging.getLogger("fastst_patch")
_log.addHandler(logging.NullHandler())

STREAMED = ("sglang", "vllm")
"""Calls whose seconds are those of a whole load, reading included."""


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """One finished call, or one handle from opening to closing.

    Attributes:
        call: ``load_file``, ``safe_open``, ``prefetch``, or an integration's:
            ``from_pretrained``, ``Module.to``, ``diffusers``, ``vllm``, ``sglang``.
        file: path as the caller gave it; of a URL without user info and query; of tensors that
            came from memory, the module's class.
        device: where the tensors are.
        path: ``mmap`` (bytes were cached), ``mmap+readahead`` (some were not; workers fetch
            them while the tensors are already out), ``buffered``, ``direct``, ``owned``; to a
            device ``ring``, ``ring+direct``, ``gds``, or ``upload`` from memory; of a remote file
            its kind: ``http``, ``s3``, ``gs``, ``az``, ``hf``; or ``stock``.
        bytes: of the tensors handed out.
        tensors: how many were handed out.
        seconds: spent in our calls. For mapped tensors this is not the time to read them. Of
            ``vllm`` and ``sglang`` the whole load, with the engine's copies into its parameters.
        resident: fraction of the file found in the page cache, 0 to 1; None if not looked at.
        fallback_reason: why stock did it, or why O_DIRECT gave way to the page cache.
        requests: that were sent for a remote file, with repeated ones.
        retries: the repeated ones among them.
        waited: seconds between tries, summed over requests.
        received: bytes that a network brought, with those of failed requests.
        link: bytes a second that came while as many requests were on their way as made it more;
            0 where the load was too small to measure that.
    """

    call: str
    file: str
    device: str
    path: str
    bytes: int
    tensors: int
    seconds: float
    resident: float | None = None
    fallback_reason: str | None = None
    requests: int = 0
    retries: int = 0
    waited: float = 0.0
    received: int = 0
    link: int = 0

    @property
    def link_fraction(self) -> float | None:
        """`received` bytes in `seconds`, as a part of `link`; None where that is not known."""
        if not self.link or self.seconds <= 0:
            return None
        return min(self.received / self.seconds / self.link, 1.0)

    @property
    def gb_per_s(self) -> float:
        """1e9 bytes per second of `seconds`; 0.0 when nothing was handed out."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        """The INFO line."""
        text = (
            f"{self.call} {self.file}: {self.bytes / 1e9:.3f} GB in {self.tensors} tensors,"
            f" {self.seconds:.4f} s"
        )
        # To map takes the same time for any number of bytes; to stream does not.
        mapped = self.path.startswith("mmap") and self.call not in STREAMED
        text += f", path {self.path}" if mapped else f", {self.gb_per_s:.2f} GB/s, path {self.path}"
        if mapped:
            text += " (mapped, not copied"
            text += f"; {self.resident:.0%} was cached)" if self.resident is not None else ")"
        if self.requests:
            text += ", 1 request" if self.requests == 1 else f", {self.requests} requests"
        if self.link_fraction is not None:
            text += f", {self.link_fraction:.0%} of the link's {self.link / 1e9:.2f} GB/s"
        if self.retries:
            text += f" ({self.retries} repeated, {self.waited:.1f} s waited)"
        if self.fallback_reason is not None:
            text += f", because {self.fallback_reason}"
        return text


class Profile:
    """Reports collected by `profile`, in the order in which loads finished."""

    def __init__(self) -> None:
        self.reports: list[LoadReport] = []

    def __str__(self) -> str:
        """One line per load."""
        return "\n".join(str(report) for report in self.reports) or "no safetensors loads"


@dataclasses.dataclass
class _Totals:
    """Sums over the reports of one path."""

    loads: int = 0
    bytes: int = 0
    tensors: int = 0
    seconds: float = 0.0


# Guarded by the lock `shared`. The garbage collector may report a handle in the middle of an
# update, so an update is one operation, or stays right when another one comes in between.
_paths: dict[str, _Totals] = {}
_fallbacks: dict[str, int] = {}
_profiles: list[Profile] = []
_listeners: list[Callable[[LoadReport], None]] = []
_small_files = 0

_MOST_REASONS = 1000
"""Some reasons hold numbers, of which a process that runs for months would keep all."""

_OTHER_REASONS = "other reasons"

SMALL_FILE = "the file is small"
"""Why stock opened a file, where it is faster."""


def count(path: str, nbytes: int, made: int, seconds: float, reason: str | None) -> bool:
    """Add a load to the totals, without a report.

    Returns:
        Whether somebody listens, so that its report is to be made, and given to `tell`. To make
        one takes 3 us, a tenth of what stock takes for a small file.
    """
    with shared:
        of_path = _paths.get(path) or _paths.setdefault(path, _Totals())
        of_path.loads += 1
        of_path.bytes += nbytes
        of_path.tensors += made
        of_path.seconds += seconds
        if reason is not None:
            if reason not in _fallbacks and len(_fallbacks) >= _MOST_REASONS:
                reason = _OTHER_REASONS
            _fallbacks.setdefault(reason, 0)
            _fallbacks[reason] += 1
    return bool(_profiles or _listeners) or _log.isEnabledFor(logging.INFO)


def count_small() -> bool:
    """`count` of a small file that stock opened, in the least time: a tenth of stock's is 3 us."""
    global _small_files  # noqa: PLW0603 - of the process
    with shared:
        _small_files += 1
    return bool(_profiles or _listeners) or _log.isEnabledFor(logging.INFO)


def tell(report: LoadReport) -> None:
    """Hand a report that was counted to open profiles and listeners, and log it."""
    with shared:
        for open_profile in tuple(_profiles):
            open_profile.reports.append(report)
    for listener in _listeners:  # may write to a file: not under the lock
        listener(report)
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s", report)


def listen(listener: Callable[[LoadReport], None]) -> None:
    """Call ``listener`` with every report from now on, in the loading thread; it must not raise."""
    _listeners.append(listener)


@dataclasses.dataclass
class Account:
    """What one call or handle has moved so far; becomes its LoadReport.

    Calls run inside ``with account``: time that several threads spend at once counts once. A
    signal handler's call in the middle of an update leaves the counts right, but time may be lost.

    Attributes:
        take_traffic: of a remote file: what the report has from `requests` on, since it was last
            asked.
    """

    path: str = "mmap"
    bytes: int = 0
    tensors: int = 0
    resident: float | None = None
    reason: str | None = None
    seconds: float = 0.0
    reported: bool = False
    take_traffic: Callable[[], tuple[int, int, float, int, int]] | None = None
    _calls: int = 0
    _since: float = 0.0

    def __enter__(self) -> None:
        with shared:
            if not self._calls:
                self._since = time.perf_counter()
            self._calls += 1

    def __exit__(self, *exc_info: object) -> None:
        with shared:
            if self._calls == 1:  # first: a nested call then starts no second interval
                self.seconds += time.perf_counter() - self._since
            self._calls -= 1

    def emit(self, call: str, file: str, device: str, *, last: bool = True) -> None:
        """Publish the counts since the last report.

        Args:
            call: as of `LoadReport`.
            file: as of `LoadReport`.
            device: as of `LoadReport`.
            last: nothing more will be counted. Then a load of no tensors is reported, too, once.
        """
        with shared:
            if not self.tensors and (self.reported or not last):
                return
            counts = self.bytes, self.tensors, self.seconds
            self.bytes = self.tensors = 0
            self.seconds = 0.0
            self.reported = True
        traffic = () if self.take_traffic is None else self.take_traffic()
        if count(self.path, *counts, self.reason):
            tell(
                LoadReport(
                    call, file, device, self.path, *counts, self.resident, self.reason, *traffic
                )
            )


_unfinished: list[Callable[[], None]] = []


def before_the_end(tell: Callable[[], None]) -> None:
    """Register a function that reports loads that are still open when a program or cell ends."""
    _unfinished.append(tell)


def tell_unfinished() -> None:
    """Call the functions registered by `before_the_end`."""
    for tell in _unfinished:
        tell()


def totals() -> dict[str, Any]:
    """Totals since the start of the process.

    Returns:
        ``{"paths": {path: {"loads", "bytes", "tensors", "seconds"}},
        "fallbacks": {reason: count}}``. Small files that stock opened have no seconds.
    """
    with shared:
        paths = {path: dataclasses.asdict(of_path) for path, of_path in tuple(_paths.items())}
        fallbacks = dict(_fallbacks)
        if _small_files:
            stock = paths.setdefault("stock", dataclasses.asdict(_Totals()))
            stock["loads"] += _small_files
            fallbacks[SMALL_FILE] = fallbacks.get(SMALL_FILE, 0) + _small_files
        return {"paths": paths, "fallbacks": fallbacks}


@contextlib.contextmanager
def profile() -> Iterator[Profile]:
    """Collect the reports of every load that finishes inside the ``with`` block, any thread."""
    collected = Profile()
    with shared:
        _profiles.append(collected)
    try:
        yield collected
    finally:
        with shared:
            _profiles.remove(collected)
