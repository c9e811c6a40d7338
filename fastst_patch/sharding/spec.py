"""Which part of a tensor a rank takes: rules as callers write them, and what they come to.

======================  ==================================================================
rule                    this rank's part
======================  ==================================================================
None, ``"replicate"``   the whole tensor
an int                  its chunk of that dimension as ``torch.chunk`` cuts and DTensor's
                        ``Shard`` places it: trailing ranks get less, or nothing
slice, tuple of them    what indexing the tensor gives; steps are positive
`Packed`                of several tensors packed side by side along a dimension, its chunk of
                        each, joined
`Owner`                 the whole tensor for some ranks, no tensor for the others
`SKIP`                  no tensor
======================  ==================================================================
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    import torch

__all__ = [
    "SKIP",
    "Owner",
    "Packed",
    "Plan",
    "Region",
    "Rule",
    "Shard",
    "Skip",
    "chunk",
    "rules_of",
    "take_of",
]


class Skip(enum.Enum):
    """The type of `SKIP`."""

    SKIP = "skip"


SKIP = Skip.SKIP
"""Rule: this rank takes nothing of the tensor."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """Rule: the tensor goes to some ranks of the group, whole, as experts do.

    Attributes:
        ranks: one rank, or several.
    """

    ranks: int | Collection[int]

    def holds(self, rank: int) -> bool:
        """Whether a rank is among them."""
        return rank == self.ranks if isinstance(self.ranks, int) else rank in self.ranks


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rule: a dimension holds several tensors side by side, as ``gate_up_proj`` does.

    The rank's chunk of each, joined in their order: what DTensor calls a strided shard.

    Attributes:
        dim: the dimension; negative ones count from the end.
        count: how many tensors of equal size it holds.
    """

    dim: int
    count: int = 2


Rule = Union[  # noqa: UP007 - 3.10
    None, str, int, slice, tuple[slice, ...], Packed, Owner, Skip
]
Plan = Union[  # noqa: UP007
    None, Mapping[str, Rule], Callable[[str, "tuple[int, ...]", "torch.dtype"], Rule]
]


class Region:
    """A rank's part of one tensor, as torch holds it. Not to be changed.

    Attributes:
        shape: of the whole tensor.
        bounds: (start, stop, step) for each dimension, as ``range`` takes them.
        size: shape of the part.
        empty: whether it holds no element.
        rows: rows of the first dimension from the first to behind the last that it needs. A
            scalar counts as one row; an empty part needs none.
        contiguous: whether it is those rows, complete and without a gap.
    """

    __slots__ = ("bounds", "contiguous", "empty", "rows", "shape", "size")

    def __init__(self, shape: tuple[int, ...], bounds: tuple[tuple[int, int, int], ...]) -> None:
        # All at once: there are tens of thousands, and each is looked at several times.
        self.shape = shape
        self.bounds = bounds
        self.size = [len(range(*bound)) for bound in bounds]
        self.empty = 0 in self.size
        self.rows = (0, 0)
        if not self.empty:
            first = range(*bounds[0]) if bounds else range(1)
            self.rows = first[0], first[-1] + 1
        self.contiguous = self.size[1:] == list(shape[1:]) and (
            not bounds or bounds[0][2] == 1 or self.size[0] <= 1
        )

    @property
    def index(self) -> tuple[slice, ...]:
        """For indexing the whole tensor."""
        return tuple(slice(*bound) for bound in self.bounds)

    def within(self, first: int, last: int) -> tuple[slice, tuple[slice, ...]] | None:
        """What some rows of the whole tensor hold of the part.

        Args:
            first: row, of the first dimension, where they begin.
            last: row behind them.

        Returns:
            The rows of the part, and the index into those rows of the tensor; None for nothing.
        """
        start, stop, step = self.bounds[0]
        before = len(range(start, min(first, stop), step))  # the part's rows that lie earlier
        count = len(range(start + before * step, min(last, stop), step))
        if count == 0:
            return None
        begin = start + before * step - first
        rows = slice(begin, begin + (count - 1) * step + 1, step)
        return slice(before, before + count), (rows, *self.index[1:])


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a rank takes of one tensor.

    Attributes:
        parts: one, or several to be joined.
        dim: along which they are.
    """

    parts: tuple[Region, ...]
    dim: int = 0

    @property
    def rows(self) -> tuple[int, int]:
        """Rows from the first to behind the last that it needs; (0, 0) for none."""
        found = [part.rows for part in self.parts if not part.empty]
        return min((r[0] for r in found), default=0), max((r[1] for r in found), default=0)


def chunk(length: int, rank: int, size: int) -> tuple[int, int]:
    """Where ``torch.chunk`` cuts: begin and end of a rank's part of a dimension."""
    each = -(-length // size)
    return min(rank * each, length), min((rank + 1) * each, length)


def take_of(rule: Rule, name: str, shape: Sequence[int], rank: int, size: int) -> Shard | None:
    """What a rule comes to for one rank.

    Args:
        rule: see the table at the top.
        name: of the tensor, for errors.
        shape: of the whole tensor, as torch holds it.
        rank: who takes.
        size: of the group.

    Returns:
        None where the rank takes no tensor.

    Raises:
        ValueError: the rule does not fit the tensor.
    """
    lengths = tuple(shape)
    whole = tuple((0, length, 1) for length in lengths)
    if rule is SKIP:
        return None
    if isinstance(rule, Owner):
        _check_owner(rule, name, size)
        return Shard((Region(lengths, whole),)) if rule.holds(rank) else None
    if rule is None or rule == "replicate":
        return Shard((Region(lengths, whole),))
    if hasattr(rule, "__index__") and not isinstance(rule, bool):  # numpy's whole numbers, too
        return _packed(Packed(operator.index(rule), 1), name, lengths, rank, size)
    if isinstance(rule, Packed):
        return _packed(rule, name, lengths, rank, size)
    if isinstance(rule, slice):
        rule = (rule,)
    if isinstance(rule, tuple) and all(isinstance(cut, slice) for cut in rule):
        if len(rule) > len(lengths):
            raise ValueError(
                f"tensor {name!r} of shape {list(lengths)} has fewer dimensions than the"
                f" {len(rule)} slices of its rule"
            )
        given = [_bounds(cut, length, name) for cut, length in zip(rule, lengths)]  # noqa: B905
        return Shard((Region(lengths, (*given, *whole[len(given) :])),))
    raise ValueError(
        f"tensor {name!r}: no rule for sharding: {rule!r}; allowed are None or 'replicate', a"
        " dimension, a slice or a tuple of slices, Packed(...), Owner(...) and SKIP"
    )


def _packed(rule: Packed, name: str, lengths: tuple[int, ...], rank: int, size: int) -> Shard:
    if not -len(lengths) <= rule.dim < len(lengths):
        raise ValueError(
            f"tensor {name!r} of shape {list(lengths)} has no dimension {rule.dim} to be cut;"
            " give it the rule 'replicate'"
        )
    dim = rule.dim % len(lengths)
    if rule.count < 1 or lengths[dim] % rule.count:
        raise ValueError(
            f"tensor {name!r}: dimension {dim} of {list(lengths)} cannot hold {rule.count}"
            " tensors of equal size"
        )
    each = lengths[dim] // rule.count
    begin, end = chunk(each, rank, size)
    whole = tuple((0, length, 1) for length in lengths)
    cuts = [(number * each + begin, number * each + end, 1) for number in range(rule.count)]
    parts = tuple(Region(lengths, (*whole[:dim], cut, *whole[dim + 1 :])) for cut in cuts)
    return Shard(parts, dim)


def _bounds(cut: slice, length: int, name: str) -> tuple[int, int, int]:
    try:
        start, stop, step = cut.indices(length)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tensor {name!r}: a slice that cannot be: {cut!r}: {error}") from None
    if step < 1:
        raise ValueError(f"tensor {name!r}: steps are positive, as torch's: {cut!r}")
    return start, max(start, stop), step


def _check_owner(rule: Owner, name: str, size: int) -> None:
    ranks: Iterable[Any] = (rule.ranks,) if isinstance(rule.ranks, int) else rule.ranks
    for rank in ranks:
        if not isinstance(rank, int) or not 0 <= rank < size:
            raise ValueError(f"tensor {name!r}: no rank {rank!r} in a group of {size}")


def rules_of(
    plan: Plan, described: Callable[[], Mapping[str, tuple[tuple[int, ...], torch.dtype]]],
    names: Collection[str], size: int,
) -> Mapping[str, Rule]:  # fmt: skip
    """A plan's rules by name; names left out are whole.

    Args:
        plan: None: every tensor whole; a mapping; or a function of name, shape and dtype.
        described: gives every tensor's shape and dtype, as torch holds it.
        names: of all tensors.
        size: of the group.

    Raises:
        ValueError: the plan names a tensor that is in no file.
        TypeError: it is no plan.
    """
    if plan is None:
        return {}
    if not isinstance(plan, Mapping) and not callable(plan):
        raise TypeError(f"a plan is a mapping or a function, not {type(plan).__name__}")
    named = plan if isinstance(plan, Mapping) else getattr(plan, "names", ())
    unknown = [name for name in named if name not in names]
    if unknown:
        raise ValueError(
            f"the plan names {len(unknown)} tensors that are in none of the files, such as"
            f" {unknown[0]!r}"
        )
    if isinstance(plan, Mapping):
        return plan
    sized = getattr(plan, "sized", None)  # one that depends on how many ranks there are
    plan = plan if sized is None else sized(size)
    return {name: plan(name, *each) for name, each in described().items()}
