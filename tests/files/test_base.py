"""Opening a file, placing tensors that exist, and the progress bar."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from reported import reported

import fastst_patch
from fastst_patch import engine, tensors
from fastst_patch.errors import Fallback
from fastst_patch.files.base import open_checked, places_in_arena
from fastst_patch.files.cpu import HostFile


def test_progress_shows_a_bar(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for io in ("auto", "direct"):
        reported(checkpoint, io=io, progress=True)
        assert "model.safetensors" in capfd.readouterr().err


class _StruckLock:
    """tqdm's lock, in the middle of whose taking Ctrl-C strikes at the n-th time."""

    def __init__(self, strike_at: int) -> None:
        self.strike_at, self.taken, self.held = strike_at, 0, 0

    def acquire(self, *_: Any) -> None:
        self.taken += 1
        self.held += 1
        if self.taken == self.strike_at:
            signal.raise_signal(signal.SIGINT)

    def release(self) -> None:
        self.held -= 1

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


@pytest.mark.parametrize("io", ["auto", "buffered"])
@pytest.mark.parametrize("strike_at", range(1, 7))
def test_ctrl_c_leaves_tqdm_usable(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, io: str, strike_at: int
) -> None:
    """A lock of tqdm's that stays taken would hang the program's next bar."""
    import tqdm

    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # its thread would take the lock, too
    monkeypatch.setattr(tqdm.tqdm, "_lock", lock := _StruckLock(strike_at), raising=False)
    try:
        reported(checkpoint, io=io, progress=True)
    except KeyboardInterrupt:
        pass
    else:
        assert lock.taken < strike_at
    assert lock.held == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if strike_at == 1:
        assert lock.taken > 1  # the bar was closed


# ---- opening, and placing tensors that exist ----


def test_a_dtype_that_stock_lacks_is_left_to_it(
    sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, layout = open_checked(sample)
    assert (file.path, set(layout.names)) == (sample, {"w", "b", "h"})
    monkeypatch.setattr(tensors, "known_to_stock", lambda dtypes: False)
    with pytest.raises(Fallback, match="lacks a dtype"):
        open_checked(sample)


def test_one_arena_over_tensors_that_exist(sample: str) -> None:
    file, layout = open_checked(sample)
    made = [torch.zeros(layout.nbytes(i), dtype=torch.uint8) for i in range(3)]
    places = [(layout.extent(i)[0], layout.nbytes(i), made[i]) for i in range(3)]
    arena, segments = places_in_arena([*places, (layout.extent(2)[1], 0, torch.zeros(0))])
    assert segments.tolist()[::3] == [layout.extent(i)[0] for i in range(3)]
    assert segments.tolist()[1::3] == [layout.nbytes(i) for i in range(3)]
    options = {"threads": 1, "chunk_bytes": 1 << 16, "mode": "buffered", "drop_cache": False}
    engine.read(file, arena, segments, **options).wait()
    data = Path(sample).read_bytes()
    for i in range(3):
        assert bytes(made[i].numpy()) == data[slice(*layout.extent(i))]


@pytest.mark.parametrize(("kind", "owned"), [("auto", False), ("dlpack", False), ("owned", True)])
def test_who_owns_tensors_on_the_cpu(sample: str, kind: str, owned: bool) -> None:
    with fastst_patch.config_context(tensors=kind) as config:
        assert HostFile(*open_checked(sample), config).owned is owned
