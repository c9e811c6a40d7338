"""Tensors that are full of the number in their name, so that each tells whether it is right."""

from __future__ import annotations

from typing import Any

import torch


def file_of_numbers(raw: Any, count: int, *shape: int) -> str:
    """A file of tensors of bytes, ``t00``, ``t01`` and so on; t07 is full of 7."""
    path: str = raw.tensors(
        {f"t{i:02}": torch.full(shape, i, dtype=torch.uint8) for i in range(count)}
    )
    return path


def right(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor of such a file, or a part of it, holds what its name says."""
    return bool((tensor == int(name[1:])).all())
