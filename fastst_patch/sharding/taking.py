"""What a rank takes of one file: all of it, in numbers for the others, and put together."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .rules import Part, Take
from .schedule import Key
from .sources import Source

if TYPE_CHECKING:
    import torch

__all__ = ["everything", "flat", "joined"]


def joined(found: Mapping[Key, torch.Tensor], i: int, take: Take) -> torch.Tensor:
    """Tensor i of its parts."""
    import torch

    if len(take.parts) == 1:
        return found[i, 0]
    return torch.cat([found[i, k] for k in range(len(take.parts))], dim=take.dim)


def everything(source: Source) -> dict[int, Take]:
    """All tensors, whole."""
    found = {}
    for i, (shape, _) in enumerate(source.described):
        found[i] = Take((Part(shape, tuple((0, length, 1) for length in shape)),))
    return found


def flat(source: Source, takes: Mapping[int, Take] | None) -> Any:
    """Rows that a rank needs of every tensor of a file, in pairs; none where it needs all."""
    if source.doubt is not None or takes is None:
        return array("q")
    pairs = array("q", bytes(16 * len(source.names)))
    for i, take in takes.items():
        pairs[2 * i], pairs[2 * i + 1] = take.rows
    return pairs
