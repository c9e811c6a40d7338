"""The programs in examples/ run, and do what they say."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from places import EXAMPLES


def test_single_process(tmp_path, raw) -> None:
    if not EXAMPLES.is_dir():
        pytest.skip("no examples beside these tests")
    files = [
        raw.tensors({f"{k}.w": torch.ones(100, 7), f"{k}.b": torch.ones(7)}, f"{k}.safetensors")
        for k in range(3)
    ]
    command = [sys.executable, str(EXAMPLES / "single_process.py"), "cpu", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    total = 3 * 4 * 707
    assert done.stdout.splitlines() == [
        "0.b: F32 [7], 28 bytes",
        "0.w: F32 [100, 7], 2800 bytes",
        f"6 tensors, {total} bytes on cpu",
        f"as float16: {total // 2} bytes",
        f"streamed: {total} bytes",
    ]
    assert "B/s" in done.stderr
