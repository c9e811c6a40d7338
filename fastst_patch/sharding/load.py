"""`load_sharded`: a whole model in one call, each rank its part."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import current, pop, push
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
    """Load this rank's part of every tensor. Collective: all ranks of the group call it.

    Storage is read once per node: to the CPU, ranks of a node share the page cache, and each
    reads a part of it ahead; elsewhere (``io="buffered"``, ``"direct"``, ``tensors="owned"``,
    CUDA) rows that one rank alone needs go straight to it, and what several need is read in
    equal parts and exchanged.

    Args:
        files: a file, several, a folder of them, or a ``*.index.json``; the same on all ranks.
        group: a torch ProcessGroup; None: the default group, or without one this process alone.
        plan: name -> rule (see `fastst_patch.sharding.spec`), where names left out are whole; or
            a function of name, shape and dtype that returns a rule; None: everything whole. A
            rule is None or ``"replicate"``, a dimension, slices, ``Owner(ranks)`` or ``SKIP``.
            Ranks may have different plans.
        device: where the tensors go; None: the current CUDA device in an NCCL group, else the
            CPU. ``"cuda"`` is the current device, whatever the rank.
        dtype: for floating tensors, cast where they go; a torch dtype or a name of one.
        read_once: ``node``, or ``job`` where the network is faster than the storage: every byte
            is read by one rank of all.
        contiguous: parts of a file's map that are not complete rows are copied. By default they
            are views of it, as stock's slices are; all others are contiguous anyway.
        options: as of `config_context`, for this load.

    Returns:
        Name -> tensor, in file order, without those that `SKIP` and `Owner` leave to nobody or to
        others; a part without elements is an empty tensor. Tensors are contiguous and own
        storage of exactly their size, but for views of maps: see ``contiguous``.

    Raises:
        RankError: it failed on some rank; on that rank caused by the exception itself.
        OptionError, TypeError, ValueError: an argument is none.
    """
    ranks = _group(group)
    token: object = None
    found: list[str] | FileNotFoundError = []
    wanted: torch.dtype | None = None
    try:
        try:
            token = push(options)  # refused on one rank, it must not leave the others waiting
            wanted = dtype_wanted(dtype)
            names = [os.fspath(files)] if isinstance(files, (str, os.PathLike)) else files
            found = _listed(names)
        except BaseException as error:
            ranks.agree(error)  # raises; the others hear it where they open files
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
    """The files that names mean, or why this rank cannot see which. Raises as `paths_of`."""
    try:
        return [path for name in names for path in paths_of(os.fspath(name))]
    except FileNotFoundError as error:
        return error


def paths_of(name: str) -> list[str]:
    """Files that a name means: itself, those of a folder, or those of an index.

    Raises:
        FileNotFoundError: a folder holds none, or a folder or an index cannot be seen.
        ValueError: an index is none.
    """
    path = Path(name)
    if path.suffix != ".safetensors" and not path.exists():
        # A folder, perhaps, that others see; they know what is in it, or that it is a file.
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
        raise ValueError(f"{name}: no index of a sharded checkpoint: {error!r}") from error
