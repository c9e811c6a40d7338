"""Values of options: what is kept of text or an object, or an error that says what is allowed."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .errors import OptionError

__all__ = ["NO_LIMIT", "boolean", "bytes_or_default", "choice", "mapping", "size", "text_or_none"]

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
NO_LIMIT = 1 << 62

_SIZE_SUFFIXES = {
    "": 1, "b": 1, "k": KIB, "kb": 1000, "kib": KIB, "m": MIB, "mb": 1000**2, "mib": MIB,
    "g": GIB, "gb": 1000**3, "gib": GIB,
}  # fmt: skip
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off", "")


def choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """One of some words, in lower case."""
    if isinstance(value, str) and value.lower() in allowed:
        return value.lower()
    raise OptionError(f"option {name}={value!r}: allowed are {', '.join(allowed)}")


def boolean(name: str, value: object) -> bool:
    """True, False, 1, 0, or a word for them."""
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    raise OptionError(f"option {name}={value!r}: allowed are True and False (or 1 and 0)")


def size(name: str, value: object, low: int, high: int) -> int:
    """A whole number within bounds; text may have a suffix, such as ``4MiB``."""
    number: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str):
        text = value.strip().lower().replace("_", "")
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
        factor = _SIZE_SUFFIXES.get(text[len(digits) :].strip())
        if digits.isdecimal() and factor is not None:
            number = int(digits) * factor
    if number is None or not low <= number <= high:
        # Bounds of counts are shown as they are, bounds of sizes in KiB or MiB.
        bounds = f"whole numbers from {low} to {high}"
        if high >= KIB:
            bounds = f"sizes in bytes, or such as 4MiB (KiB, MiB, GiB), from {_readable(low)}"
            bounds += f" to {_readable(high)}" if high < NO_LIMIT else " on"
        raise OptionError(f"option {name}={value!r}: allowed are {bounds}")
    return number


def _readable(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB" if nbytes else "0"


def bytes_or_default(name: str, value: object) -> int | None:
    """A size, or None for the default."""
    return None if value is None or value == "" else size(name, value, 0, NO_LIMIT)


def text_or_none(name: str, value: object) -> str | None:
    """Any text; None where it is empty."""
    if value is None or isinstance(value, str):
        return value or None
    raise OptionError(f"option {name}={value!r}: allowed is any text")


def mapping(name: str, value: object) -> dict[str, object] | None:
    """A mapping of text to values. Errors do not show it: it may hold keys and passwords."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise OptionError(
            f"option {name}: allowed are mappings of names to values, and a JSON object as text"
        )
    return dict(value) or None
