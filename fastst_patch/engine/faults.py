"""Fault injection into the engine's own system calls, for tests."""

from __future__ import annotations

from ._lib import lib


def set_fault(
    call: str, *, first: int = 1, count: int = 1 << 62, errno: int = 0, short_bytes: int = 0
) -> None:
    """Make system calls number first.. of a kind fail, or be cut short (see native/fst.h)."""
    if lib.fst_fault_set(call.encode(), first, count, errno, short_bytes):
        raise ValueError(f"no injectable system call {call!r}")


def fault_calls(call: str) -> int:
    """Calls of a kind since faults were last cleared."""
    return int(lib.fst_fault_calls(call.encode()))


def clear_faults() -> None:
    """End all faults."""
    lib.fst_fault_clear()
