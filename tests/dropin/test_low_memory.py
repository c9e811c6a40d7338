"""Less memory than a file has bytes: stock's map serves it, nobody is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastst_patch
from fastst_patch import engine

MIB = 1 << 20
TENSORS, TENSOR_BYTES = 24, 16 * MIB
WAYS: dict[str, dict[str, Any]] = {
    "direct": {"io": "direct"},
    "buffered": {"io": "buffered"},
    "owned": {"tensors": "owned"},
    "drop": {"page_cache": "drop"},
}


@pytest.fixture
def large(raw: Any) -> str:
    """384 MiB of zeros that take no room on the disk."""
    entries = {
        f"t{i:02}": raw.entry("U8", [TENSOR_BYTES], i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES)
        for i in range(TENSORS)
    }
    header = raw.pack(entries)
    path: str = raw.write(header)
    os.truncate(path, len(header) + TENSORS * TENSOR_BYTES)
    return path


@pytest.mark.parametrize("way", WAYS)
def test_what_does_not_fit_is_stocks(large, fast, monkeypatch, way, watch) -> None:
    monkeypatch.setattr(engine, "memory_headroom", lambda: 200 * MIB)
    with fastst_patch.config_context(**WAYS[way]), watch() as seen:
        loaded = fast.load_file(large)
        with fast.safe_open(large, "pt") as handle:
            one = handle.get_tensor("t03")
            rows = handle.get_slice("t04")[5 : 2 * MIB]
            assert len(fast.all_tensors(handle)) == TENSORS
    assert len(loaded) == TENSORS
    assert not torch.stack([one[: 2 * MIB - 5], rows, loaded["t23"][: 2 * MIB - 5]]).any()
    first, handles = seen.reports
    assert first.path == "stock"
    assert "do not fit the memory that is left" in first.fallback_reason
    assert "do not fit the memory that is left" in handles.fallback_reason


def test_many_small_ones_are_looked_at_together(large, fast, monkeypatch, watch) -> None:
    """Each would fit: what was taken before counts in the headroom that the kernel tells."""
    left = [300 * MIB]
    monkeypatch.setattr(engine, "memory_headroom", lambda: left[0])
    kept = []
    with fastst_patch.config_context(io="buffered"), watch() as seen:
        with fast.safe_open(large, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                kept.append(handle.get_tensor(name))
                left[0] -= TENSOR_BYTES
    assert len(kept) == TENSORS
    ours = sum(report.tensors for report in seen.reports if report.path != "stock")
    assert TENSORS // 3 < ours < TENSORS
    assert "do not fit" in seen.reports[-1].fallback_reason


@pytest.mark.parametrize("headroom", [None, 1 << 40])
def test_what_fits_is_ours(large, fast, monkeypatch, watch, headroom) -> None:
    monkeypatch.setattr(engine, "memory_headroom", lambda: headroom)
    with fastst_patch.config_context(io="buffered", fallback="error"), watch() as seen:
        assert len(fast.load_file(large)) == TENSORS
    assert seen.paths() == ["buffered"]


# ---------------------------------------------------------------- a real limit

PROGRAM = """
import json, sys
import torch, safetensors.torch, fastst_patch
from fastst_patch import engine
path, folder, name, ways = sys.argv[1:]
with open(f"{folder}/cgroup.procs", "w") as file:
    file.write("0")
with open(f"{folder}/{name}", "w") as file:
    file.write(str(250 << 20))  # for what comes from here on: the rest stays where it was charged
assert engine.memory_headroom() < 384 << 20
for options in json.loads(ways):
    with fastst_patch.patched(**options), fastst_patch.profile() as seen:
        tensors = safetensors.torch.load_file(path)
    assert not any(tensor[::4096].any() for tensor in tensors.values())
    print(seen.reports[0].path)
    del tensors
"""


@pytest.fixture
def group(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A cgroup of our own and the name of its limit; skips where we may make none."""
    for base, name in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        folder = Path("/sys/fs/cgroup", base, f"fastst-test-{os.getpid()}")
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / name).exists() and os.access(folder / name, os.W_OK):
                yield folder, name
                return
        finally:
            folder.rmdir()
    pytest.skip("no cgroup with a memory limit can be made here")


def test_a_cgroups_limit(large: str, group: tuple[Path, str], tmp_path: Path) -> None:
    ways = [{}, *WAYS.values()]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, large, str(group[0]), group[1]]
    done = subprocess.run(
        [*command, json.dumps(ways)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    first, *others = done.stdout.split()
    assert first.startswith("mmap")
    assert others == ["stock"] * len(WAYS)
