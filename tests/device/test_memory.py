"""How much device memory is held, and for how long; and how many bytes are read."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from lifetimes import ORDERS, end, owners_of
from numbered import file_of_numbers, right
from waiting import in_threads

import fastst_patch
from fastst_patch import engine

SIZE = 40_000
COUNT = 30
TENSORS = ("dlpack", "owned")


@pytest.fixture
def path(raw) -> str:
    """Thirty tensors of 40,000 bytes."""
    return file_of_numbers(raw, COUNT, 200, 200)


@pytest.fixture(params=TENSORS, autouse=True)
def kind(request) -> Any:
    options = {"tensors": request.param, "fallback": "error", "chunk_bytes": 64 << 10}
    with fastst_patch.config_context(**options):
        yield request.param


def _copied() -> int:
    return engine.counters()["bytes_copied"]


def _right(name: str, tensor: torch.Tensor) -> bool:
    return tensor.shape == (200, 200) and right(name, tensor)


# ---------------------------------------------------------------- how much is read


def test_rows_read_alone(cuda, path, fast, stock) -> None:
    with fast.safe_open(path, "pt", "cuda") as handle, stock.safe_open(path, "pt") as theirs:
        piece, other = handle.get_slice("t07"), theirs.get_slice("t07")
        for index, rows in (
            (slice(3, 8), 5),
            (slice(0, 0), 0),
            (slice(190, 999), 10),
            (slice(-4, None), 4),
            (slice(9, 3), 0),
            ((slice(20, 22), 5), 2),
            ((slice(20, 22), slice(None, None, 7), None), 2),
            (slice(None), 200),
        ):
            before, blocks = _copied(), cuda.bytes
            part = piece[index]
            assert torch.equal(part, other[index])
            engine.shutdown()
            assert _copied() - before == rows * 200, index
            copied = part.nbytes if part.nbytes < rows * 200 else 0  # what is cut out of the rows
            assert cuda.bytes - blocks == rows * 200 + copied, index


def test_a_few_tensors_read_alone(cuda, path, fast) -> None:
    before = _copied()
    with fast.safe_open(path, "pt", "cuda") as handle:
        for name in ("t05", "t20", "t11"):
            assert _right(name, handle.get_tensor(name))
        handle.keys()
        handle.get_slice("t01").get_shape()
    engine.shutdown()
    assert _copied() - before == 3 * SIZE


@pytest.mark.parametrize("budget", [0, 1, 50_000, 4 * 40_192, 500_000, None, 1 << 50])
@pytest.mark.parametrize("jump", [False, True])
def test_a_walk_stays_within_its_budget(cuda, path, fast, budget, jump) -> None:
    """Memory not handed out is at most the budget, beside the tensor that is asked for."""
    limit = (256 << 20) if budget is None else budget
    most = 0
    with fastst_patch.config_context(device_memory_budget=budget):
        with fast.safe_open(path, "pt", "cuda") as handle:
            names = handle.offset_keys()
            order = names[:12] + names[15:24] + names[3:9] + names[20:] if jump else names
            before = _copied()
            for name in order:
                assert _right(name, handle.get_tensor(name))  # and let go of
                most = max(most, cuda.driver.live().block_bytes)
            engine.shutdown()
            if not jump:
                assert _copied() - before == COUNT * SIZE  # each once
    assert most <= limit + 40_192
    if limit > 1 << 20:
        assert most > 10 * SIZE  # it does run ahead
        assert cuda.allocated < 10 or kind_is_owned()
    assert cuda.driver.live().blocks == 0


def kind_is_owned() -> bool:
    return fastst_patch.config().tensors == "owned"


def test_budget_of_load_file(cuda, path, fast) -> None:
    """The largest block that tensors share."""
    with fastst_patch.config_context(device_memory_budget=100_000):
        loaded = fast.load_file(path, device="cuda")
    assert cuda.largest <= 100_000
    assert all(_right(name, tensor) for name, tensor in loaded.items())


def test_passes_in_every_order(cuda, path, fast) -> None:
    rnd = random.Random(1)
    with fastst_patch.config_context(device_memory_budget=300_000):
        with fast.safe_open(path, "pt", "cuda") as handle:
            names = handle.offset_keys()
            twice = [name for name in names for _ in range(2)]
            for order in (names, names, names[::-1], rnd.sample(names, COUNT), names, twice):
                assert all(_right(name, handle.get_tensor(name)) for name in order)


# ---------------------------------------------------------------- who shares what


@pytest.mark.parametrize("mode", [0, 1])
def test_threads_share_a_walk(cuda, path, fast, mode) -> None:
    cuda.driver.lib.fake_mode(mode, 5)
    wrong: list[Any] = []
    with fastst_patch.config_context(device_memory_budget=400_000):
        with fast.safe_open(path, "pt", "cuda") as handle:
            todo = iter(handle.offset_keys() * 3)
            lock = threading.Lock()

            def work() -> None:
                try:
                    while True:
                        with lock:
                            name = next(todo, None)
                        if name is None:
                            return
                        if not _right(name, handle.get_tensor(name)):
                            wrong.append(name)
                except BaseException as error:
                    wrong.append(error)

            in_threads(work, 4)
    assert wrong == []
    assert cuda.driver.live().blocks == 0


def test_two_handles_and_two_devices(cuda, path, fast, watch) -> None:
    with watch() as seen, fastst_patch.config_context(device_memory_budget=300_000):
        handles = [fast.safe_open(path, "pt", device) for device in ("cuda", "cuda", "cuda:1", 1)]
        for name in handles[0].offset_keys():
            for handle in handles:
                assert _right(name, handle.get_tensor(name))
        for handle in handles:
            handle.__exit__(None, None, None)
    assert [r.device for r in seen.reports] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert {r.path for r in seen.reports} == {"ring"}
    assert cuda.driver.live().blocks == 0


# ---------------------------------------------------------------- how long


@given(order=ORDERS)
def test_alive_in_any_order(cuda, raw, fast, order) -> None:
    source = {"w": torch.arange(5000.0).view(50, 100), "v": torch.ones(7, dtype=torch.bool)}
    path = raw.tensors(source, "alive")
    owners = owners_of(fast, path, "cuda")
    kept = [owners["handle"].get_tensor("w"), owners["loaded"]["w"], owners["siblings"]["w"]]
    kept += [owners["slice"][10:20], owners["slice"][:, 3]]
    wanted = [source["w"]] * 3 + [source["w"][10:20], source["w"][:, 3]]
    for step in order:
        end(owners, step, path)
        if "slice" in owners:
            assert torch.equal(owners["slice"][3], source["w"][3])
        assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))
    while kept:
        kept.pop(random.Random(len(kept)).randrange(len(kept)))
        assert cuda.driver.live().blocks <= len(kept)
    assert cuda.driver.live().blocks == 0


def test_one_survivor(cuda, kind, path, fast) -> None:
    """One tensor keeps its arena, or its own allocation, and no other memory."""
    with fastst_patch.config_context(device_memory_budget=10 * 40_192):
        loaded = fast.load_file(path, device="cuda")
    one = loaded.pop("t13")
    blocks = cuda.driver.live().blocks
    assert blocks == (COUNT if kind == "owned" else 3)
    del loaded
    gc.collect()
    left = cuda.driver.live()
    assert (left.blocks, left.block_bytes <= 10 * 40_192) == (1, True)
    assert kind == "dlpack" or left.block_bytes == SIZE
    assert _right("t13", one)
    del one
    assert cuda.driver.live().blocks == 0


def test_storages_are_apart(cuda, path, fast) -> None:
    """Each storage has its tensor's size; a change shows in no other tensor and no other load."""
    first, second = fast.load_file(path, device="cuda"), fast.load_file(path, device="cuda")
    with fast.safe_open(path, "pt", "cuda") as handle:
        again = {name: handle.get_tensor(name) for name in handle.offset_keys()}
        pointers = set()
        for tensors in (first, second, again):
            for tensor in tensors.values():
                assert tensor.untyped_storage().nbytes() == tensor.nbytes == SIZE
                assert tensor.storage_offset() == 0
                assert tensor.data_ptr() % 256 == 0
                pointers.add(tensor.untyped_storage().data_ptr())
        assert len(pointers) == 3 * COUNT
        for name in list(first)[::2]:
            first[name].fill_(255)
            assert first[name]._version == 1
        for name in first:
            assert _right(name, second[name])
            assert _right(name, again[name])
            assert _right(name, handle.get_tensor(name))
            assert _right(name, first[name]) == (int(name[1:]) % 2 == 1)
        assert second["t00"]._version == 0


def test_copies_of_one(cuda, path, fast) -> None:
    loaded = fast.load_file(path, device="cuda")
    one = loaded["t05"]
    buffer = io.BytesIO()
    torch.save(one, buffer)
    assert len(buffer.getvalue()) < SIZE + 10_000
    buffer.seek(0)
    for other in (torch.load(buffer), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert _right("t05", other)
        assert other.untyped_storage().nbytes() == SIZE
    wrapped = torch.nn.Parameter(one, requires_grad=False)
    del loaded, one, other
    gc.collect()
    assert cuda.driver.live().blocks == 1
    assert _right("t05", wrapped)
    del wrapped
    gc.collect()
    assert cuda.driver.live().blocks == 0
