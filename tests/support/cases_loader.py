"""Cases of ranks: the explicit loader over a group, by fastsafetensors' interface."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from cases_forms import full_of, way_of
from sharded import assert_owns, chunk, storage_bytes

import fastst_patch


def _opened(package: Any, files: list[str], device: str, **options: Any) -> tuple[Any, Any]:
    """A loader and its buffers; files go to the ranks in turn."""
    world = dist.get_world_size()
    loader = package.SafeTensorsFileLoader(dist.group.WORLD, device, nogds=True, **options)
    loader.add_filenames({rank: files[rank::world] for rank in range(world)})
    return loader, loader.copy_files_to_device()


def _columns(names: list[str]) -> list[list[str]]:
    """Names of tensors that can be concatenated, in two groups over all files."""
    return [[n for n in names if n.endswith(end)] for end in (".a", ".b")]


def take_all(rank: Any, files: list[str], way: dict[str, Any]) -> int:
    """All tensors by every method; shards are torch's chunks, uneven ones too."""
    full = full_of(files)
    me = rank.rank, rank.world
    options = {name: value for name, value in way.items() if name != "device"}
    device = way.get("device", "cpu")
    with way_of(rank, way), fastst_patch.config_context(**options):
        loader, buffers = _opened(fastst_patch, files, device)
        assert set(loader.get_keys()) == set(full.tensors)
        names = sorted(full.tensors)
        count = 0
        for name in names:
            tensor = full.tensors[name]
            for dim in range(-1, tensor.dim()):
                ours = buffers.get_sharded(name, dim)
                wanted = tensor if dim == -1 else chunk(tensor, dim, *me)
                assert_owns(ours, wanted, f"{name} along {dim}")
                count += 1
            assert_owns(buffers.get_tensor(name), tensor, name)
            target = sum(name.encode()) % rank.world
            pushed = buffers.push_tensor(name, target)
            assert (pushed is None) == (rank.rank != target)
            if pushed is not None:
                assert_owns(pushed, tensor, name)
        for some in _columns(names):
            wanted = torch.cat([chunk(full.tensors[name], 0, *me) for name in some])
            ours = _raw(buffers.get_multi_cols(some, 0))
            assert torch.equal(storage_bytes(ours.contiguous()), storage_bytes(wanted)), some
            assert ours.shape == wanted.shape
        kept = buffers.get_sharded(names[0], 0)
        buffers.close()
        loader.close()
        assert_owns(kept, chunk(full.tensors[names[0]], 0, *me), names[0])
    return count


def _raw(tensor: Any) -> torch.Tensor:
    """Some methods wrap what they return."""
    found: torch.Tensor = tensor.get_raw() if hasattr(tensor, "get_raw") else tensor
    return found


def beside(rank: Any, files: list[str]) -> int:
    """The same calls of both packages give equal results wherever fastsafetensors has one."""
    packages = [importlib.import_module(name) for name in ("fastsafetensors", "fastst_patch")]
    full = full_of(files)
    found: list[dict[str, torch.Tensor]] = []
    for package in packages:
        loader, buffers = _opened(package, files, "cpu")
        results: dict[str, torch.Tensor] = {}
        # fastsafetensors frees a file once each of its tensors was requested: request these first.
        for name in sorted(full.tensors):
            shape = full.tensors[name].shape
            even = [d for d, n in enumerate(shape) if n and n % rank.world == 0]
            dim = even[sum(name.encode()) % len(even)] if even else -1
            results[f"{name} along {dim}"] = buffers.get_sharded(name, dim).clone()
        buffers.close()
        loader.close()
        loader, buffers = _opened(package, files, "cpu")
        for some in _columns(sorted(full.tensors)):
            results[some[0]] = _raw(buffers.get_multi_cols(some, 1)).clone()
        buffers.close()
        loader.close()
        found.append(results)
    theirs, ours = found
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_owns(ours[name].contiguous(), tensor, name)
    return len(ours)


def _named(files: list[str], device: str, io: str) -> None:
    """A separate loader: the other ranks receive an error of its arguments when they add files."""
    loader = fastst_patch.SafeTensorsFileLoader(dist.group.WORLD, device, io=io)
    loader.add_filenames({0: files[:1]})
    loader.close()


def mistaken(rank: Any, files: list[str], way: dict[str, Any]) -> dict[str, str]:
    """By each mistake of rank 1, the error that this rank raises; "" for none.

    After each, the group loads again, and every byte is right.
    """
    full, odd = full_of(files), rank.rank == 1
    options = {name: value for name, value in way.items() if name != "device"}
    device = way.get("device", "cpu")
    errors: dict[str, str] = {}
    with way_of(rank, way), fastst_patch.config_context(**options):
        loader, b = _opened(fastst_patch, files, device)
        other = fastst_patch.SafeTensorsFileLoader(dist.group.WORLD, device)
        both = {"0.a": -1, "1.a": -1}
        calls: dict[str, Callable[[], Any]] = {
            "another name": lambda: b.get_tensor("1.a" if odd else "0.a"),
            "another order": lambda: b.as_dict(dict(reversed(both.items())) if odd else both),
            "another dim": lambda: b.get_sharded("0.a", 1 if odd else 0),
            "another rank": lambda: b.push_tensor("0.a", 2 if odd else 3),
            "no name": lambda: b.get_tensor("nope" if odd else "0.a"),
            "no dim": lambda: b.get_sharded("0.a", 5 if odd else 0),
            "no whole dim": lambda: b.get_sharded("0.a", "0" if odd else 0),
            "no dtype": lambda: b.get_tensor("0.a", dtype="x" if odd else None),
            "no rank": lambda: b.push_tensor("0.a", "0" if odd else 0),
            "no columns": lambda: b.get_multi_cols(["0.a", "nope" if odd else "1.a"], 0),
            "no columns at all": lambda: b.get_multi_cols([] if odd else ["0.a"], 0),
            "no option": lambda: _named(files, device, "sideways" if odd else "auto"),
            "no rank to read": lambda: other.add_filenames({9 if odd else 0: files[:1]}),
            "no name anywhere": lambda: b.get_tensor("nope"),
        }
        for name, call in calls.items():
            try:
                call()
                errors[name] = ""
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {error}"
            rank.meet()
            for right in ("0.b", "1.a"):
                assert_owns(b.get_tensor(right), full.tensors[right], right)
        b.close()
        loader.close()
        other.close()
    return errors
