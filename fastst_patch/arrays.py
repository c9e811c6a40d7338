"""NumPy arrays over an arena, and what other libraries make of them.

==================  ============================================================================
framework           result
==================  ============================================================================
np, numpy           the array itself
jax, flax           ``jax.device_put`` of it; stock calls ``jax.numpy.array``, which copies
tf, tensorflow      ``tensorflow.experimental.dlpack`` of it where it may lie where it is, else
                    ``tensorflow.convert_to_tensor``, as in stock
mlx                 ``mlx.core.array`` of it, as in stock
==================  ============================================================================

Stock calls the functions with a copy of a tensor's bytes. JAX and TensorFlow take memory as it is
where it is aligned to 64 bytes. Paddle is not here: it maps the file by itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from array import array
from collections.abc import Callable, Sequence
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
    "FRAMEWORKS",
    "KNOWN_DTYPES",
    "ArrayMaker",
    "address_of",
    "check",
    "copy",
    "empty",
    "maker_for",
    "memory_of",
    "over",
    "own_memory",
    "plain_index",
    "same",
    "strays",
]


class _Library(NamedTuple):
    """How a library makes its own tensors of arrays.

    Attributes:
        imported: module that stock imports first, if it is there: it may bring dtypes to NumPy.
        module: of the library.
        make: given the module, makes tensors of arrays, whose memory they may keep.
        aligned: whether they keep memory that is aligned to `ALIGNMENT`.
    """

    imported: str
    module: str
    make: Callable[[Any, list[Array]], list[Any]]
    aligned: bool


def _in_jax(jax: Any, arrays: list[Array]) -> list[Any]:
    made: list[Any] = jax.device_put(arrays)
    return made


def _in_tensorflow(tf: Any, arrays: list[Array]) -> list[Any]:
    # Where there is another device, TensorFlow chooses one; in a graph there are no tensors yet.
    stays = tf.executing_eagerly() and len(tf.config.list_logical_devices()) == 1
    return [_lent(tf, one) if stays else tf.convert_to_tensor(one) for one in arrays]


def _lent(tf: Any, one: Array) -> Any:
    """A TensorFlow tensor over an array, if it is aligned as TensorFlow's kernels expect it."""
    if one.size and address_of(one) % ALIGNMENT == 0:
        with contextlib.suppress(BufferError):  # DLPack of NumPy has no such dtype
            return tf.experimental.dlpack.from_dlpack(one.__dlpack__())
    return tf.convert_to_tensor(one)


def _in_mlx(mlx: Any, arrays: list[Array]) -> list[Any]:
    return [mlx.core.array(one) for one in arrays]


_JAX = _Library("flax", "jax", _in_jax, True)
_TENSORFLOW = _Library("tensorflow", "tensorflow", _in_tensorflow, True)
_LIBRARIES = {
    "np": None,
    "numpy": None,
    "jax": _JAX,
    "flax": _JAX,
    "tf": _TENSORFLOW,
    "tensorflow": _TENSORFLOW,
    "mlx": _Library("mlx", "mlx", _in_mlx, False),
}

FRAMEWORKS = frozenset(_LIBRARIES)
"""Names of the frameworks whose tensors are made of arrays."""


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
            return self.library.make(importlib.import_module(self.library.module), arrays)
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
    if i is not None:
        _dtype(layout.dtype(i))
        return
    for k in range(layout.dtypes.bit_length()):
        if layout.dtypes >> k & 1:
            _dtype(k)


KNOWN_DTYPES: dict[int, np.dtype[Any]] = {}
"""The NumPy dtypes that were needed so far, by their numbers in ``enum fst_dtype``."""

_TABLE = engine.np_table()  # the same for the engine


def _dtype(k: int) -> np.dtype[Any]:
    """The NumPy dtype that stock gives for number k of ``enum fst_dtype``."""
    found = KNOWN_DTYPES.get(k)
    if found is None:  # a failure is not kept: a library that is imported later may bring the dtype
        try:
            found = stock.loaded(*header_of_one(k), "np").dtype
        except Exception as error:  # the user's own call to stock raises it again
            raise Fallback(f"{DTYPE_NAMES[k]} is no dtype of NumPy here") from error
        engine.set_np_dtype(_TABLE, k, found)
        KNOWN_DTYPES[k] = found
    return found


# ---- arrays ----

ALIGNMENT = 64
"""Bytes. XLA and TensorFlow take memory as it is from this on."""


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


def memory_of(arena: engine.Arena) -> memoryview:
    """An arena's bytes, which keep it alive."""
    import numpy as np

    found: Any = np.asarray(_Memory(arena))
    return memoryview(found)


def over(
    memory: memoryview,
    layout: FileLayout,
    numbers: array[int] | None = None,
    offsets: array[int] | None = None,
) -> list[Array]:
    """Make arrays over memory, which lives as long as any of them.

    Arrays are aligned, as stock's are: one that is not is copied. Each has a base of its own size,
    as stock's has, by which some tell whether it is a small part of something large.

    Args:
        memory: holds their bytes.
        layout: describes them; they have passed `check`.
        numbers: of the tensors; all when None.
        offsets: where each begins in the memory; by its place in the file when None.

    Raises:
        Fallback: NumPy refused one.
    """
    from numpy import frombuffer

    made, left = engine.make_arrays(
        memory, layout, _TABLE, frombuffer, tensors=numbers, offsets=offsets
    )
    if not left:
        return made
    for at, (begin, nbytes, kind, shape) in enumerate(layout.entries(numbers)):
        if not nbytes:
            made[at] = _nothing(shape, KNOWN_DTYPES[kind])
        elif made[at] is None:
            offset = begin if offsets is None else offsets[at]
            raw = bytearray(memory[offset : offset + nbytes])
            made[at] = frombuffer(raw, KNOWN_DTYPES[kind]).reshape(shape)
    return made


def copy(
    memory: memoryview, entry: tuple[int, int, int, Sequence[int]], index: tuple[Any, ...]
) -> Array:
    """A copy of what a plain index finds in an array.

    Args:
        memory: the file's bytes.
        entry: of the array, as a layout has it.
        index: as `plain_index` gives it.
    """
    begin, nbytes, kind, shape = entry
    dtype = KNOWN_DTYPES[kind]
    if not nbytes:
        return own_memory(_nothing(shape, dtype)[index])
    ndarray: type[Array] = type(memory.obj)  # type: ignore[assignment]  # saves an import, 0.4 us
    return own_memory(ndarray(shape, dtype, memory, begin)[index])


def own_memory(found: Array) -> Array:
    """A contiguous copy, which does not own its data: neither do stock's arrays."""
    if not found.size:
        return _nothing(found.shape, found.dtype)
    flat = found.ravel()
    if flat.base is not None:  # so it is no copy yet; `flatten` takes 0.12 us more
        flat = flat.copy()
    copied: Array = flat.reshape(found.shape)
    return copied


def _nothing(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """An array without elements, with the strides of stock's.

    Raises:
        Fallback: NumPy makes none of this shape; of a slice of it, it may.
    """
    import numpy as np

    try:
        return np.zeros(shape, dtype).reshape(shape)
    except ValueError as error:  # [2**63 - 1, 0] of float32
        raise Fallback(f"NumPy refuses the shape: {error}") from None


def empty(layout: FileLayout, i: int, rows: int | None = None) -> Array:
    """An allocation for tensor i, or for some rows of its first dimension.

    It is aligned for libraries that take memory as it is, and does not own its data.
    """
    import numpy as np

    dtype, shape = _dtype(layout.dtype(i)), layout.shape(i)
    if rows is not None:
        shape[0] = rows
    count = math.prod(shape)
    if not count:
        return _nothing(shape, dtype)
    raw: Any = np.empty(count * dtype.itemsize + ALIGNMENT, np.uint8)
    flat = np.frombuffer(memoryview(raw), dtype, count, -address_of(raw) % ALIGNMENT)
    return flat.reshape(shape)


def strays(layout: FileLayout) -> int:
    """Bytes of tensors that do not begin at a multiple of `ALIGNMENT` in the file."""
    return sum(nbytes for begin, nbytes, _, _ in layout.entries() if begin % ALIGNMENT)


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
    if type(index) is slice and shape:  # the usual one, in half of the time
        return (index, ...) if _is_plain(index, shape[0]) else None
    parts = index if type(index) is tuple else (index,)
    if EllipsisType in map(type, parts):
        at = [type(part) for part in parts].index(EllipsisType)
        left = (slice(None),) * (len(shape) - len(parts) + 1)
        parts = (*parts[:at], *left, *parts[at + 1 :])  # a second one is not plain
    if len(parts) > len(shape):
        return None
    for part, size in zip(parts, shape, strict=False):
        if not _is_plain(part, size):
            return None
    return (*parts, ...)


def _is_plain(part: object, size: int) -> bool:
    if type(part) is int:
        return 0 <= part < size
    if type(part) is not slice:
        return False
    start, stop, step = part.start, part.stop, part.step
    if step is not None and not (type(step) is int and step == 1):
        return False
    start, stop = 0 if start is None else start, size if stop is None else stop
    return type(start) is int and type(stop) is int and 0 <= start < stop <= size


def same(ours: Any, theirs: Any) -> bool:
    """Whether two tensors of a library, or arrays, have the same type, dtype, shape and bytes."""
    import numpy as np

    if type(ours) is not type(theirs) or ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    # TensorFlow gives no array, but a number, for a tensor of no dimension.
    pair = [one.numpy() if hasattr(one, "numpy") else one for one in (ours, theirs)]
    left, right = (np.asarray(one).tobytes() for one in pair)
    return left == right
