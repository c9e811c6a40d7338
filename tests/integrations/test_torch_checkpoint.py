"""PyTorch's distributed checkpoint: its reader of safetensors files, and their consolidation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine

storage = pytest.importorskip(
    "torch.distributed.checkpoint.hf_storage", reason="needs torch 2.7 or later"
)
READER = getattr(storage, "HuggingFaceStorageReader", None)
WRITER = getattr(storage, "HuggingFaceStorageWriter", None)

pytestmark = [
    pytest.mark.skipif(READER is None or WRITER is None, reason="needs torch 2.8 or later"),
    pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error())),
]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    found = {f"layers.{i}.w": torch.randn(8, 6) for i in range(12)}
    return {**found, "half": torch.randn(5).half(), "scale": torch.tensor(0.5)}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Two files, as a checkpoint on the Hub has them."""
    path, names = tmp_path / "model", list(tensors)
    path.mkdir()
    for number, some in enumerate((names[:7], names[7:])):
        save_file({name: tensors[name] for name in some}, path / f"m-{number}.safetensors")
    return path


def both(call: Callable[[], Any]) -> tuple[Any, Any, list[Any]]:
    """What a call gives with the patch and without, and what was reported."""
    theirs = call()
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        ours = call()
    return ours, theirs, seen.reports


def load(folder: Path, state: dict[str, Any], threads: int = 1) -> dict[str, Any]:
    dcp.load(state, storage_reader=READER(str(folder), threads), no_dist=True)
    return state


def assert_mapped(reports: list[Any], nbytes: int) -> None:
    assert {report.call for report in reports} == {"safe_open"}
    assert {report.fallback_reason for report in reports} == {None}
    assert {report.path.partition("+")[0] for report in reports} == {"mmap"}
    assert sum(report.bytes for report in reports) == nbytes


@pytest.mark.parametrize("threads", [1, 2])
def test_whole_tensors(folder, tensors, assert_same, threads) -> None:
    def call() -> Any:
        return load(folder, {name: torch.zeros_like(t) for name, t in tensors.items()}, threads)

    ours, theirs, reports = both(call)
    assert_same(ours, theirs)
    assert all(torch.equal(ours[name], tensors[name]) for name in tensors)
    assert_mapped(reports, sum(t.nbytes for t in tensors.values()))


def test_a_dtype_of_the_program(folder, tensors, assert_same) -> None:
    def call() -> Any:
        return load(folder, {"half": torch.zeros(5, dtype=torch.float64)})

    ours, theirs, _ = both(call)
    assert_same(ours, theirs)


def test_a_missing_tensor(folder) -> None:
    def raised() -> tuple[type[BaseException], str]:
        with pytest.raises(BaseException) as caught:  # CheckpointException is no Exception
            load(folder, {"no such": torch.zeros(1)})
        return caught.type, str(caught.value).partition("Traceback")[0]

    with fastst_patch.patched():
        patched = raised()
    assert patched == raised()


@pytest.fixture
def second_of_two() -> Iterator[Any]:
    """A mesh of two ranks, of which this process is the second, and the other is not there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dim", [0, 1])
def test_shards(folder, tensors, assert_same, second_of_two, dim) -> None:
    from torch.distributed.tensor import DTensor, Shard

    names = [name for name in tensors if name.startswith("layers")]

    def call() -> Any:
        state = {
            name: DTensor.from_local(
                tensors[name].chunk(2, dim)[1] * 0, second_of_two, [Shard(dim)], run_check=False
            )
            for name in names
        }
        load(folder, state)
        return {name: tensor.to_local().clone() for name, tensor in state.items()}

    ours, theirs, reports = both(call)
    assert_same(ours, theirs)
    assert_same(ours, {name: tensors[name].chunk(2, dim)[1].clone() for name in names})
    assert_mapped(reports, sum(tensor.nbytes for tensor in ours.values()))


def test_consolidation_reads_files_itself(tmp_path, tensors) -> None:
    """So nothing of it is ours, and the consolidated file is stock's, byte for byte."""
    del tensors["scale"]  # torch's consolidation writes no scalars
    written = []

    def call() -> None:
        path = tmp_path / str(len(written))
        writer = WRITER(str(path), save_distributed=True, enable_consolidation=True)
        dcp.save(tensors, storage_writer=writer, no_dist=True)
        (file,) = path.glob("*.safetensors")
        written.append(file)

    _, _, reports = both(call)
    assert reports == []
    theirs, ours = (file.read_bytes() for file in written)
    assert ours == theirs
    loaded, _, reports = both(lambda: load(written[1].parent, {"half": torch.zeros(5).half()}))
    assert torch.equal(loaded["half"], tensors["half"])
    assert_mapped(reports, 10)
