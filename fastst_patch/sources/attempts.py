"""Requests of one source, repeated until they succeed, fail for good, or are cancelled."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from .base import RemoteCancelledError, RemoteError, SourceStats
from .retry import Failure, Flight, Limits
from .transport import Place

__all__ = ["Attempts", "Progress"]

_T = TypeVar("_T")

_SLICE = 0.1
"""Seconds of sleep at a time. An event would wake at once, but may be left locked by a fork."""

_WORTH = 1 << 20
"""Bytes that a try has to bring for the count of tries to begin again."""


class Progress:
    """How far one read is, over all its tries.

    Attributes:
        done: bytes that have arrived and stay.
        arrived: all bytes that have arrived.
    """

    __slots__ = ("_begun", "_limits", "arrived", "done")

    def __init__(self, limits: Limits) -> None:
        self.done = 0
        self.arrived = 0
        self._limits = limits
        self._begun = time.monotonic()

    @property
    def limits(self) -> Limits:
        """The limits, with no wait beyond the deadline."""
        return self._limits.within(self.left)

    @property
    def left(self) -> float:
        """Seconds until the deadline, as of now."""
        return self._limits.ends(self._begun, self.done) - time.monotonic()

    def restart(self) -> None:
        """Begin the clock anew: the time before was spent on bytes of other reads."""
        earned = self._limits.ends(0.0, self.done) - self._limits.deadline
        self._begun = time.monotonic() - earned

    def add(self, count: int) -> None:
        """Note bytes that have arrived.

        Raises:
            Failure: the deadline is over, since they come too slowly.
        """
        self.done += count
        self.arrived += count
        self.check()

    def check(self) -> None:
        """Raise when the deadline is over though bytes come.

        Raises:
            Failure: they come too slowly.
        """
        if self.left < 0:
            seconds = time.monotonic() - self._begun
            raise Failure(
                f"too slow: {self.done} bytes in {seconds:.1f} s",
                remedy="check the network, or raise the deadline",
            )


class Attempts:
    """Repeats the requests of one source.

    Args:
        place: for errors.
        limits: how long and how often.

    Attributes:
        cancelled: no request is sent any more.
    """

    def __init__(self, place: Place, limits: Limits) -> None:
        self._place = place
        self._limits = limits
        self._all_flights: set[Flight] = set()  # its operations are single ones: no lock
        self._pid = os.getpid()
        self._resume = 0.0  # no request before this time (`time.monotonic`)
        self._asked: Failure | None = None  # the answer that asked for it
        # What single requests did: an append needs no lock, which `+=` from several threads would.
        self._tried: list[tuple[bool, int]] = []  # whether it was a repeated one, bytes
        self._waited: list[float] = []
        self.cancelled = False

    @property
    def stats(self) -> SourceStats:
        """What was done so far."""
        tried = list(self._tried)
        return SourceStats(
            requests=len(tried),
            retries=sum(again for again, _ in tried),
            waited=sum(list(self._waited)),
            bytes=sum(arrived for _, arrived in tried),
        )

    @property
    def _flights(self) -> set[Flight]:
        if self._pid != os.getpid():  # the threads of the others are in the parent
            self._all_flights, self._pid = set(), os.getpid()
        return self._all_flights

    @property
    def busy(self) -> bool:
        """Whether a request is on its way."""
        return bool(self._flights)

    def cancel(self) -> None:
        """End all requests, and send no more."""
        self.cancelled = True
        for flight in list(self._flights):
            flight.abort()

    def run(self, offset: int, act: Callable[[Flight, Progress], _T]) -> _T:
        """Send requests for one read until one succeeds.

        Args:
            offset: of the read, for errors.
            act: sends one request for what is not done yet, and notes what it brings.

        Raises:
            RemoteError: all failed, or the source is cancelled.
        """
        progress = Progress(self._limits)
        tries = 0
        while True:
            failure = self._hold(progress)
            if failure is None and not self.cancelled:
                tries += 1
                before = progress.arrived
                flight = Flight()
                self._flights.add(flight)
                try:
                    if not self.cancelled:  # or it may have missed this flight
                        return act(flight, progress)
                except Failure as error:
                    failure = error
                finally:
                    self._flights.discard(flight)
                    self._tried.append((tries > 1, progress.arrived - before))
                if progress.arrived - before >= _WORTH:
                    tries = 1
            if self.cancelled:
                break
            assert failure is not None
            if not failure.retry or tries >= self._limits.max_tries:
                break
            if not self._wait(failure, tries, progress):
                break
        # Outside of `except`, so that nothing of the library's exceptions hangs on this one.
        raise self._error(failure, offset + progress.done, max(tries, 1))

    # ---- waiting --------------------------------------------------------

    def _hold(self, progress: Progress) -> Failure | None:
        """Wait as long as the server asked any of the reads to wait."""
        left = self._resume - time.monotonic()
        if left > 0:
            if left > progress.left:
                return Failure(
                    f"the server asks to wait for {left:.0f} s", remedy="raise the deadline",
                    status=self._asked.status if self._asked else None,
                )  # fmt: skip
            self._sleep(left * random.uniform(1.0, 1.1))  # not all at once
        return None

    def _wait(self, failure: Failure, tries: int, progress: Progress) -> bool:
        """Wait before the next try; False when there is no time for one."""
        delay = self._limits.delay(tries, failure.wait)
        if failure.wait is not None:
            self._asked = failure
            self._resume = max(self._resume, time.monotonic() + failure.wait)
        if delay > progress.left:
            if failure.wait is not None:
                failure.reason += f", and asks to wait for {failure.wait:.0f} s"
            return False
        self._sleep(delay)
        return True

    def _sleep(self, seconds: float) -> None:
        until = begun = time.monotonic()
        until += seconds
        while not self.cancelled:
            left = until - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(left, _SLICE))
        self._waited.append(time.monotonic() - begun)

    def _error(self, failure: Failure | None, offset: int, tries: int) -> RemoteError:
        place = self._place
        if self.cancelled or failure is None:
            return RemoteCancelledError(
                place.host, place.path, "the read was cancelled", offset=offset, tries=tries
            )
        return failure.error(place.host, place.path, offset=offset, tries=tries)
