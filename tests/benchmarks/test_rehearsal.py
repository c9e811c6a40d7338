"""What stands in for a GPU where its scripts are rehearsed: it must not fail before they do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SUPPORT
from safetensors.torch import save_file

from fastst_patch import engine

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

PROGRAM = """
import sys
{first}
import safetensors.torch
import fastst_patch
with fastst_patch.patched(), fastst_patch.profile() as seen:
    loaded = safetensors.torch.load_file(sys.argv[1], device="cuda:0")
print([(report.path, report.fallback_reason) for report in seen.reports], loaded["a"].tolist())
"""


@pytest.mark.parametrize("first", ["", "import torch", "import fastst_patch.bench"])
def test_the_fake_driver_takes_part_in_every_process(
    tmp_path: Path, first: str, fake_driver: Any
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(3)}, path)
    folder = SUPPORT / "rehearsal"
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first), str(path)],
        env=os.environ | {"PYTHONPATH": str(folder), "REHEARSAL_DRIVER": fake_driver.path},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert told.stdout == "[('ring', None)] [0, 1, 2]\n", told.stderr
