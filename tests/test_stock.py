"""Asking the installed safetensors, and tracebacks without our frames."""

from __future__ import annotations

import os
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import wrapt

import fastst_patch
from fastst_patch import stock as module
from fastst_patch import stock_objects

HEADER = b'{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'


def test_originals_are_found_under_the_patch(stock) -> None:
    before = safetensors.torch.load_file
    with fastst_patch.patched():
        assert module.unwrapped(safetensors.torch.load_file) is before
        assert module.unwrapped(safetensors.safe_open) is stock.safe_open
    twice = wrapt.FunctionWrapper(wrapt.FunctionWrapper(len, lambda *_: None), lambda *_: None)
    assert module.unwrapped(twice) is len
    assert module.original("torch.nn", "Module.to") is torch.nn.Module.to
    with pytest.raises(AttributeError):
        module.original("safetensors.torch", "absent")
    with pytest.raises(ImportError):
        module.original("safetensors.absent", "load_file")


def test_questions_leave_no_file_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert module.opens(b"{}      ")
    assert not module.opens(HEADER)  # no bytes behind it
    assert module.loads(HEADER, 2)
    assert not module.loads(HEADER, 1)
    assert not module.loads(HEADER.replace(b'"x"', b'"y"'), 2)
    assert len(os.listdir("/proc/self/fd")) == before


def test_large_questions_take_no_memory() -> None:
    many = 64 << 30
    header = f'{{"x":{{"dtype":"U8","shape":[{many}],"data_offsets":[0,{many}]}}}}'.encode()
    with module.small_file(header, many) as file:
        found = os.stat(file.name)
        assert found.st_size == 8 + len(header) + many
        assert found.st_blocks * 512 <= 1 << 20
        assert os.pread(file.fileno(), len(header), 8) == header


def test_slices_have_stocks_class(sample, stock) -> None:
    assert type(stock.safe_open(sample, "pt").get_slice("w")) is module.slice_class()


def test_load_model_runs_stocks_code_over_another_load_file(sample) -> None:
    model = torch.nn.Module()
    model.register_buffer("w", torch.zeros(2))
    files: list[Any] = []

    def load_file(path: Any, **_: Any) -> dict[str, torch.Tensor]:
        files.append(path)
        return {"w": torch.ones(2)}

    assert not any(module.load_model(load_file, model, sample))
    assert files == [sample]
    assert model.w.tolist() == [1.0, 1.0]


def test_frames_of_ours_go_from_stocks_exceptions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_objects, "_PACKAGE", os.path.dirname(__file__) + os.sep)

    def ours(fails: Any) -> None:
        module.call(fails, (), {})

    def bug() -> None:
        raise RuntimeError("here")

    for fails, last in ((lambda: int("x"), "<lambda>"), (bug, "bug")):
        try:
            ours(fails)
        except Exception as error:
            trace = module.trimmed(error).__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        assert trace.tb_frame.f_code.co_name == last
