"""Which tensors a rank of expert parallelism needs: its own experts, and all that are shared."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["DEFAULT_EXPERT_PATTERN", "expert_parallel_filter", "owned_expert_range"]

DEFAULT_EXPERT_PATTERN = re.compile(r"\.experts\.([0-9]+)\.")
"""Finds an expert's number in the names that Hugging Face and DeepSeek give to its tensors."""


def owned_expert_range(num_experts: int, ep_size: int, ep_rank: int) -> tuple[int, int]:
    """First expert of a rank, and the one behind its last: ranks have adjacent experts.

    Where they do not have equally many, the first ranks have one more.

    Raises:
        ValueError: the rank is not in the group, or the group is empty.
    """
    if ep_size <= 0:
        raise ValueError(f"ep_size={ep_size}: allowed are whole numbers above 0")
    if not 0 <= ep_rank < ep_size:
        raise ValueError(f"ep_rank={ep_rank} is not in a group of {ep_size}")
    each, more = divmod(num_experts, ep_size)
    begin, end = (rank * each + min(rank, more) for rank in (ep_rank, ep_rank + 1))
    return begin, end


def expert_parallel_filter(
    num_experts: int,
    ep_size: int,
    ep_rank: int,
    pattern: re.Pattern[str] = DEFAULT_EXPERT_PATTERN,
) -> Callable[[str], bool]:
    """A function for ``set_tensor_filter``: True for the names of tensors that a rank needs.

    Args:
        num_experts: in all ranks together.
        ep_size: number of ranks.
        ep_rank: of this process.
        pattern: finds the expert's number, as its first group, in the names of experts' tensors.
            Every rank needs a tensor in whose name it finds none.

    Raises as `owned_expert_range`.
    """
    owned = range(*owned_expert_range(num_experts, ep_size, ep_rank))

    def keep(name: str) -> bool:
        found = pattern.search(name)
        return found is None or int(found[1]) in owned

    return keep
