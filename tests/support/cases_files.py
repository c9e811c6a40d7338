"""Cases of ranks: names of files, tensors handed out, and refused arguments."""

from __future__ import annotations

import gc
import inspect
import json
import os
import pathlib
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from cases_forms import FORMS, Me, full_of, loaded, way_of
from rank_nursery import attempt
from sharded import Full, assert_owns, assert_tensors, chunk, load_sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from fastst_patch import sharding


def named(rank: Any, what: Any, files: list[str], as_path: bool = False) -> int:
    """A path, a list, a folder or an index."""
    full = full_of(files)
    plan, expect = FORMS["alternating"](full, Me(rank.rank, rank.world))
    if as_path:
        what = [pathlib.Path(w) for w in what] if isinstance(what, list) else pathlib.Path(what)
    return assert_tensors(loaded(what, None, plan), full, expect)


def tuple_of_files(rank: Any, files: list[str]) -> int:
    """Paths may be any sequence."""
    return assert_tensors(loaded(tuple(files), None, None), full_of(files), lambda _, t: t)


def _casts(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether torch can: none casts from F4."""
    try:
        return tensor.to(dtype) is not None
    except (NotImplementedError, RuntimeError):
        return False


def cast(rank: Any, files: list[str], dtype: str, form: str, **way: Any) -> None:
    """Floating tensors in another dtype, everything else as it is."""
    full = full_of(files)
    wanted = getattr(torch, dtype)
    plan, expect = FORMS[form](full, Me(rank.rank, rank.world))
    # NaNs are compared as such: their payloads depend on the processor.
    packed = {name for name, t in full.tensors.items() if not _casts(t, wanted)}
    floating = {n for n, t in full.tensors.items() if t.is_floating_point()} - packed
    plan = {**plan, **dict.fromkeys(packed, sharding.SKIP)}

    def same_numbers(name: str, t: torch.Tensor) -> torch.Tensor | None:
        shard = None if name in packed else expect(name, t)
        if shard is None or name not in floating:
            return shard
        shard = shard.to(wanted)
        found = result[name].isnan()
        assert torch.equal(found, shard.isnan()), name
        return torch.where(found, result[name], shard)

    with way_of(rank, way) as options:
        result = loaded(files, None, plan, dtype=wanted, **options)
        assert_tensors(result, full, same_numbers)


def private(rank: Any, files: list[str], form: str, **way: Any) -> None:
    """A write to a tensor by one rank changes neither other ranks' tensors nor the file.

    A rank's remaining tensors outlive the others, the group's next load and the handles.
    """
    full = full_of(files)
    plan, expect = FORMS[form](full, Me(rank.rank, rank.world))
    with way_of(rank, way) as options:
        first = loaded(files, None, plan, **options)
        rank.meet()
        if rank.rank == rank.world - 1:
            for tensor in first.values():
                tensor.untyped_storage().fill_(0xEE)
        rank.meet()
        if rank.rank < rank.world - 1:
            assert_tensors(first, full, expect)
        kept = {name: first[name] for name in list(first)[:: max(1, len(first) // 5)]}
        del first
        gc.collect()
        second = loaded(files, None, plan, **options)
        assert_tensors(second, full, expect)
        if rank.rank < rank.world - 1:
            for name, tensor in kept.items():
                assert_owns(tensor, expect(name, full.tensors[name]), name)
    assert_tensors(load_sharded(files[0]), full_of(files[:1]), lambda _, t: t)


def two_threads(rank: Any, files: list[str], times: int, met: bool, **way: Any) -> None:
    """Two groups of the same ranks load at once, in a thread each.

    Args:
        rank: this process.
        files: to load.
        times: how often each does.
        met: whether both groups have loaded before, one after the other.
        way: options.
    """
    members = list(range(rank.world))
    both = [dist.new_group(members), dist.new_group(members)]
    full = full_of(files)
    errors: list[Any] = []

    def load(group: Any, name: str) -> None:
        plan, expect = FORMS[name](full, Me(rank.rank, rank.world))
        assert_tensors(load_sharded(files, group, plan, **options), full, expect)

    def work(group: Any, name: str) -> None:
        for _ in range(times):
            error = attempt(lambda: load(group, name))["error"]
            errors.extend([error] if error else [])

    with way_of(rank, way) as options:
        for group in both if met else ():
            load(group, "rows")
        threads = [
            threading.Thread(target=work, args=pair)
            for pair in zip(both, ("alternating", "each its own"), strict=True)
        ]
        for thread in threads if rank.rank % 2 else reversed(threads):
            thread.start()
            time.sleep(0 if met else 0.5)  # each rank first starts the other rank's second thread
        for thread in threads:
            thread.join()
    assert not errors, errors[0]["trace"]


def many(rank: Any, files: list[str], times: int, **way: Any) -> int:
    """Many loads in one group."""
    full = full_of(files)
    for number in range(times):
        name = ("rows", "columns", "whole", "owners")[number % 4]
        plan, expect = FORMS[name](full, Me(rank.rank, rank.world))
        with way_of(rank, way) as options:
            assert_tensors(load_sharded(files, None, plan, **options), full, expect)
    return times


# ---------------------------------------------------------------- refused

WRONG: dict[str, Any] = {
    "scalar": lambda full: {"F32.": 0},
    "scalar from the end": lambda full: {"F32.": -1},
    "dimension": lambda full: {"F32.7x4": 2},
    "dimension from the end": lambda full: {"F32.7x4": -3},
    "unknown name": lambda full: {"F32.7x4": 0, "nobody": 0},
    "unknown name, whole": lambda full: {"nobody": None},
    "text": lambda full: {"F32.7x4": "sideways"},
    "boolean": lambda full: {"F32.7x4": True},
    "float": lambda full: {"F32.7x4": 0.5},
    "step 0": lambda full: {"F32.7x4": slice(None, None, 0)},
    "step back": lambda full: {"F32.7x4": slice(None, None, -1)},
    "too many slices": lambda full: {"F32.7x4": (slice(None),) * 3},
    "function's text": lambda full: lambda name, *_: "sideways" if name == "F32.7x4" else None,
    "owner": lambda full: {"F32.7x4": sharding.Owner(99)},
}


def wrong(rank: Any, files: list[str], what: str) -> Any:
    """A plan that every rank refuses; then the group loads again."""
    plan = WRONG[what](full_of(files))
    outcome = attempt(lambda: load_sharded(files, None, plan))
    good, expect = FORMS["rows"](full_of(files), Me(rank.rank, rank.world))
    assert_tensors(load_sharded(files, None, good), full_of(files), expect)
    return outcome["error"]


def refused(rank: Any, files: list[str], **options: Any) -> Any:
    """An option that all ranks refuse."""
    return attempt(lambda: load_sharded(files, **options))["error"]


def own_options(rank: Any, files: list[str], form: str, each: list[dict[str, Any]]) -> int:
    """Every rank has other options for reading."""
    full = full_of(files)
    plan, expect = FORMS[form](full, Me(rank.rank, rank.world))
    result = load_sharded(files, None, plan, **each[rank.rank % len(each)])
    return assert_tensors(result, full, expect)


# ---------------------------------------------------------------- files that some ranks see


def some_see(rank: Any, files: list[str], seen: list[list[int]], form: str, **way: Any) -> int:
    """Only the ranks seen[i] see file i; relative paths are the same on all ranks."""
    full = full_of(files)
    names = [os.path.basename(file) for file in files]
    for name, file, ranks in zip(names, files, seen, strict=True):
        if os.path.lexists(name):
            os.unlink(name)
        if rank.rank in ranks:
            os.symlink(file, name)
    rank.meet()
    plan, expect = FORMS[form](full, Me(rank.rank, rank.world))
    with way_of(rank, way) as options:
        return assert_tensors(loaded(names, None, plan, **options), full, expect)


def some_see_the_list(rank: Any, files: list[str], named: str, seen: list[int]) -> None:
    """Only some ranks see a folder, or an index with its files."""
    folder = pathlib.Path(f"{named} {seen}")
    if rank.rank in seen:
        folder.mkdir()
        for file in files:
            (folder / os.path.basename(file)).symlink_to(file)
        weights = {str(k): os.path.basename(file) for k, file in enumerate(files)}
        if named == "index":
            (folder / "model.index.json").write_text(json.dumps({"weight_map": weights}))
    rank.meet()
    what = folder / "model.index.json" if named == "index" else folder
    full = full_of(files)
    plan, expect = FORMS["alternating"](full, Me(rank.rank, rank.world))
    assert_tensors(loaded(str(what), None, plan), full, expect)


# ---------------------------------------------------------------- DTensor

PLACED = {
    "shard 0": ("S0",), "shard 1": ("S1",), "shard last": ("S-1",), "replicate": ("R",),
    "shard 0, shard 1": ("S0", "S1"), "shard 1, shard 0": ("S1", "S0"),
    "shard 0 twice": ("S0", "S0"), "shard 1 twice": ("S1", "S1"),
    "replicate, shard 0": ("R", "S0"), "shard 1, replicate": ("S1", "R"),
    "replicate twice": ("R", "R"),
    "shard 0, shard last": ("S0", "S-1"), "shard last, shard 0": ("S-1", "S0"),
}  # fmt: skip


# Without it, rank 0 sends tensors that the others have already.
_NO_BROADCAST: dict[str, Any] = (
    {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters
    else {}
)  # fmt: skip


def _placements(words: tuple[str, ...]) -> list[Any]:
    return [Replicate() if word == "R" else Shard(int(word[1:])) for word in words]


def placed(rank: Any, files: list[str], placements: str, mesh_of: list[int], **way: Any) -> None:
    """A rank's local tensors, as of torch's distribute_tensor."""
    mesh = init_device_mesh("cpu", tuple(mesh_of))
    full = full_of(files)
    chosen = _placements(PLACED[placements])
    deep = max((one.dim for one in chosen if hasattr(one, "dim")), default=-1) + 1
    names = {name: chosen for name, t in full.tensors.items() if t.dim() >= max(deep, 1)}
    plan = sharding.plan_from_placements(mesh, names)

    def expect(name: str, t: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return t
        # Distribute positions, and take bytes by them: few of torch's functions take float4.
        positions = torch.arange(t.numel(), dtype=torch.int64).reshape(t.shape)
        local = distribute_tensor(positions, mesh, names[name], **_NO_BROADCAST).to_local()
        units = t.reshape(-1).view(torch.uint8).reshape(t.numel(), t.itemsize)
        return units[local.reshape(-1)].reshape(-1).view(t.dtype).reshape(local.shape)

    with way_of(rank, way) as options:
        assert_tensors(loaded(files, None, plan, **options), full, expect)


def placed_spec(rank: Any, files: list[str]) -> None:
    """An int in a plan equals Shard on a mesh of the group's ranks."""
    mesh = init_device_mesh("cpu", (rank.world,))
    full = full_of(files)
    for dim in (0, 1, -1):
        names = [n for n, t in full.tensors.items() if t.dim() > max(dim, 0)]
        plan = sharding.plan_from_placements(mesh, {name: [Shard(dim)] for name in names})
        by_shard = load_sharded(files, None, plan)
        assert_tensors(by_shard, full, lambda n, t, d=dim, k=names: (
            chunk(t, d, rank.rank, rank.world) if n in k else t
        ))  # fmt: skip


def partial(rank: Any, files: list[str]) -> Any:
    """Partial is refused: a file holds no partial sums."""
    mesh = init_device_mesh("cpu", (rank.world,))
    return attempt(lambda: load_sharded(
        files, None, sharding.plan_from_placements(mesh, {"F32.7x4": [Partial()]})
    ))["error"]  # fmt: skip


def sub_mesh(rank: Any, files: list[str]) -> None:
    """A dimension of a mesh is a group: ranks 0, 2 and 1, 3 load at the same time."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))["data"]
    full: Full = full_of(files)
    names = [n for n, t in full.tensors.items() if t.dim()]
    plan = sharding.plan_from_placements(mesh, {name: [Shard(0)] for name in names})
    result = load_sharded(files, mesh.get_group(), plan)
    me = Me(rank.rank // 2, 2)
    assert_tensors(result, full, lambda n, t: chunk(t, 0, *me) if n in names else t)
