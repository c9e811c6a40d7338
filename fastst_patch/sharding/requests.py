"""What a rank takes of one file: in numbers for the others, put together, and by stock."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..dropin.eligibility import complain, same
from .schedule import Key
from .source import Source
from .spec import Region, Rule, Shard, take_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "Request",
    "by_stock",
    "cast",
    "everything",
    "flat",
    "joined",
    "part_bytes",
    "parts_of",
    "takes_of",
    "verify",
]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted of one file.

    Attributes:
        takes: of this rank, by tensor; None for all of it.
        needs: of every rank, as `schedule.split` takes them.
        dtype: to cast floating tensors to.
        numbers: of the tensors that ``needs`` are of; None: all.
        said: what a caller who asks for one tensor must ask for on all ranks, in words.
    """

    takes: dict[int, Shard] | None
    needs: Sequence[Sequence[int]]
    dtype: torch.dtype | None
    numbers: Sequence[int] | None
    said: str | None = None


def cast(kind: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor becomes: only floating ones are cast."""
    return wanted if wanted is not None and kind.is_floating_point else kind


def joined(found: Mapping[Key, torch.Tensor], i: int, take: Shard) -> torch.Tensor:
    """Tensor i of its parts."""
    import torch

    if len(take.parts) == 1:
        return found[i, 0]
    return torch.cat([found[i, k] for k in range(len(take.parts))], dim=take.dim)


def everything(source: Source) -> dict[int, Shard]:
    """All tensors, whole."""
    found = {}
    for i, (shape, _) in enumerate(source.described):
        found[i] = Shard((Region(shape, tuple((0, length, 1) for length in shape)),))
    return found


def flat(source: Source, takes: Mapping[int, Shard] | None) -> Any:
    """Rows that a rank needs of every tensor of a file, in pairs; none where it needs all."""
    if source.fallback is not None or takes is None:
        return array("q")
    pairs = array("q", bytes(16 * len(source.names)))
    for i, take in takes.items():
        pairs[2 * i], pairs[2 * i + 1] = take.rows
    return pairs


def takes_of(
    source: Source, rules: Mapping[str, Rule], rank: int, size: int
) -> dict[int, Shard] | None:
    """What a rank takes of a file, by tensor; None for all of it. Raises as `take_of`."""
    wanted = [rules.get(name) for name in source.names]
    if all(rule is None or rule == "replicate" for rule in wanted):
        return None
    takes = {}
    known: dict[tuple[int, tuple[int, ...]], Shard | None] = {}  # most of a model's are alike
    for i, (rule, name) in enumerate(zip(wanted, source.names, strict=True)):
        shape = source.describe(i)[0]
        if type(rule) is not int:
            take = take_of(rule, name, shape, rank, size)
        elif (rule, shape) in known:
            take = known[rule, shape]
        else:
            take = known[rule, shape] = take_of(rule, name, shape, rank, size)
        if take is not None:
            takes[i] = take
    return takes


def parts_of(takes: Mapping[int, Shard]) -> dict[Key, Region]:
    """All parts, by tensor and number."""
    return {(i, k): part for i, take in takes.items() for k, part in enumerate(take.parts)}


def part_bytes(source: Source, takes: Mapping[int, Shard] | None) -> int:
    """Bytes of what a rank takes, as in the file; all of it for None."""
    total = 0
    for i, (_, dtype) in enumerate(source.described):
        if takes is None:
            total += source.extents[i].rows * source.extents[i].row_bytes
        elif i in takes:
            total += sum(math.prod(part.size) for part in takes[i].parts) * dtype.itemsize
    return total


# ---- where stock reads, and to compare with ----


def by_stock(
    source: Source, parts: Mapping[Key, Region], dtype: torch.dtype | None, device: torch.device
) -> dict[Key, torch.Tensor]:
    """Parts cut from stock's tensors, cast and moved."""
    import torch

    found = {}
    for key, part in parts.items():
        whole = source.by_stock(key[0])
        piece = whole[part.index].clone(memory_format=torch.contiguous_format)
        found[key] = piece.to(device=device, dtype=cast(piece.dtype, dtype))
    return found


def verify(
    source: Source,
    takes: Mapping[int, Shard],
    result: dict[int, torch.Tensor],
    dtype: torch.dtype | None,
    *,
    device: torch.device,
    config: Config,
) -> None:
    """Compare tensors with stock's; one that differs is complained of and replaced."""
    theirs = by_stock(source, parts_of(takes), dtype, device)
    for i, take in takes.items():
        right = joined(theirs, i, take)
        if not same(result[i], right):
            complain(config, source.path, f"tensor {source.names[i]!r}")
            result[i] = right
