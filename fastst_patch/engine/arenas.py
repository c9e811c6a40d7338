"""Memory that tensors lie in: a file's map, memory of the engine, or memory of another owner."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from ._lib import ffi, lib, place_for, raise_
from .files import File


def segments_of(flat: array[int]) -> tuple[Any, int]:
    """Flat 64-bit triples as the native engine takes them, and how many they are."""
    if not len(flat):
        return ffi.NULL, 0
    return ffi.from_buffer("fst_segment[]", flat), len(flat) // 3


class Arena:
    """Memory that tensors lie in; the tensors keep it alive after this object is gone.

    Attributes:
        nbytes: its size.
        keep: the owner of borrowed memory, or the owner's object for adopted memory.
    """

    __slots__ = ("_at", "handle", "keep", "nbytes")

    def __init__(self, at: Any) -> None:
        self.keep: object = None
        self._at = at
        self.handle = at[0]
        self.nbytes: int = lib.fst_arena_bytes(self.handle)

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(ffi.cast("uintptr_t", lib.fst_arena_data(self.handle)))

    @classmethod
    def over(cls, spans: Sequence[tuple[int, int]], owner: object) -> tuple[Arena, int]:
        """Memory of another owner as one arena, from the lowest byte to the highest.

        Args:
            spans: address and bytes of each block.
            owner: of the memory, kept as long as the arena or a job on it.

        Returns:
            The arena, and the address at which it begins.
        """
        if not spans:
            return borrow_arena(0, 0, owner), 0
        base = min([address for address, _ in spans])
        top = max([address + nbytes for address, nbytes in spans])
        return borrow_arena(base, top - base, owner), base

    def keep_to(self, wanted: array[int]) -> None:
        """Keep faults of a map from reading the bytes behind extents; advice only.

        Args:
            wanted: all extents that any process of the load uses: flat 64-bit triples (file
                offset, bytes, ignored), by file offset.
        """
        lib.fst_arena_keep_to(self.handle, *segments_of(wanted))


def _arena(create: Callable[[Any, Any], int], filename: str | None = None) -> Arena:
    out, err = place_for("arena"), ffi.new("fst_error *")
    if create(out, err):
        raise_(err, filename)
    return Arena(out)


def map_arena(file: File) -> Arena:
    """Map a whole file privately: writes to it never reach the file.

    Raises:
        MemoryError, OSError: the map was refused.
    """
    return _arena(lambda out, err: lib.fst_arena_map(file.handle, out, err), file.path)


def alloc_arena(nbytes: int) -> Arena:
    """Anonymous memory, in huge pages where the system allows them.

    Raises:
        MemoryError: it was refused.
    """
    return _arena(lambda out, err: lib.fst_arena_alloc(nbytes, out, err))


def borrow_arena(address: int, nbytes: int, owner: object) -> Arena:
    """Memory that belongs to ``owner``, which is kept as long as the arena or a job on it."""
    base = ffi.cast("void *", address)
    arena = _arena(lambda out, err: lib.fst_arena_borrow(base, nbytes, out, err))
    arena.keep = owner
    return arena


def adopt_arena(owner: object) -> Arena:
    """Memory on any device, which its owner's own deleter frees after its last user.

    Args:
        owner: a ``dltensor`` capsule of bytes, which is used up; or the address of a
            ``DLManagedTensor``.
    """
    if isinstance(owner, int):
        return _arena(lambda out, err: lib.fst_arena_adopt(owner, out, err))
    return _arena(lambda out, err: lib.fst_arena_adopt_capsule(id(owner), out, err))
