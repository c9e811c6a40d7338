"""The fault matrix, thinned; ``python tests/support/fault_matrix.py`` is all of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_calls import allocation_sites, driver_calls, python_calls, system_calls
from fault_loads import KEEPING
from places import SUPPORT

from fastst_patch import engine
from fastst_patch.bench import hardware
from fastst_patch.sharding import shared_buffer

pytestmark = [
    pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error())),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="what is left to stock would go to this machine's GPU"
    ),
]

_UNDO = "is called after another call has failed, to undo what was done before"
_TEXT = "is called after another call has failed, for a message"
_CUDA = "cuFile is for CUDA, and so are staging blocks"
NOT_REACHED: dict[str, str] = {
    "cuDevicePrimaryCtxRelease_v2": _UNDO, "cuStreamDestroy_v2": _UNDO, "hipStreamDestroy": _UNDO,
    "cuGetErrorName": _TEXT, "hipGetErrorName": _TEXT,
    "hipMalloc": _CUDA, "hipFree": _CUDA, "hipMemcpyDtoDAsync": _CUDA,
}  # fmt: skip
"""Calls that no load without faults makes, and why."""


def _run_thinned(folder: Path) -> dict[str, Any]:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler, to build the fake device driver")
    command = [sys.executable, SUPPORT / "fault_matrix.py", "--thin", "--json", folder / "results"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    ran = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert (folder / "results").exists(), ran.stdout + ran.stderr
    found: dict[str, Any] = json.loads((folder / "results").read_text(encoding="utf-8"))
    return found


def test_matrix(tmp_path) -> None:
    """One test, since each process of pytest's would run the matrix again."""
    thin = _run_thinned(tmp_path)
    assert thin["wrong"] == []
    assert thin["met"] > 0.8 * thin["cells"], thin["text"]
    if hardware.filesystem(tmp_path).in_memory:
        pytest.skip("the temporary directory is in memory: some calls are made for disks alone")
    known = {*system_calls(), *python_calls(*KEEPING, shared_buffer), "read of a source"}
    known.update(*driver_calls().values())
    if thin["sites"]:  # allocations were watched
        known |= {"malloc", "fopen"}
        sites = allocation_sites() or {}
        assert set(sites.values()) - {sites.get(at) for at in thin["sites"]} == set()
    assert known - {name for name, count in thin["reached"].items() if count} == set(NOT_REACHED)
