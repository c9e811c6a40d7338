"""Safetensors' dtypes: their names and numbers in the native engine, and how torch holds each.

The layers below refer to a dtype by its number in ``enum fst_dtype``. The table is by name, so that
it can be used without the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import engine

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPE_NAMES",
    "PACKED",
    "TORCH",
    "TorchDtype",
    "dtype_named",
    "header_of_one",
    "header_shape",
]


class TorchDtype(NamedTuple):
    """How torch holds a dtype.

    Attributes:
        name: attribute of torch; None: no version of torch has it.
        code: as in DLPack 1.3's DLDataTypeCode; None: it is imported as bytes.
        per_element: numbers in one element of a torch tensor. Headers count numbers.
    """

    name: str | None = None
    code: int | None = None
    per_element: int = 1


TORCH = {
    "BOOL": TorchDtype("bool", 6),
    "F4": TorchDtype("float4_e2m1fn_x2", None, per_element=2),
    "F6_E2M3": TorchDtype(),
    "F6_E3M2": TorchDtype(),
    "U8": TorchDtype("uint8", 1),
    "I8": TorchDtype("int8", 0),
    "F8_E5M2": TorchDtype("float8_e5m2", 12),
    "F8_E4M3": TorchDtype("float8_e4m3fn", 10),
    "F8_E8M0": TorchDtype("float8_e8m0fnu", 14),
    "F8_E4M3FNUZ": TorchDtype("float8_e4m3fnuz", 11),
    "F8_E5M2FNUZ": TorchDtype("float8_e5m2fnuz", 13),
    "I16": TorchDtype("int16", 0),
    "U16": TorchDtype("uint16", 1),
    "F16": TorchDtype("float16", 2),
    "BF16": TorchDtype("bfloat16", 4),
    "I32": TorchDtype("int32", 0),
    "U32": TorchDtype("uint32", 1),
    "F32": TorchDtype("float32", 2),
    "C64": TorchDtype("complex64", 5),
    "F64": TorchDtype("float64", 2),
    "I64": TorchDtype("int64", 0),
    "U64": TorchDtype("uint64", 1),
}

DTYPE_NAMES = engine.dtype_names() or tuple(TORCH)
"""Names of the dtypes; a dtype's number is its place."""

PACKED = frozenset(k for k, name in enumerate(DTYPE_NAMES) if TORCH[name].per_element > 1)
"""Dtypes, by number, of which one element of a torch tensor holds several numbers."""

_PACKED_BY_TORCH = {f"torch.{t.name}": t.per_element for t in TORCH.values() if t.per_element > 1}


def dtype_named(name: str) -> torch.dtype | None:
    """The torch dtype of a safetensors name such as ``BF16``; None where this torch has none."""
    import torch

    attribute = TORCH[name].name if name in TORCH else None
    return None if attribute is None else getattr(torch, attribute, None)


def header_of_one(k: int) -> tuple[bytes, int]:
    """Header of a file with one element of a dtype, as torch counts elements, and its bytes."""
    name = DTYPE_NAMES[k]
    per_element = TORCH[name].per_element
    nbytes = engine.dtype_bits(k) * per_element // 8
    described = f'"dtype":"{name}","shape":[{per_element}],"data_offsets":[0,{nbytes}]'
    return f'{{"x":{{{described}}}}}'.encode(), nbytes


def header_shape(shape: Sequence[int], dtype: torch.dtype) -> list[int]:
    """The shape of a torch tensor as a header has it, which counts numbers of packed dtypes."""
    found = list(shape)
    if found:
        found[-1] *= _PACKED_BY_TORCH.get(str(dtype), 1)
    return found
