"""Shard specs of a plan (`ShardSpec`), and the part of a tensor that they give a rank (`Shard`).

======================  ==================================================================
spec                    this rank's part
======================  ==================================================================
None, ``"replicate"``   the whole tensor
an int                  its chunk of that dimension as ``torch.chunk`` cuts and DTensor's
                        ``Shard`` places it: trailing ranks get less, or nothing
slice, tuple of them    the result of indexing the tensor; steps are positive
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
    "Shard",
    "ShardSpec",
    "Skip",
    "chunk",
    "shard_of",
    "specs_of",
]


class Skip(enum.Enum):
    """The type of `SKIP`."""

    SKIP = "skip"


SKIP = Skip.SKIP
"""Spec: this rank takes nothing of the tensor."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """Spec: some ranks of the group take the whole tensor, as for experts.

    Attributes:
        ranks: one rank, or several.
    """

    ranks: int | Collection[int]

    def holds(self, rank: int) -> bool:
        """Whether a rank is among them."""
        return rank == self.ranks if isinstance(self.ranks, int) else rank in self.ranks


@dataclasses.dataclass(frozen=True)
class Packed:
    """Spec: a dimension holds several tensors side by side, as ``gate_up_proj`` does.

    The rank takes its chunk of each, joined in their order. DTensor calls this a strided shard.

    Attributes:
        dim: the dimension; negative ones count from the end.
        count: how many tensors of equal size it holds.
    """

    dim: int
    count: int = 2


ShardSpec = Union[  # noqa: UP007 - 3.10
    None, str, int, slice, tuple[slice, ...], Packed, Owner, Skip
]
Plan = Union[  # noqa: UP007
    None, Mapping[str, ShardSpec], Callable[[str, "tuple[int, ...]", "torch.dtype"], ShardSpec]
]


class Region:
    """A box of one tensor, as torch holds it. Immutable.

    Attributes:
        shape: of the whole tensor.
        bounds: (start, stop, step) for each dimension, as ``range`` takes them.
        size: shape of the region.
        empty: whether it holds no element.
        rows: first row of the first dimension that it needs, and the row after the last. A scalar
            counts as one row; an empty region needs none.
        contiguous: whether it is those rows, complete and without a gap.
    """

    __slots__ = ("bounds", "contiguous", "empty", "rows", "shape", "size")

    def __init__(self, shape: tuple[int, ...], bounds: tuple[tuple[int, int, int], ...]) -> None:
        # Computed once: a model has tens of thousands of regions, each of which is read often.
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
        """Intersect the region with some rows of the whole tensor.

        Args:
            first: first of these rows.
            last: row after the last.

        Returns:
            Rows of the region, and the index that finds them in a tensor of the rows first to
            last; None where the intersection is empty.
        """
        start, stop, step = self.bounds[0]
        before = len(range(start, min(first, stop), step))  # rows of the region before `first`
        count = len(range(start + before * step, min(last, stop), step))
        if count == 0:
            return None
        begin = start + before * step - first
        rows = slice(begin, begin + (count - 1) * step + 1, step)
        return slice(before, before + count), (rows, *self.index[1:])


@dataclasses.dataclass(frozen=True)
class Shard:
    """A rank's part of one tensor.

    Attributes:
        regions: one, or several to be joined.
        dim: dimension along which they are joined.
    """

    regions: tuple[Region, ...]
    dim: int = 0

    @property
    def rows(self) -> tuple[int, int]:
        """First row that it needs, and the row after the last; (0, 0) for none."""
        found = [region.rows for region in self.regions if not region.empty]
        return min((r[0] for r in found), default=0), max((r[1] for r in found), default=0)


def chunk(length: int, rank: int, size: int) -> tuple[int, int]:
    """Begin and end of a rank's chunk of a dimension, as ``torch.chunk`` cuts."""
    each = -(-length // size)
    return min(rank * each, length), min((rank + 1) * each, length)


def shard_of(
    spec: ShardSpec, name: str, shape: Sequence[int], rank: int, size: int
) -> Shard | None:
    """The part of a tensor that a spec gives to a rank.

    Args:
        spec: see the table at the top.
        name: of the tensor, for errors.
        shape: of the whole tensor, as torch holds it.
        rank: the rank.
        size: of the group.

    Returns:
        None where the rank takes no tensor.

    Raises:
        ValueError: the spec does not fit the tensor.
    """
    lengths = tuple(shape)
    whole = tuple((0, length, 1) for length in lengths)
    if spec is SKIP:
        return None
    if isinstance(spec, Owner):
        _check_owner(spec, name, size)
        return Shard((Region(lengths, whole),)) if spec.holds(rank) else None
    if spec is None or spec == "replicate":
        return Shard((Region(lengths, whole),))
    if hasattr(spec, "__index__") and not isinstance(spec, bool):  # numpy's integers, too
        return _packed(Packed(operator.index(spec), 1), name, lengths, rank, size)
    if isinstance(spec, Packed):
        return _packed(spec, name, lengths, rank, size)
    if isinstance(spec, slice):
        spec = (spec,)
    if isinstance(spec, tuple) and all(isinstance(cut, slice) for cut in spec):
        if len(spec) > len(lengths):
            raise ValueError(
                f"tensor {name!r} of shape {list(lengths)} has fewer dimensions than the"
                f" {len(spec)} slices of its spec"
            )
        given = [_bounds(cut, length, name) for cut, length in zip(spec, lengths)]  # noqa: B905
        return Shard((Region(lengths, (*given, *whole[len(given) :])),))
    raise ValueError(
        f"tensor {name!r}: {spec!r} is no shard spec; allowed are None or 'replicate', a"
        " dimension, a slice or a tuple of slices, Packed(...), Owner(...) and SKIP"
    )


def _packed(spec: Packed, name: str, lengths: tuple[int, ...], rank: int, size: int) -> Shard:
    if not -len(lengths) <= spec.dim < len(lengths):
        raise ValueError(
            f"tensor {name!r} of shape {list(lengths)} has no dimension {spec.dim} to shard;"
            " give it the spec 'replicate'"
        )
    dim = spec.dim % len(lengths)
    if spec.count < 1 or lengths[dim] % spec.count:
        raise ValueError(
            f"tensor {name!r}: dimension {dim} of {list(lengths)} cannot hold {spec.count}"
            " tensors of equal size"
        )
    each = lengths[dim] // spec.count
    begin, end = chunk(each, rank, size)
    whole = tuple((0, length, 1) for length in lengths)
    cuts = [(number * each + begin, number * each + end, 1) for number in range(spec.count)]
    regions = tuple(Region(lengths, (*whole[:dim], cut, *whole[dim + 1 :])) for cut in cuts)
    return Shard(regions, dim)


def _bounds(cut: slice, length: int, name: str) -> tuple[int, int, int]:
    try:
        start, stop, step = cut.indices(length)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tensor {name!r}: {cut!r} is no valid slice: {error}") from None
    if step < 1:
        raise ValueError(f"tensor {name!r}: {cut!r}: steps must be positive, as torch's")
    return start, max(start, stop), step


def _check_owner(spec: Owner, name: str, size: int) -> None:
    ranks: Iterable[Any] = (spec.ranks,) if isinstance(spec.ranks, int) else spec.ranks
    for rank in ranks:
        if not isinstance(rank, int) or not 0 <= rank < size:
            raise ValueError(f"tensor {name!r}: no rank {rank!r} in a group of {size}")


def specs_of(
    plan: Plan, described: Callable[[], Mapping[str, tuple[tuple[int, ...], torch.dtype]]],
    names: Collection[str], size: int,
) -> Mapping[str, ShardSpec]:  # fmt: skip
    """A plan's specs by name; names left out are loaded whole.

    Args:
        plan: None: every tensor whole; a mapping; or a function of name, shape and dtype.
        described: returns every tensor's shape and dtype, as torch holds it.
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
    sized = getattr(plan, "sized", None)  # plans that depend on the size of the group
    plan = plan if sized is None else sized(size)
    return {name: plan(name, *each) for name, each in described().items()}
