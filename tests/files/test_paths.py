"""The CPU data paths: the extents read ahead, their order, and when reading ahead stops."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine

MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path, evict: Callable[[Path], None]) -> Path:
    """48 tensors of 4 MiB, in file order t00 to t47, not cached."""
    path = tmp_path / "model.safetensors"
    save_file({f"t{i:02d}": torch.full((MIB,), float(i)) for i in range(48)}, path)
    evict(path)
    return path


def _cached(path: Path, begin: int, nbytes: int) -> float:
    return engine.open_file(str(path)).residency(begin, nbytes)[0] / nbytes


def _until(condition: object, seconds: float = 30.0) -> bool:
    """Wait for the workers in the background. The limit only keeps a failure from hanging."""
    limit = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > limit:
            return False
        time.sleep(0.005)
    return True


def test_load_file_reads_ahead_all_of_it(model: Path) -> None:
    with fastst_patch.profile() as profile:
        loaded = fastst_patch.load_file(model)
    assert profile.reports[0].path == "mmap+readahead"
    assert profile.reports[0].resident < 0.2
    size = model.stat().st_size
    assert _until(lambda: _cached(model, 0, size) == 1.0)
    assert all(loaded[f"t{i:02d}"][-1] == i for i in range(48))


def test_a_handle_reads_what_is_asked_for(model: Path, evict: Callable[[Path], None]) -> None:
    data = engine.read_layout(engine.open_file(str(model))).data_begin
    evict(model)
    with fastst_patch.profile() as profile, fastst_patch.safe_open(model, "pt") as f:
        tensor = f.get_tensor("t30")
        assert _until(lambda: _cached(model, data + 30 * 4 * MIB, 4 * MIB) == 1.0)
        assert _cached(model, data + 44 * 4 * MIB, 4 * MIB) == 0.0
        assert tensor.sum() == 30 * MIB
    assert profile.reports[0].path == "mmap+readahead"


def test_a_handle_walked_in_order_runs_ahead(model: Path, evict: Callable[[Path], None]) -> None:
    data = engine.read_layout(engine.open_file(str(model))).data_begin
    evict(model)
    with fastst_patch.safe_open(model, "pt") as f:
        f.get_slice("t00")[:]
        f.get_slice("t01")[:]
        assert _until(lambda: _cached(model, data, 64 * MIB) == 1.0)
        assert _cached(model, data + 40 * 4 * MIB, 4 * MIB) == 0.0
        for i in range(2, 48):
            assert f.get_tensor(f"t{i:02d}")[5] == i


def test_reading_ahead_ends_with_the_last_tensor(model: Path) -> None:
    for _ in range(20):
        loaded = fastst_patch.load_file(model)
        one = loaded.pop("t03")
        del loaded
        assert one[0] == 3
        del one
        gc.collect()
    assert _until(lambda: engine.counters()["jobs"] == 0)
    assert _until(lambda: engine.counters()["arenas"] == 0)
    assert engine.counters()["files"] == 0


def test_reading_ahead_leaves_memory_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastst_patch.files.readahead.RESERVE", 1 << 60)
    monkeypatch.setattr(engine, "memory_headroom", lambda: 1 << 62)  # a tenth is still too much
    with fastst_patch.config_context(progress=True):  # waits for the job
        loaded = fastst_patch.load_file(model)
    assert _cached(model, 32 * MIB, model.stat().st_size - 32 * MIB) < 0.5
    assert all(loaded[f"t{i:02d}"][7] == i for i in range(48))


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_slices_read_only_their_rows(tmp_path: Path, io: str) -> None:
    path = tmp_path / "rows.safetensors"
    source = torch.arange(1 << 20, dtype=torch.int32).view(1024, 1024)
    save_file({"pad": torch.ones(3, dtype=torch.uint8), "w": source}, path)
    with fastst_patch.config_context(io=io, small_file_bytes=0):
        with fastst_patch.safe_open(path, "pt") as f:
            piece = f.get_slice("w")
            before = engine.counters()["bytes_buffered"] + engine.counters()["bytes_direct"]
            assert torch.equal(piece[100:110], source[100:110])
            after = engine.counters()["bytes_buffered"] + engine.counters()["bytes_direct"]
            assert after - before == 10 * 4096
            for index in (
                np_index(3), np_index(-1), (slice(5, 9), slice(None, None, 3)), slice(7, 3),
                slice(-5, None), slice(None, None, 2), (Ellipsis, 0), None, [1, 5], slice(0, 0),
                (slice(1000, 5000), 17), slice(5000, 6000),
            ):  # fmt: skip
                assert torch.equal(piece[index], source[index]), index


def np_index(i: int) -> int:
    """An int as other libraries have them."""
    return torch.tensor(i).item()


@pytest.mark.parametrize("io", ["auto", "buffered", "direct"])
def test_files_of_every_small_size(tmp_path: Path, io: str) -> None:
    """The ends of files and blocks, at odd sizes and offsets."""
    sizes = [0, 1, 7, 255, 256, 257, 4095, 4096, 4097, 65535, 65536, 65537, 1 << 20]
    source = {f"x{n}": torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes}
    path = tmp_path / "sizes.safetensors"
    save_file(source, path)
    for chunk in ("64KiB", "4MiB"):
        with fastst_patch.config_context(io=io, chunk_bytes=chunk, small_file_bytes=0):
            loaded = fastst_patch.load_file(path)
        assert all(torch.equal(loaded[name], source[name]) for name in source)
