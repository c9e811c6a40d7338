"""A key of this user, by which what was made here is told from what others made.

It is 32 random bytes in `cache_home`, which others cannot read. It protects against files, not
against programs: those of this user can read it.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets

from ..config import cache_home

__all__ = ["is_sealed", "key_path", "sealed"]

_BYTES = 32


def key_path() -> str:
    """Where the key is."""
    return os.path.join(cache_home(), "key")


def sealed(text: str) -> str:
    """The seal of a text. The first one makes the key.

    Raises:
        OSError: there is no key, and none can be written.
    """
    key = _read()
    if key is None:
        try:
            key = _made()
        except OSError as error:
            raise OSError(
                error.errno,
                "the key of your stand-ins cannot be written: set XDG_CACHE_HOME to a folder of"
                f" yours, the same for all processes ({error.strerror})",
                key_path(),
            ) from None
    return _seal(key, text)


def is_sealed(text: str, seal: object) -> bool:
    """Whether a text has its seal, by this user's key; False where there is no key."""
    key = _read()
    if key is None or not isinstance(seal, str) or not seal.isascii():
        return False
    return hmac.compare_digest(_seal(key, text), seal)


def _read() -> bytes | None:
    """The key; None where there is none, or only a part of one."""
    try:
        with open(key_path(), "rb") as file:
            key = file.read(_BYTES)
    except OSError:
        return None
    return key if len(key) == _BYTES else None


def _made() -> bytes:
    os.makedirs(cache_home(), mode=0o700, exist_ok=True)
    fd = os.open(key_path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # another process may be making it
        key = os.pread(fd, _BYTES, 0)
        if len(key) != _BYTES:
            key = secrets.token_bytes(_BYTES)
            os.pwrite(fd, key, 0)
            os.fsync(fd)
    finally:
        os.close(fd)
    return key


def _seal(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
