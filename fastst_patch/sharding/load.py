"""`load_sharded`: a whole model in one call, of which each rank loads its shards."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import current, pop, push
from ..files.remote import is_remote, remote_files
from ..tensors import dtype_wanted
from .groups import Group
from .sharded_files import ShardedFiles
from .spec import Plan

if TYPE_CHECKING:
    import torch

__all__ = ["load_sharded", "paths_of"]


def load_sharded(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    group: Any = None,
    plan: Plan = None,
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    read_once: str = "node",
    contiguous: bool = False,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Load this rank's shard of every tensor. Collective: all ranks of the group call it.

    Storage is read once per node. To the CPU, ranks of a node share the page cache, and each reads
    a part of the files ahead. Elsewhere (``io="buffered"``, ``"direct"``, ``tensors="owned"``,
    CUDA), a rank reads the rows that it alone needs; rows that several ranks need are read in
    equal parts and exchanged.

    Args:
        files: a file, several, a folder of them, or a ``*.index.json``; the same on all ranks.
            Each may be a URL; of a remote file, each byte is fetched by one rank of a node.
        group: a torch ProcessGroup; None: the default group, or without one this process alone.
        plan: name -> shard spec (see `fastst_patch.sharding.spec`), where names left out are
            whole; or a function of name, shape and dtype that returns a shard spec; None:
            everything whole. A shard spec is None or ``"replicate"``, a dimension, slices,
            ``Packed(dim, count)``, ``Owner(ranks)`` or ``SKIP``. Ranks may have different plans.
        device: where the tensors go; None: the current CUDA device in an NCCL group, else the
            CPU. ``"cuda"`` is the current device, whatever the rank.
        dtype: for floating tensors, cast where they go; a torch dtype or its name.
        read_once: ``node``, or ``job`` where the network is faster than the storage: one rank of
            all reads each byte.
        contiguous: copy shards of a file's map that are not complete rows. By default they are
            views of the map, as stock's slices are; all other shards are contiguous anyway.
        options: as of `config_context`, for this load.

    Returns:
        Name -> tensor, in file order, without the tensors that this rank does not take (`SKIP`,
        `Owner`). A shard without elements is an empty tensor. Tensors are contiguous and own
        storage of exactly their size, except for views of maps: see ``contiguous``.

    Raises:
        RankError: some rank failed; on that rank, the exception is its cause.
        OptionError, TypeError, ValueError: an argument is wrong on all ranks.
    """
    ranks = _group(group)
    token: object = None
    found: list[str] | FileNotFoundError = []
    wanted: torch.dtype | None = None
    try:
        try:
            token = push(options)  # inside: an error must reach the other ranks, which wait
            wanted = dtype_wanted(dtype)
            names = [os.fspath(files)] if isinstance(files, (str, os.PathLike)) else files
            found = _listed(names)
        except BaseException as error:
            ranks.agree(error)  # raises; the others receive it where they open files
        if device is None:
            device = "cuda" if _is_nccl(group) else "cpu"
        with ShardedFiles(
            found, ranks, device, current(), read_once=read_once, contiguous=contiguous
        ) as opened:
            return opened.load(plan, wanted)
    finally:
        pop(token)


def _group(group: Any) -> Group:
    if group is None:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            group = dist.GroupMember.WORLD
    return Group.of(group)


def _is_nccl(group: Any) -> bool:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return False
    return "nccl" in str(dist.get_backend(group if isinstance(group, dist.ProcessGroup) else None))


def _listed(names: Sequence[str | os.PathLike[str]]) -> list[str] | FileNotFoundError:
    """Paths of the files; or the error, where this rank cannot see them. Raises as `paths_of`."""
    try:
        paths = [os.fspath(name) for name in names]
        return [
            path
            for name in paths
            for path in (remote_files(name, current()) if is_remote(name) else paths_of(name))
        ]
    except FileNotFoundError as error:
        return error


def paths_of(name: str) -> list[str]:
    """Paths of the files that a name means: a file, a folder of files, or an index of files.

    Raises:
        FileNotFoundError: a folder holds no files, or a folder or an index cannot be seen.
        ValueError: a JSON file is no index.
    """
    path = Path(name)
    if path.suffix != ".safetensors" and not path.exists():
        # It may be a folder that other ranks see; `ShardedFiles` then uses their paths.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        if len(indices) == 1:
            return paths_of(str(indices[0]))
        found = sorted(str(one) for one in path.glob("*.safetensors"))
        if not found:
            raise FileNotFoundError(errno.ENOENT, "the folder holds no safetensors files", name)
        return found
    if not name.endswith(".json"):
        return [name]
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        return [str(path.parent / shard) for shard in sorted(set(shards))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is not the index of a sharded checkpoint: {error!r}") from error
