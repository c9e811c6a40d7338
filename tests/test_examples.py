"""The programs in examples/ run, and do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fault_server import FaultServer
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


def test_remote_model(tmp_path, raw) -> None:
    if not EXAMPLES.is_dir():
        pytest.skip("no examples beside these tests")
    file = raw.tensors({"a": torch.ones(100_000, 7), "b": torch.ones(7)})
    files = {"/m/model.safetensors": Path(file).read_bytes(), "/m/config.json": b"{}"}
    with FaultServer(files) as server:
        command = [
            sys.executable, str(EXAMPLES / "remote_model.py"), server.url("/m"),
            str(tmp_path / "cache"),
        ]  # fmt: skip
        for path in ("http", "mmap"):
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=tmp_path, check=False,
                env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home")},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines() == [
                "m: ['config.json', 'model.safetensors']",
                "a: 56 bytes of (2, 7) taken",
                "2 tensors, 2800028 bytes",
                f"by {path}",
            ]
