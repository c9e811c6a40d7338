"""NumPy arrays over an arena, and what other libraries make of them.

==================  ============================================================================
framework           result
==================  ============================================================================
np, numpy           the array itself
jax, flax           ``jax.numpy.array`` of it
tf, tensorflow      ``tensorflow.convert_to_tensor`` of it
mlx                 ``mlx.core.array`` of it
==================  ============================================================================

Stock calls the same functions, with a copy of a tensor's bytes. Paddle is not here: it maps the
file by itself.
"""

from __future__ import annotations

import functools
import importlib
import operator
from array import array
from collections.abc import Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

from . import engine, stock
from .dtypes import DTYPE_NAMES, header_of_one
from .errors import Fallback
from .layout import FileLayout

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = [
    "ArrayMaker",
    "address_of",
    "check",
    "copy",
    "empty",
    "import_batch",
    "maker_for",
    "plain_index",
    "same",
]


class _Library(NamedTuple):
    """How a library makes its own tensor of an array.

    Attributes:
        imported: module that stock imports first, if it is there: it may bring dtypes to NumPy.
        module: of the function.
        function: takes an array.
    """

    imported: str
    module: str
    function: str


_JAX = _Library("flax", "jax", "numpy.array")
_TENSORFLOW = _Library("tensorflow", "tensorflow", "convert_to_tensor")
_LIBRARIES = {
    "np": None,
    "numpy": None,
    "jax": _JAX,
    "flax": _JAX,
    "tf": _TENSORFLOW,
    "tensorflow": _TENSORFLOW,
    "mlx": _Library("mlx", "mlx", "core.array"),
}


class ArrayMaker(NamedTuple):
    """What becomes of arrays for one framework.

    Attributes:
        framework: as the caller names it.
        library: None: arrays are handed out.
    """

    framework: str
    library: _Library | None

    def prepare(self) -> None:
        """Import what brings dtypes to NumPy, as stock does before it looks for them."""
        if self.library is not None:
            _imported(self.library.imported)

    def finished(self, arrays: list[Array]) -> list[Any]:
        """What is handed out for arrays that nobody else has.

        Raises:
            Fallback: the library refused one, or cannot be imported.
        """
        if self.library is None:
            return arrays
        try:
            module = importlib.import_module(self.library.module)
            make = operator.attrgetter(self.library.function)(module)
            return [make(one) for one in arrays]
        except Exception as error:  # stock's own call raises it again
            raise Fallback(f"{self.library.module} refused: {error}") from error


@functools.cache
def _imported(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # stock goes on without it, too
        return False
    return True


def maker_for(framework: object) -> ArrayMaker | None:
    """The maker for a framework's name; None for frameworks whose tensors are not made of arrays.

    Raises:
        Fallback: the installed safetensors does not know the framework, or there is no NumPy.
    """
    if not isinstance(framework, str) or framework not in _LIBRARIES:
        return None
    if not _is_known(framework):
        raise Fallback(f"framework {framework!r} is not known to this safetensors, or has no NumPy")
    return ArrayMaker(framework, _LIBRARIES[framework])


@functools.cache
def _is_known(framework: str) -> bool:
    return stock.opens(b"{}      ", framework)


# ---- dtypes ----


def check(layout: FileLayout, i: int | None = None) -> None:
    """Make sure that NumPy can hold tensor i, or every tensor of a file.

    Raises:
        Fallback: it cannot, or stock refuses the tensor.
    """
    used = layout.dtypes if i is None else 1 << layout.dtype(i)
    for k in range(used.bit_length()):
        if used >> k & 1:
            _dtype(k)


@functools.cache  # a failure is not kept: a library that is imported later may bring the dtype
def _dtype(k: int) -> np.dtype[Any]:
    """The NumPy dtype that stock gives for number k of ``enum fst_dtype``."""
    try:
        found: np.dtype[Any] = stock.loaded(*header_of_one(k), "np").dtype
    except Exception as error:  # the user's own call to stock raises it again
        raise Fallback(f"{DTYPE_NAMES[k]} is no dtype of NumPy here") from error
    return found


# ---- arrays ----


class _Memory:
    """An arena as NumPy takes memory: it lives as long as an array over it."""

    def __init__(self, arena: engine.Arena) -> None:
        self._arena = arena
        self.__array_interface__ = {
            "version": 3,
            "shape": (arena.nbytes,),
            "typestr": "|u1",
            "data": (arena.address, False),
        }


def import_batch(
    arena: engine.Arena,
    layout: FileLayout,
    tensors: array[int] | None = None,
    offsets: array[int] | None = None,
) -> list[Array]:
    """Make arrays over an arena, which lives as long as any of them.

    Arrays are aligned, as stock's are: one that is not is copied.

    Args:
        arena: holds their bytes.
        layout: describes them; they have passed `check`.
        tensors: their numbers; all when None.
        offsets: where each begins in the arena; at its file offset when None.
    """
    import numpy as np

    memory = np.asarray(_Memory(arena))
    made: list[Array] = []
    for at, i in enumerate(range(len(layout.names)) if tensors is None else tensors):
        dtype, shape = _dtype(layout.dtype(i)), layout.shape(i)
        offset = layout.extent(i)[0] if offsets is None else offsets[at]
        if layout.nbytes(i) == 0:
            one = _nothing(shape, dtype)
        elif offset % dtype.alignment:
            raw = memory[offset : offset + layout.nbytes(i)].copy()
            one = raw.view(dtype).reshape(shape)
        else:
            one = np.ndarray(shape, dtype, memory, offset)
        made.append(one)
    return made


def _nothing(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """An array without elements, with the strides of stock's."""
    import numpy as np

    return np.zeros(shape, dtype).reshape(shape)


def copy(found: Array) -> Array:
    """A contiguous copy, which does not own its data: neither do stock's arrays."""
    if not found.size:
        return _nothing(found.shape, found.dtype)
    copied: Array = found.copy().reshape(found.shape)
    return copied


def empty(layout: FileLayout, i: int, rows: int | None = None) -> Array:
    """An allocation of NumPy's own for tensor i, or for some rows of its first dimension."""
    import numpy as np

    shape = layout.shape(i)
    if rows is not None:
        shape[0] = rows
    return np.empty(shape, _dtype(layout.dtype(i))).reshape(shape)  # stock's do not own their data


def address_of(one: Array) -> int:
    """Where an array's first byte lies."""
    found: int = one.__array_interface__["data"][0]
    return found


def plain_index(index: object, shape: Sequence[int]) -> tuple[Any, ...] | None:
    """An index for which stock's slice of an array certainly gives what NumPy gives.

    Returns:
        The same index for NumPy, which then returns an array, of no dimension too; None: stock
        must judge it. Stock has rules of its own for steps, negative numbers and empty ranges.
    """
    parts = index if type(index) is tuple else (index,)
    dots = [at for at, part in enumerate(parts) if type(part) is EllipsisType]
    if len(dots) > 1:
        return None
    if dots:
        left = (slice(None),) * (len(shape) - len(parts) + 1)
        parts = (*parts[: dots[0]], *left, *parts[dots[0] + 1 :])
    if len(parts) > len(shape) or not all(map(_is_plain, parts, shape)):
        return None
    return (*parts, ...)


def _is_plain(part: object, size: int) -> bool:
    if type(part) is int:
        return 0 <= part < size
    if type(part) is not slice:
        return False
    start, stop, step = part.start, part.stop, part.step
    if any(one is not None and type(one) is not int for one in (start, stop, step)):
        return False
    return step in (None, 1) and 0 <= (start or 0) < (size if stop is None else stop) <= size


def same(ours: Any, theirs: Any) -> bool:
    """Whether two tensors of a library, or arrays, have the same type, dtype, shape and bytes."""
    import numpy as np

    if type(ours) is not type(theirs) or ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    left, right = (np.asarray(one).tobytes() for one in (ours, theirs))
    return left == right
