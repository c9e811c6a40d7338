"""Memory that is kept from the host, and lent to what is timed."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from fastst_patch.bench import machine, settle

MIB = 1 << 20


def _status(field: str) -> int:
    """Bytes of this process, by the kernel."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))


def test_it_is_there_while_nothing_is_timed() -> None:
    before, threads = _status("VmRSS"), threading.active_count()
    wanted = 64 * MIB + settle.SLACK
    with settle.Reserve(64 * MIB) as reserve:
        for _ in range(3):
            reserve._await_taken()
            assert _status("VmRSS") - before >= wanted - settle.BLOCK
            with reserve.lend():
                assert _status("VmRSS") - before <= wanted - settle.AHEAD + 2 * settle.BLOCK
    assert _status("VmRSS") - before < settle.BLOCK
    assert threading.active_count() == threads


def test_it_is_freed_as_fast_as_it_is_used(monkeypatch) -> None:
    blocks, ahead = 32, settle.AHEAD // settle.BLOCK
    used = [0]
    with settle.Reserve(blocks * settle.BLOCK - settle.SLACK) as reserve:
        monkeypatch.setattr(
            settle, "_free", lambda: (blocks - len(reserve._held) - used[0]) * settle.BLOCK
        )
        with reserve.lend():
            for used[0], left in ((0, blocks - ahead), (5, blocks - ahead - 5), (blocks, 0)):
                for _ in range(2000):
                    if len(reserve._held) <= left:
                        break
                    time.sleep(settle.PERIOD_S)
                assert len(reserve._held) == left
        reserve._await_taken()
        assert len(reserve._held) == blocks


@pytest.mark.parametrize("available", [0, 40 * MIB, 200 * MIB])
def test_never_more_than_half_of_what_is_available(monkeypatch, available) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: available)
    with settle.Reserve(10**12) as reserve, reserve.lend():
        pass
    before = _status("VmRSS")
    with settle.Reserve(10**12) as reserve:
        reserve._await_taken()
        assert _status("VmRSS") - before <= available // 2 + 4 * MIB


def test_no_room_is_no_reason_to_fail(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(settle.mmap, "mmap", refuse)
    with settle.Reserve(64 * MIB) as reserve, reserve.lend():
        pass


def test_it_is_given_back_whatever_ends_the_block() -> None:
    before = _status("VmRSS")
    with pytest.raises(KeyboardInterrupt), settle.Reserve(64 * MIB) as reserve, reserve.lend():
        raise KeyboardInterrupt
    assert _status("VmRSS") - before < settle.BLOCK
