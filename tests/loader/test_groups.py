"""The explicit loader's calls of `ShardedFiles`: their order and arguments."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from loader_files import bits
from places import SUPPORT
from safetensors.torch import save_file
from warm_python import TORCHRUN

from fastst_patch import ParallelLoader, SafeTensorsFileLoader, fastsafe_open, sharding
from fastst_patch.config import Config
from fastst_patch.loader.stock_file import layout_of


class Pair:
    """A group of two; this process is its second rank."""

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 2


class FakeSharded:
    """Replaces ShardedFiles; cuts this rank's shards by torch."""

    made: ClassVar[list[FakeSharded]] = []

    def __init__(self, files: Any, group: Any, device: Any, config: Any, *, call: str) -> None:
        from safetensors.torch import load_file

        self.arguments = (files, group, device, config, call)
        self.config = config
        self.calls: list[Any] = []
        self.closed = 0
        self.tensors: dict[str, torch.Tensor] = {}
        self.paths: dict[str, str] = {}
        most = max(len(paths) for paths in files.values())
        for at in range(most):
            for paths in files.values():
                for path in paths[at : at + 1]:
                    found = load_file(path)
                    self.tensors |= found
                    self.paths |= dict.fromkeys(found, path)
        self.names = list(self.tensors)
        self.sources = [
            SimpleNamespace(path=path, fallback=None, layout=layout_of(path))
            for path in dict.fromkeys(self.paths.values())
        ]
        FakeSharded.made.append(self)

    def read_ahead(self) -> None:
        """Does nothing."""

    def where(self, name: str) -> tuple[str, int]:
        return self.paths[name], 0

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self.tensors[name].shape), self.tensors[name].dtype

    def take(self, name: str, dim: int, dtype: Any = None) -> torch.Tensor:
        self.calls.append(("take", name, dim, dtype))
        whole = self.tensors[name]
        if dim >= 0:
            length = math.ceil(whole.shape[dim] / 2)
            whole = whole.narrow(dim, length, whole.shape[dim] - length)
        return whole if dtype is None else whole.to(dtype)

    def push(self, name: str, dst_rank: int, dtype: Any = None) -> torch.Tensor | None:
        self.calls.append(("push", name, dst_rank, dtype))
        return self.take(name, -1, dtype) if dst_rank == 1 else None

    def refuse(self, name: str, error: Exception) -> None:
        raise error

    def close(self) -> None:
        self.closed += 1


class FakeGroup(tuple):
    """Replaces Group; all ranks have the same error."""

    @classmethod
    def of(cls, pg: Any) -> FakeGroup:
        return cls(("group of", type(pg)))

    def agree(self, error: Exception) -> None:
        raise error


@pytest.fixture
def files(tmp_path, monkeypatch) -> dict[str, str]:
    monkeypatch.setattr(sharding, "ShardedFiles", FakeSharded, raising=False)
    monkeypatch.setattr(sharding, "Group", FakeGroup, raising=False)
    FakeSharded.made.clear()
    paths = {f"{k}": str(tmp_path / f"{k}.safetensors") for k in range(3)}
    for k, path in enumerate(paths.values()):
        tensors = {f"{k}.w": torch.arange(30.0).view(5, 6) + k, f"{k}.b": torch.arange(3) + k}
        save_file(tensors, path, {"of": path})
    return paths


def test_tensors_come_from_sharded_files(files) -> None:
    loader = SafeTensorsFileLoader(Pair(), "cpu", max_threads=3)
    by_rank = {0: [files["0"], files["2"]], 1: [files["1"]]}
    loader.add_filenames(by_rank)
    (fake,) = FakeSharded.made
    given, group, device, config, call = fake.arguments
    assert (given, group, device, call) == (
        by_rank, ("group of", Pair), "cpu", "SafeTensorsFileLoader",
    )  # fmt: skip
    assert isinstance(config, Config)
    assert config.threads == 3
    assert loader.get_keys() == fake.names
    assert loader.get_shape("1.w") == [5, 6]
    with pytest.raises(KeyError):
        loader.get_shape("nothing")

    buffer = loader.copy_files_to_device(dtype="F16")
    assert len(FakeSharded.made) == 1  # the open files are used
    assert buffer.key_to_rank_lidx == {
        "0.b": (0, 0), "0.w": (0, 0), "1.b": (1, 0), "1.w": (1, 0), "2.b": (0, 1), "2.w": (0, 1),
    }  # fmt: skip
    assert buffer.get_filename("2.b") == files["2"]
    tensors = fake.tensors
    assert bits(buffer.get_tensor("0.w")) == bits(tensors["0.w"].half())
    assert bits(buffer.get_sharded("0.w", 0)) == bits(tensors["0.w"][3:].half())
    assert bits(buffer.get_sharded("0.w", 1, None, torch.float32)) == bits(tensors["0.w"][:, 3:])
    assert buffer.push_tensor("1.b", 0) is None
    assert bits(buffer.push_tensor("1.b", 1, dtype="I64")) == bits(tensors["1.b"])
    columns = buffer.get_multi_cols(["2.w", "0.w"], -1).get_raw()
    want = torch.cat([tensors["2.w"][:, 3:], tensors["0.w"][:, 3:]], 1)
    assert bits(columns) == bits(want.half())
    assert fake.calls == [
        ("take", "0.w", -1, torch.float16),
        ("take", "0.w", 0, torch.float16),
        ("take", "0.w", 1, torch.float32),
        ("push", "1.b", 0, torch.float16),
        ("push", "1.b", 1, torch.int64),
        ("take", "1.b", -1, torch.int64),
        ("take", "2.w", 1, torch.float16),
        ("take", "0.w", 1, torch.float16),
    ]
    for dim in (2, -2):
        with pytest.raises(IndexError, match=f"no dimension {dim}"):
            buffer.get_sharded("0.w", dim)
    with pytest.raises(ValueError, match="rank 2 is not in the group, whose size is 2"):
        buffer.push_tensor("0.w", 2)
    with pytest.raises(RuntimeError, match="single-process"):
        list(buffer.iter_local_tensors(["0.w"]))
    assert {path: rank for path, (_, rank) in loader.meta.items()} == {
        files["0"]: 0, files["1"]: 1, files["2"]: 0,
    }  # fmt: skip
    ours, theirs = (
        buffer.rank_loaders[rank][lidx]
        for rank, lidx in map(buffer.key_to_rank_lidx.__getitem__, ("1.w", "2.w"))
    )
    assert (ours.metadata.src, theirs.metadata.src) == (files["1"], files["2"])
    assert (list(ours.tensors), list(theirs.tensors)) == (["1.b", "1.w"], [])
    with pytest.raises(RuntimeError, match="take tensors together; use shuffle"):
        ours.tensors["1.w"]
    assert bits(theirs.shuffle(Pair(), "2.w", 0).get_raw()) == bits(tensors["2.w"][3:].half())
    assert theirs.push(Pair(), "2.b", 0, 0) is None
    with pytest.raises(ValueError, match="a group of 1"):
        theirs.shuffle(None, "2.w", 0)
    loader.close()
    assert fake.closed == 0  # the buffer closes it
    buffer.close()
    buffer.close()
    assert fake.closed == 1


def test_sharded_files_are_opened_and_closed(files) -> None:
    loader = SafeTensorsFileLoader(Pair())
    loader.add_filenames({0: [files["0"]]})
    loader.add_filenames({1: [files["1"]]})
    assert [fake.closed for fake in FakeSharded.made] == [1, 0]
    assert FakeSharded.made[1].arguments[0] == {0: [files["0"]], 1: [files["1"]]}
    first = loader.copy_files_to_device()
    second = loader.copy_files_to_device()  # opens the files again
    third = loader.copy_files_to_device(max_copy_block_size=1 << 20)
    assert [fake.closed for fake in FakeSharded.made] == [1, 0, 0, 0]
    assert FakeSharded.made[3].arguments[3].chunk_bytes == 1 << 20
    assert loader.get_keys() == ["0.b", "0.w", "1.b", "1.w"]
    for buffer in (first, second, third):
        buffer.close()
    loader.reset()
    assert loader.get_keys() == []
    loader.add_filenames({0: [files["2"]]})
    loader.close()
    assert [fake.closed for fake in FakeSharded.made] == [1] * 5


def test_refused_in_groups(files) -> None:
    loader = SafeTensorsFileLoader(Pair())
    with pytest.raises(ValueError, match="rank 2 is not in the group"):
        loader.add_filenames({2: [files["0"]]})
    loader.add_filenames({0: [files["0"]]})
    with pytest.raises(ValueError, match="borrowed_tensors requires a single-process"):
        loader.copy_files_to_device(borrowed_tensors=True)
    with pytest.raises(ValueError, match="tensor_filter requires a single-process"):
        ParallelLoader(Pair(), [files["0"]], tensor_filter=bool)
    with pytest.raises(ValueError, match="borrowed_tensors requires a single-process"):
        ParallelLoader(Pair(), [files["0"]], borrowed_tensors=True, accumulate_resident=False)
    loader.close()


def test_filters_caches_and_metadata(files) -> None:
    loader = SafeTensorsFileLoader(Pair(), disable_cache=False)
    loader.add_filenames({0: list(files.values())})
    loader.set_tensor_filter(lambda name: name.endswith("w"))
    assert loader.get_keys() == ["0.w", "1.w", "2.w"]
    buffer = loader.copy_files_to_device()
    for _ in range(2):
        assert bits(buffer.get_sharded("0.w", 0)) == bits(FakeSharded.made[0].tensors["0.w"][3:])
    assert len(FakeSharded.made[0].calls) == 1
    with pytest.raises(ValueError, match="not found"):
        buffer.get_tensor("0.b")
    with fastsafe_open({0: list(files.values())}, pg=Pair()) as opened:
        assert opened.metadata() == {path: {"of": path} for path in files.values()}
        assert opened.keys() == FakeSharded.made[1].names
    assert FakeSharded.made[1].closed == 1
    assert FakeSharded.made[1].arguments[4] == "fastsafe_open"


def test_iteration(files) -> None:
    loader = ParallelLoader(Pair(), list(files.values()), use_tqdm_on_load=False)
    given = {name: bits(tensor) for name, tensor in loader.iterate_weights()}
    (fake,) = FakeSharded.made
    assert fake.arguments[0] == {0: [files["0"], files["2"]], 1: [files["1"]]}
    assert given == {name: bits(tensor) for name, tensor in fake.tensors.items()}
    assert fake.closed == 1
    alone = ParallelLoader(Pair(), list(files.values()), use_tqdm_on_load=False, all_local=True)
    assert {name: bits(tensor) for name, tensor in alone.iterate_weights()} == given
    assert len(FakeSharded.made) == 1


RANKS = """
import sys
import torch
import torch.distributed as dist
from loader_files import bits
from safetensors.torch import load_file
from fastst_patch import ParallelLoader, SafeTensorsFileLoader, fastsafe_open

dist.init_process_group("gloo")
group, rank, size, paths = dist.group.WORLD, dist.get_rank(), dist.get_world_size(), sys.argv[1:]
theirs = {name: tensor for path in paths for name, tensor in load_file(path).items()}
loader = SafeTensorsFileLoader(group, "cpu")
loader.add_filenames({r: paths[r::size] for r in range(size)})
assert set(loader.get_keys()) == set(theirs)
with loader.copy_files_to_device() as buffer:
    for name, tensor in theirs.items():
        assert loader.get_shape(name) == list(tensor.shape)
        assert bits(buffer.get_tensor(name)) == bits(tensor)
        for dim in range(tensor.dim()):
            parts = [part.contiguous() for part in torch.chunk(tensor, size, dim)]
            mine = buffer.get_sharded(name, dim)
            if rank < len(parts):
                assert bits(mine) == bits(parts[rank])
            else:
                assert mine.numel() == 0
        assert bits(buffer.get_sharded(name, -1, dtype="F64")) == bits(tensor.double())
        pushed = buffer.push_tensor(name, 1)
        assert pushed is None if rank != 1 else bits(pushed) == bits(tensor)
    columns = buffer.get_multi_cols(["0.w", "1.w"], 1).get_raw()
    parts = [torch.chunk(theirs[name], size, 1)[rank] for name in ("0.w", "1.w")]
    assert bits(columns) == bits(torch.cat(parts, 1))
loader.close()
given = ParallelLoader(group, paths, use_tqdm_on_load=False).iterate_weights()
assert {n: bits(t) for n, t in given} == {n: bits(t) for n, t in theirs.items()}
with fastsafe_open({0: paths}, pg=group) as opened:
    assert opened.metadata() == {path: {} for path in paths}
dist.destroy_process_group()
"""


def test_two_ranks(tmp_path, raw, warm_python) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    paths = [
        raw.tensors(
            {f"{k}.w": torch.randn(5, 7), f"{k}.b": torch.randn(3).to(torch.bfloat16),
             f"{k}.s": torch.tensor(k), f"{k}.e": torch.empty(0, 4), f"{k}.one": torch.ones(1, 2)},
            f"{k}.safetensors",
        )
        for k in range(3)
    ]  # fmt: skip
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    arguments = ["--standalone", "--nproc-per-node", "2", script, *paths]
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    done = warm_python.run(TORCHRUN, *arguments, folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
