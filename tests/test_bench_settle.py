"""Memory that is kept from the host between measurements."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fastst_patch.bench import machine, settle

MIB = 1 << 20


def _status(field: str) -> int:
    """Bytes, by the kernel."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))


def test_memory_was_there_and_is_free_again() -> None:
    before = _status("VmRSS")
    held = settle._touched(settle._allowed(64 * MIB))
    assert _status("VmRSS") - before >= 64 * MIB + settle.SLACK - 16 * MIB
    held.close()
    settle.memory(64 * MIB)
    assert _status("VmRSS") - before < 32 * MIB
    assert _status("VmHWM") - before < 32 * MIB, "what was touched counts as the peak"


def test_reserve_is_taken_and_freed_in_turns() -> None:
    before, threads = _status("VmRSS"), threading.active_count()
    with settle.Reserve(64 * MIB) as reserve:
        for _ in range(3):
            reserve.take()  # twice is once
            settle.forget_peak()
            reserve.free()
            assert _status("VmHWM") - before >= 64 * MIB + settle.SLACK - 16 * MIB
            assert _status("VmRSS") - before < 32 * MIB
            reserve.free()
            reserve.take()
    assert _status("VmRSS") - before < 32 * MIB
    assert threading.active_count() == threads


@pytest.mark.parametrize("available", [0, 40 * MIB, 600 * MIB])
def test_never_more_than_half_of_what_is_available(monkeypatch, available) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: available)
    assert settle._allowed(10**12) == max(
        available // 2 // settle.BLOCK * settle.BLOCK, settle.BLOCK
    )


def test_no_room_is_no_reason_to_fail(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(settle.mmap, "mmap", refuse)
    settle.memory(64 * MIB)
    with settle.Reserve(64 * MIB) as reserve:
        reserve.free()
        reserve.take()
