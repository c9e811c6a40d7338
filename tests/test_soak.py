"""The soak: a short run, and what it would see."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from places import FUZZ

from fastst_patch import engine

LIMIT_S = 300
pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FUZZ)
    return importlib.import_module("soak")


def test_short_run(fake_driver: Any, tmp_path: Path, soak: Any) -> None:
    """Every operation runs beside the others, and nothing is wrong, held or still."""
    from _soak_operations import OPERATIONS

    command = [
        sys.executable, FUZZ / "soak.py", "--seconds", "2", "--warm-up", "0.5", "--threads", "4",
        "--processes", "2", "--seed", "1", "--dir", tmp_path, "--library", fake_driver.path,
    ]  # fmt: skip
    done = subprocess.run(
        [str(one) for one in command],
        capture_output=True, text=True, check=False, timeout=LIMIT_S, cwd=tmp_path,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("PASS: ")
    for name in (*OPERATIONS, "load_sharded"):
        assert f"\n{name} " in done.stdout
    assert os.listdir(tmp_path) == []


def test_wrong_bytes_are_seen(soak: Any) -> None:
    from _soak_files import Contents, WrongBytesError

    contents = Contents(1)
    right = {name: contents.expected(name).clone() for name in contents.pieces(7)}
    name = max(right, key=lambda one: right[one].numel())
    assert contents.check_all(right) == sum(one.nbytes for one in right.values())
    other_bit = right[name].clone()
    other_bit.view(torch.uint8).reshape(-1)[-1] ^= 1
    other_version = {f"8.{one.partition('.')[2]}": tensor for one, tensor in right.items()}
    for wrong in (
        right | {name: other_bit},
        right | {name: right[name][:-1]},
        right | {name: right[name].view(torch.int8)},
        right | {min(contents.pieces(8)): other_bit},
        other_version,
        {one: tensor for one, tensor in right.items() if one != name},
    ):
        with pytest.raises(WrongBytesError):
            contents.check_all(wrong)


def test_what_is_held_is_seen(soak: Any, tmp_path: Path) -> None:
    plan = soak.Plan(tmp_path, tmp_path, 1, 3600.0, 60.0, 64, 1, 0)
    held = {"engine: arenas": 0, "maps of files": 0, "descriptors": 16, soak.RSS: 200_000}
    result = {"failures": [], "violations": [], "before": held, "after": held}
    assert soak.judge([result], plan) == []
    for name, more in (
        ("engine: arenas", 1), ("maps of files", 1), ("descriptors", 1), (soak.RSS, 17 << 10),
    ):  # fmt: skip
        (wrong,) = soak.judge([result | {"after": held | {name: held[name] + more}}], plan)
        assert name in wrong
    # What was lost in the warm-up counts as well.
    lost = held | {"engine: arenas": 1}
    assert soak.judge([result | {"before": lost, "after": lost}], plan)


def test_a_thread_that_stands_still_is_seen(soak: Any) -> None:
    now = time.monotonic()
    beats = memoryview(bytearray(4 * 8)).cast("Q")
    beats[3] = soak.ENDED
    child = soak.Child(0, 0, beats, [0] * 4, [now - 10] * 4)
    beats[1] = 5
    assert child.stalled(1.0) == [2]
