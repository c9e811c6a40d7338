"""Shards on their way to a device, over the fake driver: those that are one piece move.

Complete rows are read, of others the runs are picked out of the file's map."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.distributed as dist
from fake_device import on_device
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine, stock
from fastst_patch.files import readahead_share
from fastst_patch.files.readahead import WORKERS_FROM, ReadAhead
from fastst_patch.layout import FileLayout
from fastst_patch.runs import Runs

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


ALL, NONE = (0, 1, 2), ()

# Name: placement, shape of the tensor; of the parameter, and tensor_idx, where it is one of
# several in it; the ranks whose shard is moved. In bf16: 400 columns are a run of 800 bytes.
Case = tuple[Any, tuple[int, ...], tuple[int, ...] | None, int | None, tuple[int, ...]]
CUTS: dict[str, Case] = {
    "rows": (Shard(0), (64, 48), None, None, ALL),
    "columns": (Shard(1), (24, 1600), None, None, ALL),
    "last": (Shard(-1), (24, 1600), None, None, ALL),
    "columns, many": (Shard(1), (70, 1000), None, None, ALL),  # a rank's fill most of a slot
    "short runs": (Shard(1), (64, 48), None, None, NONE),
    "in the middle": (Shard(1), (4, 8, 300), None, None, ALL),
    "in the middle, one": (Shard(1), (3, 2, 400), None, None, (0, 1)),  # nothing for rank 2
    "a dimension of one": (Shard(2), (5, 1, 1600), None, None, ALL),
    "one of many dimensions": (Shard(2), (1, 4, 1200, 1), None, None, ALL),
    "one row": (Shard(1), (1, 1600), None, None, NONE),  # a copy has the strides of the whole
    "one row of a few": (Shard(0), (2, 600), None, None, (0, 1)),
    "numbers": (Shard(0), (1000,), None, None, ALL),
    "whole": (Replicate(), (64, 48), None, None, ALL),
    "packed": (_StridedShard(0, split_factor=2), (64, 48), None, None, NONE),
    "packed columns": (_StridedShard(1, split_factor=2), (6, 4800), None, None, NONE),
    "rows of an expert": (Shard(1), (64, 48), (6, 64, 48), 4, ALL),
    "columns of an expert": (Shard(2), (24, 1600), (6, 24, 1600), 4, ALL),
    "an expert, whole": (Shard(0), (64, 48), (6, 64, 48), 4, (2,)),  # rank 2 owns 4 and 5
}
PICKED = ("columns", "last", "columns, many", "in the middle", "columns of an expert")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    path = tmp_path / "model.safetensors"
    save_file({n: torch.randn(case[1]).to(torch.bfloat16) for n, case in CUTS.items()}, path)
    assert path.stat().st_size < WORKERS_FROM  # so that it counts as cached
    return path


@contextlib.contextmanager
def rank_of(rank: int, *shape: int) -> Iterator[Any]:
    """A mesh of ranks that are not there, 3 unless its shape is given."""
    shape = shape or (WORLD,)
    size = torch.Size(shape).numel()
    dist.init_process_group("fake", rank=rank, world_size=size, store=fake_pg.FakeStore())
    try:
        names = ("a", "b")[: len(shape)]
        yield dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def operation(mesh: Any, placements: Sequence[Any], shape: tuple[int, ...]) -> OnCpu:
    whole = torch.empty(shape, device="meta")
    local = torch.empty(1, *shape[1:], device="meta")
    param = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return OnCpu(param)


def of_case(mesh: Any, name: str) -> OnCpu:
    placement, shape, whole, _, _ = CUTS[name]
    return operation(mesh, [placement], whole or shape)


def ask(pool: Any, handle: Any, name: str, op: Any, dtype: Any = None) -> Any:
    """What transformers does with a tensor of the checkpoint, and whether it is ours."""
    return loading.spawn_materialize(
        pool, handle.get_slice(name), DEVICE, dtype, sharding_op=op, tensor_idx=CUTS[name][3]
    )


def is_ours(future: Any) -> bool:
    return type(future).__name__ == "LazyFuture"


def stocks(file: Path, name: str, op: Any, dtype: Any = None) -> torch.Tensor | None:
    """Of the CPU: there a view, where nothing is cast."""
    with stock.safe_open(file, "pt") as theirs:
        return op.shard_tensor(theirs.get_slice(name), CUTS[name][3], None, dtype)


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
    """Also cast, and uneven: 64 rows are cut into 22, 22 and 20, 1600 columns in 534 and 532."""
    moved = tensors = left = 0
    with (
        rank_of(rank) as mesh,
        ThreadPoolExecutor(2) as pool,
        fastst_patch.profile() as seen,
        safetensors.safe_open(file, "pt") as handle,
    ):
        before = engine.counters()["bytes_copied"]
        with inside_a_load():
            futures: dict[str, Any] = {}
            expected: dict[str, Any] = {}
            for name, (_, _, _, _, ranks) in CUTS.items():
                op = of_case(mesh, name)
                expected[name] = stocks(file, name, op, dtype)
                futures[name] = ask(pool, handle, name, op, dtype)
                assert is_ours(futures[name]) is (rank in ranks), name
                if rank in ranks:
                    moved += expected[name].numel() * 2
                    tensors += 1
                elif expected[name] is not None:
                    left += expected[name].numel() * 2
            for name, future in futures.items():
                result, other = future.result(), expected[name]
                if other is None:
                    assert result is None
                    continue
                assert (result.shape, result.dtype) == (other.shape, other.dtype), name
                assert torch.equal(result, other), name
                if is_ours(future):
                    assert result.stride() == on_device(other).stride(), name
                    assert result.untyped_storage().nbytes() >= result.nbytes
                    assert result.storage_offset() == 0
        assert moved > 0
        assert engine.counters()["bytes_copied"] - before == moved
    told = [report for report in seen.reports if report.call == "from_pretrained"]
    assert [(r.device, r.path, r.bytes, r.tensors) for r in told] == [
        (DEVICE, "ring", moved, tensors)
    ]
    assert told[0].fallback_reason is None
    # The handle's own report is of what transformers' threads took from it.
    assert [r.bytes for r in seen.reports if r.call == "safe_open"] == [left]


def test_runs_go_in_few_copies(pretrained_to_cuda: Any, file: Path) -> None:
    driver = pretrained_to_cuda.driver
    with (
        rank_of(0) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        inside_a_load(),
    ):
        futures = [ask(pool, handle, name, of_case(mesh, name)) for name in PICKED]
        assert driver.calls("cuMemcpyHtoDAsync_v2") == 0  # a group so small waits to be taken
        nbytes = sum(future.result().nbytes for future in futures)
        # One a slot, and another where a slot holds the end of one tensor and the next one's
        # beginning; there are 146 runs.
        assert driver.calls("cuMemcpyHtoDAsync_v2") <= -(-nbytes // 65536) + len(PICKED)


@pytest.mark.parametrize("rank", range(4))
def test_rows_and_columns(pretrained_to_cuda: Any, file: Path, rank: int) -> None:
    """Both dimensions are cut, as by FSDP and tensor parallelism."""
    name = "columns, many"
    with (
        rank_of(rank, 2, 2) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        inside_a_load(),
    ):
        op = operation(mesh, [Shard(0), Shard(1)], CUTS[name][1])
        future = ask(pool, handle, name, op)
        assert is_ours(future)
        before = engine.counters()["bytes_uploaded"]
        result = future.result()
        assert result.shape == (35, 500)
        assert torch.equal(result, stocks(file, name, op))
        assert engine.counters()["bytes_uploaded"] - before == result.nbytes


def test_a_tensor_asked_for_twice(pretrained_to_cuda: Any, file: Path) -> None:
    """What is moved together must not overlap, nor lie in each other's gaps."""
    with (
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        inside_a_load(),
    ):
        before, futures, expected = engine.counters()["bytes_copied"], [], []
        for rank in (1, 0):
            with rank_of(rank) as mesh:
                op = of_case(mesh, "columns")
                expected.append(stocks(file, "columns", op))
                futures.append(ask(pool, handle, "columns", op))
        assert [is_ours(future) for future in futures] == [True, False]
        for future, other in zip(futures, expected, strict=True):
            assert torch.equal(future.result(), other)
        assert engine.counters()["bytes_copied"] - before == expected[0].nbytes


# Options, and whether rows are moved; nothing else is.
LEFT: dict[str, tuple[dict[str, Any], bool]] = {
    "verify": ({"verify": True}, False),
    "mmap": ({"io": "mmap"}, False),
    "buffered": ({"io": "buffered"}, True),  # not mapped: there is no view
    "direct": ({"io": "direct"}, True),
    "owned": ({"tensors": "owned"}, True),
}


@pytest.mark.parametrize("way", LEFT)
def test_what_is_left_to_stock(pretrained_to_cuda: Any, file: Path, way: str) -> None:
    options, rows = LEFT[way]
    with (
        fastst_patch.patched(**options),
        rank_of(0) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        inside_a_load(),
    ):
        for name in ("rows", "columns"):
            op = of_case(mesh, name)
            future = ask(pool, handle, name, op)
            assert is_ours(future) is (rows and name == "rows")
            assert torch.equal(future.result(), stocks(file, name, op))


def test_columns_do_not_go_by_cufile(pretrained_to_cuda: Any, file: Path) -> None:
    with (
        fastst_patch.patched(io="gds"),
        rank_of(0) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        fastst_patch.profile() as seen,
        inside_a_load(),
    ):
        op = of_case(mesh, "columns")
        future = ask(pool, handle, "columns", op)
        assert is_ours(future)
        assert torch.equal(future.result(), stocks(file, "columns", op))
    (told,) = [r for r in seen.reports if r.call == "from_pretrained"]
    assert (told.path, told.fallback_reason) == ("ring", None)


def test_an_error_is_of_whom_it_concerns(pretrained_to_cuda: Any, file: Path) -> None:
    """Rows are read together, but those that cannot be read fail alone."""
    order = list(safetensors.safe_open(file, "pt").offset_keys())
    last = order[-1]
    begin = engine.read_layout(engine.open_file(str(file))).extent(len(CUTS) - 1)[0]
    with (
        rank_of(2) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        inside_a_load(),
    ):
        wanted = stocks(file, "rows", of_case(mesh, "rows")).clone()
        assert last != "rows"
        op = operation(mesh, [Shard(0)], CUTS[last][1])
        slices = {"rows": of_case(mesh, "rows"), last: op}
        with file.open("r+b") as opened:
            opened.truncate(begin + 64)
        futures = {name: ask(pool, handle, name, op) for name, op in slices.items()}
        assert torch.equal(futures["rows"].result(), wanted)
        with pytest.raises((OSError, safetensors.SafetensorError)):
            futures[last].result()


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_no_memory_is_stocks_to_say(pretrained_to_cuda: Any, file: Path, name: str) -> None:
    with (
        rank_of(1) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        fastst_patch.profile() as seen,
        inside_a_load(),
    ):
        op = of_case(mesh, name)
        pretrained_to_cuda.refuse_from = pretrained_to_cuda.allocated + 1
        future = ask(pool, handle, name, op)
        assert is_ours(future)
        assert torch.equal(future.result(), stocks(file, name, op))
    reasons = [r.fallback_reason for r in seen.reports if r.call == "from_pretrained"]
    assert len(reasons) == 1
    assert "memory" in reasons[0]


@pytest.mark.parametrize("how", ["driver", "mode"])
def test_what_cannot_be_moved_when_taken(pretrained_to_cuda: Any, file: Path, how: str) -> None:
    driver = pretrained_to_cuda.driver
    with (
        rank_of(1) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        fastst_patch.profile() as seen,
        inside_a_load(),
    ):
        futures = {name: ask(pool, handle, name, of_case(mesh, name)) for name in PICKED}
        if how == "driver":
            driver.fail("cuMemcpyHtoDAsync_v2", 1, 1 << 40)
        with torch.inference_mode(how == "mode"):
            found = {name: future.result() for name, future in futures.items()}
        for name, result in found.items():
            assert torch.equal(result, stocks(file, name, of_case(mesh, name)))
    assert driver.live().blocks == 0
    (told,) = [r for r in seen.reports if r.call == "from_pretrained"]
    assert (told.path, told.bytes, told.tensors) == ("stock", 0, 0)
    assert ("719" if how == "driver" else "torch mode") in str(told.fallback_reason)


# ---- what is not cached ----


def extents(file: Path, *names: str) -> list[tuple[int, int]]:
    layout: FileLayout = engine.read_layout(engine.open_file(str(file)))
    return sorted(layout.extent(layout.index[name]) for name in names)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each call of `in_turn` was given; every file counts as not cached."""
    plans: list[dict[str, Any]] = []
    plan = readahead_share.in_turn

    def watched(alone: Any, shared: Any, turn: int, turns: int) -> Any:
        plans.append({"turn": (turn, turns), "alone": list(alone), "shared": list(shared)})
        return plan(alone, shared, turn, turns)

    monkeypatch.setattr(readahead_share, "in_turn", watched)
    monkeypatch.setattr(ReadAhead, "cold", lambda self: True)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return plans


@pytest.mark.parametrize("rank", range(WORLD))
def test_ranks_read_ahead_in_turn(
    pretrained_to_cuda: Any, file: Path, planned: list[dict[str, Any]], rank: int
) -> None:
    """Columns, and what transformers' threads cut out of the same map; rows are read anyway."""
    names = ("rows", "columns", "last", "packed columns", "short runs")
    with (
        rank_of(rank) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        inside_a_load(),
    ):
        futures = {name: ask(pool, handle, name, of_case(mesh, name)) for name in names}
        assert not planned  # so little waits until something is taken
        for name, future in futures.items():
            assert torch.equal(future.result(), stocks(file, name, of_case(mesh, name)))
    (plan,) = planned
    assert plan["turn"] == (rank, WORLD)
    assert plan["alone"] == []
    assert plan["shared"] == Runs(extents(file, *names[1:])).ranges


def test_rows_that_one_rank_needs_are_read_alone(
    pretrained_to_cuda: Any, file: Path, planned: list[dict[str, Any]]
) -> None:
    """Of a tensor cut in both dimensions: half of its rows."""
    name = "columns, many"
    with (
        rank_of(3, 2, 2) as mesh,
        ThreadPoolExecutor(1) as pool,
        safetensors.safe_open(file, "pt") as handle,
        inside_a_load(),
    ):
        op = operation(mesh, [Shard(0), Shard(1)], CUTS[name][1])
        ask(pool, handle, name, op).result()
    ((begin, end),) = extents(file, name)
    assert planned == [{"turn": (3, 4), "alone": [((begin + end) // 2, end)], "shared": []}]
