"""Requests for shards of one file, and tensors made of the loaded regions."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..dropin.eligibility import complain, same
from ..errors import RankError
from .schedule import Key
from .source import Source
from .spec import Region, Shard, ShardSpec, shard_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "Request",
    "check_same_requests",
    "join_regions",
    "load_by_stock",
    "needed_rows",
    "regions_of",
    "requested_bytes",
    "result_dtype",
    "shards_of",
    "verify",
    "whole_tensors",
]


@dataclasses.dataclass(frozen=True)
class Request:
    """The ranks' request for shards of one file.

    Attributes:
        shards: of this rank, by tensor; None for all of the file.
        needs: rows that each rank needs, as `schedule.split` takes them.
        dtype: to cast floating tensors to.
        numbers: of the tensors that ``needs`` are of; None: all.
        description: of a request for one tensor; it must be the same on all ranks.
    """

    shards: dict[int, Shard] | None
    needs: Sequence[Sequence[int]]
    dtype: torch.dtype | None
    numbers: Sequence[int] | None
    description: str | None = None


def check_same_requests(descriptions: Sequence[str | None]) -> None:
    """Raise unless all ranks request the same: otherwise tensors would be mixed up.

    Args:
        descriptions: of every rank's request.

    Raises:
        RankError: alike on all ranks.
    """
    first = descriptions[0]
    for rank, description in enumerate(descriptions):
        if description != first:
            raise RankError(
                rank,
                f"it {description}, where rank 0 {first}; all ranks must take the same tensors in"
                " the same order",
            )


def result_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor is cast to: only floating ones are cast."""
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def join_regions(found: Mapping[Key, torch.Tensor], i: int, shard: Shard) -> torch.Tensor:
    """Join the regions of tensor i's shard."""
    import torch

    if len(shard.regions) == 1:
        return found[i, 0]
    return torch.cat([found[i, k] for k in range(len(shard.regions))], dim=shard.dim)


def whole_tensors(source: Source) -> dict[int, Shard]:
    """Shards that are all tensors of a file, whole."""
    found = {}
    for i, (shape, _) in enumerate(source.described):
        found[i] = Shard((Region(shape, tuple((0, length, 1) for length in shape)),))
    return found


def needed_rows(source: Source, shards: Mapping[int, Shard] | None) -> Any:
    """Rows that a rank needs of every tensor, in flat pairs; empty where it needs all."""
    if source.fallback is not None or shards is None:
        return array("q")
    pairs = array("q", bytes(16 * len(source.names)))
    for i, shard in shards.items():
        pairs[2 * i], pairs[2 * i + 1] = shard.rows
    return pairs


def shards_of(
    source: Source, specs: Mapping[str, ShardSpec], rank: int, size: int
) -> dict[int, Shard] | None:
    """A rank's shards of a file, by tensor; None for all of it. Raises as `shard_of`."""
    wanted = [specs.get(name) for name in source.names]
    if all(spec is None or spec == "replicate" for spec in wanted):
        return None
    shards = {}
    known: dict[tuple[int, tuple[int, ...]], Shard | None] = {}  # most of a model's are alike
    for i, (spec, name) in enumerate(zip(wanted, source.names, strict=True)):
        shape = source.described[i][0]
        if type(spec) is not int:
            shard = shard_of(spec, name, shape, rank, size)
        elif (spec, shape) in known:
            shard = known[spec, shape]
        else:
            shard = known[spec, shape] = shard_of(spec, name, shape, rank, size)
        if shard is not None:
            shards[i] = shard
    return shards


def regions_of(shards: Mapping[int, Shard]) -> dict[Key, Region]:
    """All regions, by tensor and number."""
    return {(i, k): region for i, shard in shards.items() for k, region in enumerate(shard.regions)}


def requested_bytes(source: Source, shards: Mapping[int, Shard] | None) -> int:
    """Bytes of a rank's shards, as in the file; all of the file for None."""
    total = 0
    for i, (_, dtype) in enumerate(source.described):
        if shards is None:
            total += source.extents[i].rows * source.extents[i].row_bytes
        elif i in shards:
            total += sum(math.prod(one.size) for one in shards[i].regions) * dtype.itemsize
    return total


# ---- stock's tensors: where it reads the file, and to compare with ----


def load_by_stock(
    source: Source, regions: Mapping[Key, Region], dtype: torch.dtype | None, device: torch.device
) -> dict[Key, torch.Tensor]:
    """Regions of stock's tensors, cast and moved."""
    import torch

    found = {}
    for key, region in regions.items():
        whole = source.stock_tensor(key[0])
        piece = whole[region.index].clone(memory_format=torch.contiguous_format)
        found[key] = piece.to(device=device, dtype=result_dtype(piece.dtype, dtype))
    return found


def verify(
    source: Source,
    shards: Mapping[int, Shard],
    result: dict[int, torch.Tensor],
    dtype: torch.dtype | None,
    *,
    device: torch.device,
    config: Config,
) -> None:
    """Compare tensors with stock's; report and replace each that differs."""
    theirs = load_by_stock(source, regions_of(shards), dtype, device)
    for i, shard in shards.items():
        right = join_regions(theirs, i, shard)
        if not same(result[i], right):
            complain(config, source.path, f"tensor {source.names[i]!r}")
            result[i] = right
