"""Shards on their way to a device, over the fake driver: complete rows, and no others, move."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine

loading = pytest.importorskip("transformers.core_model_loading", reason="needs transformers 5")
sharding_utils = pytest.importorskip(
    "transformers.distributed.sharding_utils", reason="shards by spawn_materialize from 5.13 on"
)
fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

from torch.distributed.tensor import DTensor, Replicate, Shard  # noqa: E402
from torch.distributed.tensor.placement_types import _StridedShard  # noqa: E402

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

WORLD = 3
DEVICE = "cuda:0"


class OnCpu(sharding_utils.DtensorShardOperation):
    """What cuts, where CPU memory stands for the device: stock's own copy to it is none."""

    def shard_tensor(
        self, source: Any, tensor_idx: Any = None, device: Any = None, dtype: Any = None
    ) -> Any:
        told = None if device == DEVICE else device
        return super().shard_tensor(source, tensor_idx=tensor_idx, device=told, dtype=dtype)


# Name: placement, shape of the parameter, tensor_idx; what becomes of it in every rank.
CUTS: dict[str, tuple[Any, tuple[int, ...] | None, int | None, str]] = {
    "rows": (Shard(0), None, None, "moved"),
    "columns": (Shard(1), None, None, "stock"),
    "last": (Shard(-1), None, None, "stock"),
    "whole": (Replicate(), None, None, "moved"),
    "packed": (_StridedShard(0, split_factor=2), None, None, "stock"),
    "rows of an expert": (Shard(1), (6, 64, 48), 4, "moved"),
    "columns of an expert": (Shard(2), (6, 64, 48), 4, "stock"),
    "an expert, whole": (Shard(0), (6, 64, 48), 4, "one"),  # rank 2 owns experts 4 and 5
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(64, 48).to(torch.bfloat16) for name in CUTS}, path)
    return path


@contextlib.contextmanager
def rank_of(rank: int) -> Iterator[Any]:
    """A mesh of ranks that are not there."""
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=fake_pg.FakeStore())
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    finally:
        dist.destroy_process_group()


def operation(mesh: Any, placement: Any, shape: tuple[int, ...]) -> OnCpu:
    whole = torch.empty(shape, device="meta")
    local = torch.empty(1, *shape[1:], device="meta")
    param = DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return OnCpu(param)


@contextlib.contextmanager
def inside_a_load() -> Iterator[Any]:
    from fastst_patch.integrations.transformers import _here, _Load

    _here.load = load = _Load()
    try:
        yield load
    finally:
        _here.load = None
        load.end(failed=False)


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("rank", range(WORLD))
def test_shards_are_stocks(pretrained_to_cuda: Any, file: Path, rank: int, dtype: Any) -> None:
    """Also cast, and uneven: 64 rows are cut into 22, 22 and 20."""
    moved = 0
    with (
        rank_of(rank) as mesh,
        ThreadPoolExecutor(2) as pool,
        safetensors.safe_open(file, "pt") as handle,
        fastst_patch.profile() as seen,
    ):
        before = engine.counters()["bytes_copied"]
        with inside_a_load():
            futures: dict[str, Any] = {}
            expected: dict[str, Any] = {}
            for name, (placement, shape, idx, kind) in CUTS.items():
                op = operation(mesh, placement, shape or (64, 48))
                with fastst_patch.stock.safe_open(file, "pt") as theirs:
                    expected[name] = op.shard_tensor(theirs.get_slice(name), idx, None, dtype)
                futures[name] = loading.spawn_materialize(
                    pool, handle.get_slice(name), DEVICE, dtype, sharding_op=op, tensor_idx=idx
                )
                ours = type(futures[name]).__name__ == "_Promise"
                assert ours is (kind == "moved" or (kind == "one" and rank == 2)), name
                if ours:
                    moved += expected[name].numel() * 2
            for name, future in futures.items():
                result, other = future.result(), expected[name]
                if other is None:
                    assert result is None
                    continue
                assert (result.shape, result.dtype) == (other.shape, other.dtype), name
                assert torch.equal(result, other), name
        assert moved > 0
        assert engine.counters()["bytes_copied"] - before == moved
    told = [report for report in seen.reports if report.call == "from_pretrained"]
    assert [(r.device, r.path.split("+")[0], r.bytes) for r in told] == [(DEVICE, "ring", moved)]
    assert told[0].fallback_reason is None


def test_verify_leaves_them_to_stock(pretrained_to_cuda: Any, file: Path) -> None:
    with (
        fastst_patch.patched(verify=True),
        rank_of(0) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        inside_a_load(),
    ):
        op = operation(mesh, Shard(0), (64, 48))
        future = loading.spawn_materialize(
            pool, handle.get_slice("rows"), DEVICE, None, sharding_op=op
        )
        assert type(future).__name__ == "Future"
        assert torch.equal(future.result(), handle.get_tensor("rows")[:22])


def test_an_error_is_of_whom_it_concerns(pretrained_to_cuda: Any, file: Path) -> None:
    """Rows are read together, but those that cannot be read fail alone."""
    begin = engine.read_layout(engine.open_file(str(file))).extent(len(CUTS) - 1)[0]
    last = list(safetensors.safe_open(file, "pt").offset_keys())[-1]
    first = next(name for name in CUTS if name != last)
    with (
        rank_of(2) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        inside_a_load(),
    ):
        wanted = handle.get_tensor(first)[44:].clone()
        op = operation(mesh, Shard(0), (64, 48))
        slices = {name: handle.get_slice(name) for name in (first, last)}
        with file.open("r+b") as opened:
            opened.truncate(begin + 64)
        futures = {
            name: loading.spawn_materialize(pool, one, DEVICE, None, sharding_op=op)
            for name, one in slices.items()
        }
        assert torch.equal(futures[first].result(), wanted)
        with pytest.raises((OSError, safetensors.SafetensorError)):
            futures[last].result()


def test_no_memory_is_stocks_to_say(pretrained_to_cuda: Any, file: Path) -> None:
    with (
        rank_of(1) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        fastst_patch.profile() as seen,
        inside_a_load(),
    ):
        op = operation(mesh, Shard(0), (64, 48))
        pretrained_to_cuda.refuse_from = pretrained_to_cuda.allocated + 1
        future = loading.spawn_materialize(
            pool, handle.get_slice("rows"), DEVICE, None, sharding_op=op
        )
        assert torch.equal(future.result(), handle.get_tensor("rows")[22:44])
    reasons = [r.fallback_reason for r in seen.reports if r.call == "from_pretrained"]
    assert len(reasons) == 1
    assert "memory" in reasons[0]
