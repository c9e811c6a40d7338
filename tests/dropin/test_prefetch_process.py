"""``handle.prefetch()`` and its process: reports at the end, other threads, a forked child."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from numbered import file_of_numbers, right
from waiting import in_threads

import fastst_patch

SIZE = 100_000


@pytest.fixture
def numbered(raw: Any) -> str:
    """Forty tensors of 100,000 bytes; tensor i is full of i."""
    return file_of_numbers(raw, 40, 100, 1000)


def test_a_loader_that_is_open_at_the_end_is_reported(fast, numbered, watch) -> None:
    from fastst_patch.dropin.handle import report_open_handles

    loader = fast.safe_open(numbered, "pt").prefetch()
    with watch() as seen:
        loader.take("t01")
        report_open_handles()
        loader.take("t02")
        loader.close()
    found = [(report.tensors, report.bytes) for report in seen.reports if report.call == "prefetch"]
    assert found == [(1, SIZE), (1, SIZE)]


def test_a_loader_that_is_opened_while_reports_are_made(fast, numbered) -> None:
    """By another thread, at any line of what goes through the loaders that are open."""
    from fastst_patch import report

    handle = fast.safe_open(numbered, "pt")
    loaders = [handle.prefetch({"t00": None}) for _ in range(3)]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if "weakref" in frame.f_code.co_filename and len(loaders) < 50:
            sys.settrace(None)
            in_threads(lambda: loaders.append(handle.prefetch({"t00": None})), 1)
            sys.settrace(trace)
        return trace

    sys.settrace(trace)
    try:
        report.tell_unfinished()
    finally:
        sys.settrace(None)
    assert len(loaders) > 3


def test_a_forked_child_reads_for_itself(fast, numbered) -> None:
    with fastst_patch.config_context(io="buffered", device_memory_budget=900_000):
        loader = fast.safe_open(numbered, "pt").prefetch()
    loader.take("t00")
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if all(right(name, tensor) for name, tensor in loader) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert all(right(name, tensor) for name, tensor in loader)
