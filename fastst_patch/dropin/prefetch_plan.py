"""What ``handle.prefetch(plan)`` asks for, checked as safetensors 0.9 checks it.

A plan maps names to None for the whole tensor, to a slice of the first dimension, or, here alone,
to a tuple with a slice for each of the first dimensions. Slices have step 1 and lie within the
tensor. The texts of errors are stock's.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

from .. import engine
from ..dtypes import DTYPE_NAMES, PACKED, TORCH
from ..layout import FileLayout, plan_rows
from ..stock import SafetensorError

__all__ = ["Wanted", "wanted_of"]

_TOO_FAR = 1 << 63


class Wanted(NamedTuple):
    """What is wanted of one tensor.

    Attributes:
        i: number of the tensor.
        nbytes: to be read.
        index: as a slice takes it; None: the whole tensor.
        rows: number of the tensor, the first row that the index needs, and the row behind the last.
        rest: index into these rows.
    """

    i: int
    nbytes: int
    index: Any = None
    rows: tuple[int, int, int] = (0, 0, 0)
    rest: Any = None


def wanted_of(layout: FileLayout, plan: dict[Any, Any] | None) -> list[Wanted]:
    """What a plan asks for, in the order of the file; None: everything.

    Raises:
        SafetensorError: stock's, for a plan that it refuses; or a tuple of slices is wrong.
    """
    if plan is None:
        found = [Wanted(i, layout.nbytes(i)) for i in range(len(layout.names))]
    else:
        found = sorted((_wanted(layout, *item) for item in plan.items()), key=lambda one: one.i)
    if plan is not None and not found:
        raise SafetensorError("prefetch plan selects no tensors")
    for wanted in found:
        kind = DTYPE_NAMES[layout.dtype(wanted.i)]
        if TORCH[kind].name is None:
            raise SafetensorError(
                f"prefetch cannot hand out dtype {kind}: torch has no matching dtype"
            )
    return found


def _wanted(layout: FileLayout, name: Any, value: Any) -> Wanted:
    if not isinstance(name, str):
        raise SafetensorError("prefetch plan keys must be tensor names")
    i = layout.index.get(name)
    if i is None:
        raise SafetensorError(f"File does not contain tensor {name}")
    if value is None:
        return Wanted(i, layout.nbytes(i))
    shape = layout.shape(i)
    slices = value if isinstance(value, tuple) else (value,)
    for one in slices:
        if not isinstance(one, slice):
            raise SafetensorError(
                f"prefetch plan values must be None or a slice, got {type(one)} for {name}"
            )
    if slices and not shape:
        raise SafetensorError(f"cannot slice rows of the 0-d tensor {name}")
    if len(slices) > len(shape):
        raise SafetensorError(
            f"prefetch plan has {len(slices)} slices for {name}, which has {len(shape)} dimensions"
        )
    cut = [_bounds(name, one, d, shape[d]) for d, one in enumerate(slices)]
    if cut and engine.dtype_bits(layout.dtype(i)) * math.prod(shape[1:]) % 8:
        raise SafetensorError(f"cannot slice rows of {name}: a row is not a whole number of bytes")
    if all(bounds == (0, length) for bounds, length in zip(cut, shape, strict=False)):
        return Wanted(i, layout.nbytes(i))
    if len(cut) == len(shape) and cut[-1] != (0, shape[-1]) and layout.dtype(i) in PACKED:
        raise SafetensorError(f"cannot slice the last dimension of {name}: its dtype is packed")
    (start, stop), *others = cut
    first, last = plan_rows(layout, i, start, stop)
    rest = tuple(slice(*bounds) for bounds in others)
    return Wanted(
        i, last - first, (slice(start, stop), *rest), (i, start, stop), (slice(None), *rest)
    )


def _bounds(name: str, wanted: slice, dimension: int, length: int) -> tuple[int, int]:
    """First and last but one of a slice of one dimension, which is one of rows or another."""
    for which in ("start", "stop"):
        bound = getattr(wanted, which)
        try:
            number = None if bound is None else operator.index(bound)
        except TypeError:
            number = _TOO_FAR
        if number is not None and not -_TOO_FAR <= number < _TOO_FAR:
            raise SafetensorError(f"prefetch plan slice bounds for {name} must be integers or None")
    for which in ("start", "stop"):
        bound = getattr(wanted, which)
        if bound is not None and not -length <= operator.index(bound) <= length:
            what = f"{length} rows" if not dimension else f"dimension {dimension} of {length}"
            raise SafetensorError(
                f"prefetch plan slice {which} {operator.index(bound)} for {name} is out of range"
                f" for {what}"
            )
    try:
        start, stop, step = wanted.indices(length)
    except (TypeError, ValueError) as error:
        raise SafetensorError(
            f"invalid prefetch plan slice for {name}: {type(error).__name__}: {error}"
        ) from None
    if step != 1:
        raise SafetensorError(f"prefetch plan slices must have step 1, got {step} for {name}")
    return start, max(start, stop)
