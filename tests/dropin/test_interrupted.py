"""An exception out of nowhere, as a signal's handler raises it, anywhere within ours."""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)
OURS = os.path.dirname(fastst_patch.__file__) + os.sep


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest takes for its own."""


class InterruptAt:
    """Raises where Python may run a signal's handler, for the n-th time in a ``with`` block.

    As a function of ours begins, and after a call of C code has returned.
    """

    def __init__(self, number: int) -> None:
        self._left = number
        self.raised = False

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.raised or event not in ("call", "c_return"):
            return
        if frame.f_code.co_filename.startswith(OURS):
            self._left -= 1
            if self._left < 0:
                self.raised = True
                raise Interrupt

    def __enter__(self) -> InterruptAt:
        self._before = sys.getprofile()
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(self._before)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.arange(100.0) + i for i in range(3)}, path)
    return str(path)


def _read(path: str) -> None:
    with fastst_patch.safe_open(path, "pt") as handle:
        handle.get_tensor("t1")
        handle.get_slice("t2")[3:7]


def _prefetch(path: str) -> None:
    with fastst_patch.safe_open(path, "pt") as handle:
        with handle.prefetch({"t0": None, "t1": slice(3, 7), "t2": None}) as loader:
            loader.take("t2")
            for _ in loader:
                break
        handle.prefetch()


CALLS: dict[str, Callable[[str], Any]] = {
    "load_file": fastst_patch.load_file,
    "safe_open": _read,
    "prefetch": _prefetch,
}


@pytest.fixture(params=["auto", "buffered", "direct"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastst_patch.config_context(io=request.param):
        yield request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_left_behind(model: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What strikes in a __del__ can only be reported; pytest would keep what it was about.
    monkeypatch.setattr(sys, "unraisablehook", lambda report: None)
    CALLS[call](model)  # what is made once in a process is made
    for number in itertools.count():
        at = InterruptAt(number)
        try:
            with at:
                CALLS[call](model)
        except Interrupt:
            pass
        if not at.raised:
            break
    assert number > 30  # places
    gc.collect()
    engine.shutdown()
    counters = engine.counters()
    assert {name: counters[name] for name in ("files", "arenas", "jobs")} == {
        "files": 0, "arenas": 0, "jobs": 0,
    }  # fmt: skip


def test_a_handle_that_is_not_finished_says_so(model: str) -> None:
    handle = fastst_patch.safe_open(model, "pt")
    for one in (handle, handle.get_slice("t1")):
        unfinished = object.__new__(type(one))
        with pytest.raises(AttributeError):
            _ = unfinished._opened
        del unfinished  # and goes without a word
