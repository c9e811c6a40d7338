"""When a request is repeated, when it is given up, and how reads in flight are ended."""

from __future__ import annotations

import dataclasses
import email.utils
import random
import time
from collections.abc import Callable
from typing import Any

from ..errors import OptionError
from .base import RemoteChangedError, RemoteError, RemoteNotFoundError, RemotePermissionError

__all__ = ["LIMITS", "Failure", "Flight", "Limits", "limits_of", "of_status", "retry_after"]

_LONGEST_WAIT = 10.0  # seconds between tries

_SLOWEST = 8192
"""Bytes a second that prolong a deadline: who brings less is given up as if it brought nothing."""


class Failure(Exception):  # noqa: N818 - internal; `RangedSource` makes a `RemoteError` of it
    """Why a request failed. Its text holds no secret, and it never leaves this package.

    Attributes:
        reason: in words.
        status: of the answer, or None.
        retry: whether the same request may succeed later.
        wait: seconds the server asked to wait, or None.
        remedy: what the user can do.
        kind: the exception that the user gets.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int | None = None,
        retry: bool = False,
        wait: float | None = None,
        remedy: str = "",
        kind: type[RemoteError] = RemoteError,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.retry = retry
        self.wait = wait
        self.remedy = remedy
        self.kind = kind

    def error(
        self, host: str, path: str, *, offset: int | None = None, tries: int = 1
    ) -> RemoteError:
        """What the user gets: see `RemoteError`."""
        return self.kind(
            host, path, self.reason, offset=offset, status=self.status, tries=tries,
            remedy=self.remedy,
        )  # fmt: skip


_ABSENT = ("no such file", RemoteNotFoundError, "check the URL")
_STATUSES: dict[int, tuple[str, type[RemoteError], str]] = {
    401: ("access denied", RemotePermissionError, "give credentials for it, or check them"),
    403: (
        "access denied",
        RemotePermissionError,
        "check that the credentials may read it, and that a signed URL has not expired",
    ),
    404: _ABSENT,
    410: _ABSENT,
    412: ("the file changed while it was read", RemoteChangedError, "load it again"),
    416: (
        "the server has no such bytes",
        RemoteError,
        "the file may have become shorter: load it again",
    ),
    429: (
        "too many requests",
        RemoteError,
        "load fewer files at once, or raise max_tries and deadline",
    ),
}
_LATER = (408, 425, 429)  # of 4xx: the same request may succeed later
_NEVER = (501, 505)  # of 5xx: it will not


def of_status(status: int, wait: float | None = None) -> Failure:
    """What an answer means that is neither the file nor a redirect.

    Args:
        status: of the answer.
        wait: seconds that it asked to wait, or None.
    """
    failed = status >= 500
    reason, kind, remedy = _STATUSES.get(
        status,
        ("the server failed", RemoteError, "try later, or raise max_tries and deadline")
        if failed
        else ("the server refused the request", RemoteError, "check the URL"),
    )
    again = status in _LATER or (failed and status not in _NEVER)
    return Failure(
        reason, status=status, retry=again, wait=wait if again else None, remedy=remedy, kind=kind
    )


def retry_after(text: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait; None for none or an illegible one."""
    if text is None:
        return None
    text = text.strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        until = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, until - time.time())


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long and how often a read is tried.

    Attributes:
        max_tries: requests for the same bytes.
        deadline: seconds for a read from its start until it fails. Bytes that arrive prolong it,
            by a second for each 8 KiB, so that a slow link is no error.
        stall: seconds without a byte after which a request is given up and sent again.
        backoff: seconds between the first two tries; each further pause is twice as long.
        connect: seconds for a connection to one address.
    """

    max_tries: int = 8
    deadline: float = 60.0
    stall: float = 20.0
    backoff: float = 0.2
    connect: float = 5.0

    def within(self, seconds: float) -> Limits:
        """The same with no wait of a request longer than some seconds."""
        left = max(seconds, 0.05)
        if left >= self.stall and left >= self.connect:
            return self
        return dataclasses.replace(
            self, stall=min(self.stall, left), connect=min(self.connect, left)
        )

    def ends(self, begun: float, arrived: int) -> float:
        """The time (`time.monotonic`) by which a read has to be done, as of now."""
        return begun + self.deadline + arrived / _SLOWEST

    def delay(self, tries: int, asked: float | None) -> float:
        """Seconds until the next try, with jitter: many readers must not come back at once.

        Args:
            tries: so far.
            asked: what the server asked to wait at least.
        """
        wait = min(_LONGEST_WAIT, self.backoff * 2.0 ** min(tries - 1, 10))
        wait *= random.uniform(0.5, 1.0)
        return wait if asked is None else asked + wait * 0.1


LIMITS = ("max_tries", "deadline", "stall", "backoff")
"""Options of ours."""


def limits_of(options: dict[str, object]) -> Limits:
    """Take our own options out of a mapping.

    Raises:
        OptionError: one of them has a bad value.
    """
    found: dict[str, Any] = {}
    for name in LIMITS:
        if name in options:
            found[name] = _positive(name, options.pop(name), whole=name == "max_tries")
    return Limits(**found)


def _positive(name: str, value: object, whole: bool) -> float:
    allowed = "a whole number from 1 on" if whole else "seconds above 0"
    try:
        number = float(value)  # type: ignore[arg-type] # anything else is refused below
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < 1e9 or isinstance(value, bool) or (whole and number != int(number)):
        raise OptionError(f"option {name}={value!r} of storage_options: allowed is {allowed}")
    return int(number) if whole else number


class Flight:
    """A read in progress, which another thread can end.

    It needs no lock: `aborted` is set before the hook is looked at, and a hook is set before
    `aborted` is looked at, so one of the two threads calls it.
    """

    __slots__ = ("_hook", "aborted")

    def __init__(self) -> None:
        self.aborted = False
        self._hook: Callable[[], object] | None = None

    def on_abort(self, hook: Callable[[], object] | None) -> None:
        """Set what ends the blocking call that follows; None when it is over."""
        self._hook = hook
        if self.aborted and hook is not None:
            hook()

    def abort(self) -> None:
        """End the read, from any thread."""
        self.aborted = True
        hook = self._hook
        if hook is not None:
            hook()
