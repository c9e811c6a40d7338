"""The ways to fill parameters on a device that docs/devices.md shows."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from places import ROOT
from safetensors.torch import save_model

import fastst_patch

PAGE = ROOT / "docs" / "devices.md"
HEADING = "## Copying weights into parameters"


class Model(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(40, 300), torch.nn.BatchNorm1d(300))


def _programs() -> list[str]:
    if not PAGE.exists():
        pytest.skip("no documentation beside these tests")
    section = PAGE.read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def source() -> Model:
    torch.manual_seed(3)
    model = Model()
    model[1].running_mean.normal_()
    return model


@pytest.fixture
def names(tmp_path, source, fast) -> dict[str, Any]:
    """What the programs take for granted, on a device that the fake stands for."""
    path = str(tmp_path / "model.safetensors")
    save_model(source, path)
    return {"torch": torch, "Model": Model, "path": path,
            "load_file": fast.load_file, "safe_open": fast.safe_open}  # fmt: skip


def test_all_are_run_here() -> None:
    assert len(_programs()) == 2


@pytest.mark.parametrize(("program", "call"), [(0, "load_file"), (1, "safe_open")])
def test_the_model_has_the_weights(cuda, names, source, program, call) -> None:
    scope = names | {"model": Model().double()}  # the first program makes one of its own
    with fastst_patch.config_context(fallback="error"), fastst_patch.profile() as profile:
        exec(_programs()[program], scope)
    found = scope["model"].state_dict()
    assert (found["0.weight"].dtype is torch.float64) == (call == "safe_open")
    for name, expected in source.state_dict().items():
        assert torch.equal(found[name], expected.to(found[name].dtype))
    assert [(r.call, r.device, r.path) for r in profile.reports] == [(call, "cuda:0", "ring")]
    read_back = cuda.driver.calls("cuMemcpyDtoHAsync_v2")
    assert cuda.driver.lib.fake_pageable_copies() == read_back <= 2
