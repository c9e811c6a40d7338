"""Parts of tensors by stock: where the fast path is in doubt, and to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..config import Config
from ..decide import complain, same
from .rules import Part, Take
from .schedule import Key
from .source import Source
from .taking import cast, joined, parts_of

if TYPE_CHECKING:
    import torch

__all__ = ["by_stock", "verify"]


def by_stock(
    source: Source, parts: Mapping[Key, Part], dtype: torch.dtype | None, device: torch.device
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
    takes: Mapping[int, Take],
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
