"""DLPack to torch: how the installed torch imports each safetensors dtype, and batches of tensors.

The dtypes that torch's DLPack importer knows depend on its version, so each is tried once on a
one-element tensor. A dtype that it does not know is imported as bytes and viewed, as stock does for
every tensor.
"""

from __future__ import annotations

import functools
from array import array
from typing import TYPE_CHECKING, Any

from . import engine, stock
from .dtypes import DTYPE_NAMES, PACKED, TORCH, dtype_named, header_of_one
from .errors import Fallback, OptionError
from .layout import FileLayout, described
from .locks import shared

if TYPE_CHECKING:
    import torch

__all__ = [
    "by_stocks_recipe",
    "check",
    "dtype_wanted",
    "empty",
    "import_batch",
    "known_to_stock",
    "ordinary_mode",
    "raw_bytes",
    "shape_and_dtype",
    "whole_storage",
]

_F32 = DTYPE_NAMES.index("F32")

# Every supported version of safetensors loads these; for the others the installed one is asked.
_ALWAYS = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")


def _importer() -> tuple[int, int, object]:
    """Addresses for `engine.import_tensors`, and the object that keeps the second alive."""
    import ctypes

    import torch

    from_dlpack = torch._C._from_dlpack
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return 0, id(from_dlpack), from_dlpack
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = get_pointer(capsule, b"dlpack_exchange_api")
    version = ctypes.c_uint32.from_address(address).value if address else 0
    return (address if version == 1 else 0), id(from_dlpack), from_dlpack


class _Dtypes:
    """How the installed torch imports dtypes: each is tried when it first occurs.

    A trial takes milliseconds and opens files, so no lock is held in it. Threads that race, or a
    signal handler that interrupts a trial, make the same trial and get the same result.
    """

    def __init__(self) -> None:
        self._tried = self._loadable = 0
        self.by_bytes = 0
        self.table = engine.dl_table([engine.DlDtype()] * len(DTYPE_NAMES))
        self.torch: list[torch.dtype | None] = [dtype_named(name) for name in DTYPE_NAMES]
        exchange, callable_id, self._keep = _importer()
        self.importer = (exchange, callable_id)
        if exchange and self._try(_F32).as_bytes:  # the API does not work: use torch's callable
            self.importer = (0, callable_id)

    def all_loadable(self, used: int) -> bool:
        """Whether both this torch and stock take every dtype of a bit set."""
        if used & ~self._tried:
            self._try_all(used & ~self._tried)
        return not used & ~self._loadable

    def _try_all(self, kinds: int) -> None:
        for k, name in enumerate(DTYPE_NAMES):
            if not kinds >> k & 1:
                continue
            entry = self._try(k)
            good = entry.known and (name in _ALWAYS or stock.loads(*header_of_one(k)))
            if good:  # a thread that races writes the same
                engine.set_dl_dtype(self.table, k, entry)
            with shared:  # in this order: other threads read these without the lock
                self.by_bytes |= (good and entry.as_bytes) << k
                self._loadable |= good << k
                self._tried |= 1 << k

    def _try(self, k: int) -> engine.DlDtype:
        dtype = self.torch[k]
        if dtype is None:
            return engine.DlDtype()
        code = TORCH[DTYPE_NAMES[k]].code
        if code is not None:
            entry = engine.DlDtype(code, engine.dtype_bits(k), False, True)
            try:
                if self._import_one(k, entry).dtype == dtype:
                    return entry
            except Fallback:
                pass
        return engine.DlDtype(1, 8, True, True)

    def _import_one(self, k: int, entry: engine.DlDtype) -> torch.Tensor:
        _, nbytes = header_of_one(k)
        layout = described([("", k, (TORCH[DTYPE_NAMES[k]].per_element,), nbytes)])
        entries = [engine.DlDtype()] * len(DTYPE_NAMES)
        entries[k] = entry
        tensors = engine.import_tensors(
            engine.alloc_arena(64),
            layout,
            engine.dl_table(entries),
            self.importer,
            offsets=array("Q", [0]),
        )
        result: torch.Tensor = tensors[0]
        return result


_found: list[_Dtypes] = []  # at most one, for all threads


def _dtypes() -> _Dtypes:
    if not _found:
        made = _Dtypes()
        with shared:
            if not _found:
                _found.append(made)
    return _found[0]


@functools.cache
def known_to_stock(used: int) -> bool:
    """Whether the installed safetensors opens a file with every dtype of a bit set."""
    names = (name for k, name in enumerate(DTYPE_NAMES) if used >> k & 1)
    return all(
        stock.opens(f'{{"x":{{"dtype":"{name}","shape":[0],"data_offsets":[0,0]}}}}'.encode())
        for name in names
        if name not in _ALWAYS
    )


def dtype_wanted(dtype: object) -> torch.dtype | None:
    """The torch dtype that an argument names; None for "as in the file".

    Takes torch dtypes, their names, those of safetensors (``"BF16"``), and fastsafetensors'
    DType; ``None`` and ``"AUTO"`` mean as in the file.

    Raises:
        OptionError: it is none of these, or this torch lacks it.
    """
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = getattr(dtype, "value", dtype)
    if isinstance(name, str):
        if name.upper() == "AUTO":
            return None
        named = dtype_named(name.upper())
        if named is None:
            named = getattr(torch, name.removeprefix("torch."), None)
        if isinstance(named, torch.dtype):
            return named
    raise OptionError(
        f"dtype={dtype!r}: allowed are torch dtypes and their names, safetensors' names such as"
        " 'BF16', and None or 'AUTO' for the file's own"
    )


def check(layout: FileLayout, i: int | None = None) -> None:
    """Make sure that this torch can hold tensor i, or every tensor of a file.

    Raises:
        Fallback: it cannot, or stock refuses the tensor.
    """
    used = layout.dtypes if i is None else 1 << layout.dtype(i)
    if not _dtypes().all_loadable(used):
        raise Fallback("this torch or this safetensors lacks a dtype of the file")
    if layout.odd_f4 and (i is None or layout.dtype(i) in PACKED):
        raise Fallback("an F4 tensor has an odd last dimension")


def import_batch(
    arena: engine.Arena,
    layout: FileLayout,
    tensors: array[int] | None = None,
    offsets: array[int] | None = None,
) -> list[torch.Tensor]:
    """Make tensors over an arena, each with storage of exactly its own size.

    The tensors own the arena together: it lives as long as any of them, whatever else is
    closed or collected.

    Args:
        arena: holds their bytes.
        layout: describes them; they have passed `check`.
        tensors: their numbers; all when None.
        offsets: where each begins in the arena; at its file offset when None.

    Raises:
        Fallback: torch refused one.
    """
    dtypes = _dtypes()
    result: list[torch.Tensor] = engine.import_tensors(
        arena, layout, dtypes.table, dtypes.importer, tensors=tensors, offsets=offsets
    )
    if layout.dtypes & dtypes.by_bytes:
        for at, i in enumerate(range(len(result)) if tensors is None else tensors):
            if dtypes.by_bytes >> layout.dtype(i) & 1:
                shape, dtype = shape_and_dtype(layout, i)
                result[at] = result[at].view(dtype).reshape(shape)
    return result


def shape_and_dtype(
    layout: FileLayout, i: int, rows: int | None = None
) -> tuple[list[int], torch.dtype]:
    """Shape and dtype of tensor i in torch, or of some rows of its first dimension."""
    shape, kind = layout.shape(i), layout.dtype(i)
    if kind in PACKED:
        shape[-1] //= TORCH[DTYPE_NAMES[kind]].per_element
    if rows is not None:
        shape[0] = rows
    dtype = _dtypes().torch[kind]
    assert dtype is not None  # checked before
    return shape, dtype


def empty(layout: FileLayout, i: int, rows: int | None = None) -> torch.Tensor:
    """An allocation of torch's own for tensor i, or for some rows of its first dimension.

    Raises:
        MemoryError: torch got no memory.
    """
    import torch

    shape, dtype = shape_and_dtype(layout, i, rows)
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        raise MemoryError(str(error)) from error


def whole_storage(arena: engine.Arena) -> torch.UntypedStorage:
    """All of an arena as one torch storage, which keeps it alive."""
    dtypes = _dtypes()
    kind = DTYPE_NAMES.index("U8")
    dtypes.all_loadable(1 << kind)
    layout = described([("", kind, (arena.nbytes,), arena.nbytes)])
    (tensor,) = engine.import_tensors(
        arena, layout, dtypes.table, dtypes.importer, offsets=array("Q", [0])
    )
    storage: torch.UntypedStorage = tensor.untyped_storage()
    return storage


@functools.cache
def _stock_names_the_device() -> bool:
    """Whether stock says ``device="cpu"`` where it makes a tensor: a default device tells."""
    import torch

    with stock.small_file(*header_of_one(_F32)) as file, torch.device("meta"):
        with stock.safe_open(file.name, "pt") as opened:
            return str(opened.get_tensor("x").device) == "cpu"


def by_stocks_recipe(
    storage: torch.UntypedStorage, layout: FileLayout, i: int, for_slice: bool
) -> torch.Tensor:
    """Tensor i made of a whole file's storage by the torch calls that stock makes.

    Args:
        storage: of the file's map.
        layout: of the file.
        i: number of the tensor.
        for_slice: as for ``get_slice()[...]``, where stock leaves the device open.
    """
    import torch

    begin, end = layout.extent(i)
    shape, dtype = shape_and_dtype(layout, i)
    device: dict[str, Any] = {}
    if not for_slice and _stock_names_the_device():
        device["device"] = "cpu"
    raw = torch.asarray(storage[begin:end], dtype=torch.uint8, **device)
    result: torch.Tensor = raw.view(dtype=dtype).reshape(shape)
    return result


def raw_bytes(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in one dimension: a view of it if its elements are adjacent."""
    import torch

    flat = t.reshape(-1)
    if not flat.is_contiguous() or flat.stride(0) != 1:  # of one element any stride is contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def ordinary_mode() -> bool:
    """Whether tensors made now are plain: no torch mode or default device changes them."""
    import torch

    c = torch._C
    return (
        c._len_torch_function_stack() == 0
        and c._len_torch_dispatch_stack() == 0
        and not torch.is_inference_mode_enabled()
    )
