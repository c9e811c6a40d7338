"""The explicit loader reads ahead within its budget, also if several threads take tensors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_files import loader_of
from waiting import in_threads

import fastst_patch
from fastst_patch import FastSafetensorsFile, engine

pytestmark = pytest.mark.usefixtures("nothing_left")


def _big(raw: Any, files: int = 3, tensors: int = 20, nbytes: int = 100_000) -> list[str]:
    return [
        raw.tensors(
            {f"{k}.{i:02}": torch.full((nbytes,), 16 * k + i, dtype=torch.uint8)
             for i in range(tensors)},
            f"big{k}.safetensors",
        )
        for k in range(files)
    ]  # fmt: skip


def test_headers_alone_are_read(raw) -> None:
    paths = _big(raw)
    moved = ("bytes_prefetched", "bytes_buffered", "bytes_direct", "bytes_copied", "arena_bytes")
    before = engine.counters()
    loader = loader_of(paths, io="buffered")
    assert len(loader.get_keys()) == 60
    assert loader.get_shape("1.03") == [100_000]
    with FastSafetensorsFile(paths[0], io="buffered") as file:
        assert len(file.get_tensors()) == 20
    after = engine.counters()
    assert [after[name] - before[name] for name in moved] == [0] * len(moved)
    loader.close()


@pytest.mark.parametrize("budget", [0, 1, 150_000, 400_000, 1_000_000])
def test_reading_ahead_stays_within_the_budget(raw, budget) -> None:
    before = engine.counters()
    loader = loader_of(_big(raw), io="buffered", device_memory_budget=budget)
    buffer = loader.copy_files_to_device()
    engine.shutdown()  # waits for what was started
    started = engine.counters()["bytes_buffered"] - before["bytes_buffered"]
    assert started <= budget
    assert (started > 0) == (budget >= 150_000)
    most = 0
    for name in loader.get_keys():
        tensor = buffer.get_tensor(name)
        most = max(most, engine.counters()["arena_bytes"] - before["arena_bytes"])
        assert bool((tensor == 16 * int(name[0]) + int(name[2:])).all())
    assert most <= budget + 3 * 100_352  # tensors asked for, and one that is let go of
    engine.shutdown()
    assert engine.counters()["bytes_buffered"] - before["bytes_buffered"] == 60 * 100_000
    buffer.close()
    loader.close()


@pytest.mark.parametrize("options", [{}, {"io": "buffered"}, {"io": "direct"}], ids=str)
def test_a_cold_file_is_read_once(raw, evict, options) -> None:
    paths = _big(raw, files=2, tensors=40)
    for path in paths:
        evict(Path(path))
    loader = loader_of(paths, **options)
    with fastst_patch.profile() as seen, loader.copy_files_to_device() as buffer:
        for name in loader.get_keys():
            assert bool((buffer.get_tensor(name) == 16 * int(name[0]) + int(name[2:])).all())
    kinds = {"": "mmap+readahead", "buffered": "buffered", "direct": "direct"}
    want = {kinds[options.get("io", "")]}
    assert {report.path for report in seen.reports} <= want | {"buffered"}
    loader.close()


def test_every_second_tensor(raw) -> None:
    """Tensors that are left out neither stop the walk nor keep its memory."""
    before = engine.counters()
    loader = loader_of(_big(raw, tensors=30), io="buffered", device_memory_budget=500_000)
    buffer = loader.copy_files_to_device()
    for name in loader.get_keys()[::3]:
        assert bool((buffer.get_tensor(name) == 16 * int(name[0]) + int(name[2:])).all())
        assert engine.counters()["arena_bytes"] - before["arena_bytes"] <= 500_000 + 3 * 100_352
    buffer.close()


@pytest.mark.parametrize("options", [{}, {"io": "buffered", "device_memory_budget": 300_000}])
def test_two_threads_share_a_buffer(raw, options) -> None:
    loader = loader_of(_big(raw), **options)
    buffer = loader.copy_files_to_device()
    todo, wrong = iter(loader.get_keys() * 4), []
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                name = next(todo, None)
            if name is None:
                return
            if not bool((buffer.get_tensor(name) == 16 * int(name[0]) + int(name[2:])).all()):
                wrong.append(name)

    in_threads(work, 4)
    assert wrong == []
    buffer.close()


def _take_all(buffer: Any, names: list[str], trouble: list[Exception]) -> None:
    try:
        for name in names:
            assert bool((buffer.get_tensor(name) == 16 * int(name[0]) + int(name[2:])).all())
    except Exception as error:
        trouble.append(error)


def test_closed_while_others_take(raw) -> None:
    loader = loader_of(_big(raw), io="buffered", device_memory_budget=300_000)
    for _ in range(5):
        buffer = loader.copy_files_to_device()
        trouble: list[Exception] = []
        arguments = (buffer, loader.get_keys(), trouble)
        threads = [threading.Thread(target=_take_all, args=arguments) for _ in range(2)]
        for thread in threads:
            thread.start()
        buffer.close()
        for thread in threads:
            thread.join()
        assert all("closed" in str(error) for error in trouble), trouble
        trouble.clear()
