"""A model that is remote, for tests of URLs: fixtures, and what its tests share."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from memory_source import Store, served

from fastst_patch import engine
from fastst_patch.sources.base import RemoteError

MIB = 1 << 20
URL = "memory://here/model.safetensors"
SECRET = "memory://me:pass@here/model.safetensors?sig=SECRET#x"


def model() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    found = {f"layer.{i}.w": torch.randn(64, 256 + i) for i in range(24)}
    found["big"] = torch.randint(0, 255, (5 * MIB // 16, 16), dtype=torch.uint8)
    found["half"] = torch.randn(100, 30).to(torch.bfloat16)
    found["scalar"] = torch.tensor(3.5)
    found["empty"] = torch.zeros(0, 4)
    return found


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("remote") / "model.safetensors"
    safetensors.torch.save_file(model(), path, {"format": "pt"})
    return str(path)


@pytest.fixture
def bucket(twin: str) -> Iterator[Store]:
    with served({URL: Path(twin).read_bytes()}) as found:
        yield found
    gc.collect()
    engine.shutdown()
    counters = engine.counters()
    assert counters["fed_files"] == counters["jobs"] == counters["arena_bytes"] == 0
    assert all(source.cancelled for source in found.opened)


def data_begin(path: str) -> int:
    return 8 + int.from_bytes(Path(path).read_bytes()[:8], "little")


def failing_from(offset: int) -> Callable[[int, int], None]:
    def before(at: int, nbytes: int) -> None:
        if at + nbytes > offset:
            raise RemoteError("here", "model.safetensors", "it broke", offset=at, status=503)

    return before


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def in_thread(function: Callable[..., Any], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    return thread
