"""An exception under the patch shows what it shows without, and one frame of ours."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

import fastst_patch
from fastst_patch import engine
from fastst_patch.dropin import handle

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)
OURS = str(Path(fastst_patch.__file__).parent)


def frames(call: Any) -> tuple[BaseException, list[str], list[str]]:
    """What a call raises, the frames of ours in it, and those of others."""
    with pytest.raises(Exception) as caught:
        call()
    found = traceback.extract_tb(caught.value.__traceback__)
    ours = [frame.name for frame in found if frame.filename.startswith(OURS)]
    others = [frame.name for frame in found if not frame.filename.startswith(OURS)]
    return caught.value, ours, others


def calls(folder: Path) -> dict[str, Any]:
    good, bad = str(folder / "good.safetensors"), str(folder / "bad.safetensors")
    safetensors.torch.save_file({"weight": torch.zeros(3, 3)}, good)
    Path(bad).write_bytes(b"nonsense")
    model = torch.nn.Linear(2, 2)

    def absent_tensor() -> None:
        with safetensors.safe_open(good, "pt") as file:
            file.get_tensor("absent")

    def absent_slice() -> None:
        with safetensors.safe_open(good, "pt") as file:
            file.get_slice("absent")

    def absent_row() -> None:
        with safetensors.safe_open(good, "pt") as file:
            _ = file.get_slice("weight")[5, 1]

    def absent_column() -> None:
        with safetensors.safe_open(good, "pt") as file:
            _ = file.get_slice("weight")[0:2, 9]

    return {
        "load_file": lambda: safetensors.torch.load_file(bad),
        "load_file, absent": lambda: safetensors.torch.load_file(bad + "!"),
        "load_file, arguments": lambda: safetensors.torch.load_file(device="cpu"),
        "safe_open": lambda: safetensors.safe_open(bad, "pt"),
        "safe_open, framework": lambda: safetensors.safe_open(good, "nothing"),
        "load_model": lambda: safetensors.torch.load_model(model, good),
        "load_model, bad": lambda: safetensors.torch.load_model(model, bad),
        "get_tensor": absent_tensor,
        "get_slice": absent_slice,
        "slice, row": absent_row,
        "slice, column": absent_column,
    }


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_at_most_two_frames_are_ours(tmp_path: Path, io: str) -> None:
    for name, call in calls(tmp_path).items():
        stocks, none, expected = frames(call)
        with fastst_patch.patched(io=io):
            error, ours, others = frames(call)
        assert none == []
        assert len(ours) <= 2, (name, ours)
        assert others == expected, name
        assert (type(error), str(error)) == (type(stocks), str(stocks))
        assert error.__context__ is None, name


def test_a_bug_of_ours_keeps_all_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "open_fast", None)
    with fastst_patch.patched():
        error, ours, _ = frames(lambda: safetensors.torch.load_file(str(tmp_path)))
    assert isinstance(error, TypeError)
    assert len(ours) >= 3


def test_frames_of_the_program_stay(tmp_path: Path) -> None:
    class Path_(type(tmp_path)):
        def __fspath__(self) -> str:
            return self.own()

        def own(self) -> str:
            raise RuntimeError("mine")

    with fastst_patch.patched():
        error, _, others = frames(lambda: safetensors.torch.load_file(Path_(tmp_path)))
    assert isinstance(error, RuntimeError)
    assert "own" in others
