"""Memory that is kept from the host, and lent to what is timed."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from fastst_patch.bench import hardware, settle

MIB = 1 << 20


def _status(field: str) -> int:
    """Bytes of this process, by the kernel."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))


def test_it_is_there_while_nothing_is_timed() -> None:
    before, threads = _status("VmRSS"), threading.active_count()
    wanted = sum(times * 64 * MIB + settle.SLACK for times in settle.KINDS.values())
    with settle.Reserve(64 * MIB) as reserve:
        ahead = len(settle.KINDS) * reserve._ahead
        for _ in range(3):
            reserve._await_taken()
            assert wanted <= reserve.held <= wanted + len(settle.KINDS) * settle.BLOCK
            assert _status("VmRSS") - before >= wanted - settle.BLOCK
            with reserve.lend():
                assert _status("VmRSS") - before <= wanted - ahead + 3 * settle.BLOCK
    assert _status("VmRSS") - before < settle.BLOCK
    assert threading.active_count() == threads


def test_of_each_kind_as_much_is_freed_as_is_used(monkeypatch) -> None:
    ahead, used = settle.AHEAD // settle.BLOCK, [0]
    with settle.Reserve(512 * MIB - settle.SLACK // min(settle.KINDS.values())) as reserve:
        reserve._await_taken()
        all_of_them = {kind: len(held) for kind, held in reserve._held.items()}
        total = reserve.held
        monkeypatch.setattr(settle, "_used", lambda: reserve.held + used[0] * settle.BLOCK)
        with reserve.lend():
            for used[0] in (0, 5, 100):
                left = {k: max(n - ahead - used[0], 0) for k, n in all_of_them.items()}
                for _ in range(2000):
                    if {kind: len(held) for kind, held in reserve._held.items()} == left:
                        break
                    time.sleep(settle.PERIOD_S)
                assert {kind: len(held) for kind, held in reserve._held.items()} == left
        reserve._await_taken()
        assert reserve.held == total


@pytest.mark.parametrize("available", [0, 40 * MIB, 200 * MIB])
def test_never_more_than_half_of_what_is_available(monkeypatch, available) -> None:
    monkeypatch.setattr(hardware, "memory_available", lambda: available)
    with settle.Reserve(10**12) as reserve:
        with reserve.lend():
            pass
        reserve._await_taken()
        assert reserve.held <= available  # which is told to be as much, with it taken


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


@pytest.mark.parametrize("advice", [settle.POPULATE_WRITE, 9999])
def test_what_is_held_is_there(monkeypatch: pytest.MonkeyPatch, advice: int) -> None:
    """Also where the kernel does not know how to touch many pages at once."""
    monkeypatch.setattr(settle, "POPULATE_WRITE", advice)

    before = _status("VmRSS")
    held = [settle._touched(kind) for kind in settle.KINDS]
    assert _status("VmRSS") - before >= len(held) * settle.BLOCK * 0.9


def test_one_kind_alone_is_lent() -> None:
    with settle.Reserve(64 * MIB) as reserve:
        reserve._await_taken()
        before = {kind: len(held) for kind, held in reserve._held.items()}
        with reserve.lend((settle.SMALL,)):
            assert len(reserve._held[settle.HUGE]) == before[settle.HUGE]
            assert len(reserve._held[settle.SMALL]) < before[settle.SMALL]
