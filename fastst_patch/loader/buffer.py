"""`FilesBufferOnDevice`, which ``copy_files_to_device`` returns: it hands out tensors by name."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from ..tensors import dtype_wanted
from .arguments import Settings
from .compat_tensor import WrappedTensor, moved
from .metadata import SafeTensorsMetadata
from .tensor_factory import LazyTensorFactory

if TYPE_CHECKING:
    import torch

__all__ = ["Files", "FilesBufferOnDevice"]


class Files(Protocol):
    """The files that a buffer takes tensors from: `LocalFiles`, or a group's `ShardedFiles`.

    `ShardedFiles` casts floating tensors only.
    """

    def take(self, name: str, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
        """This rank's shard along a dimension; the whole tensor for -1."""

    def push(
        self, name: str, dst_rank: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor | None:
        """The whole tensor on one rank, None on the others."""

    def refuse(self, name: str, error: Exception) -> NoReturn:
        """Raise an error of arguments, in a group also on the ranks that wait for this one."""

    def close(self) -> None:
        """Let go of the files and of tensors that were not handed out."""


class FilesBufferOnDevice:
    """Tensors of files, read ahead in the background and handed out by name.

    Made by `SafeTensorsFileLoader.copy_files_to_device`. A request for a tensor waits for the
    tensor's own bytes only. Tensors own their memory and stay valid after `close`, which frees
    those that were not handed out. In a group, all ranks call the same methods in the same order,
    as with fastsafetensors. In one process, a buffer that is never closed is freed with its last
    reference.

    A name may be requested twice. On the CPU both tensors share memory, because they are views of
    one private map. On a device the second is read again, unless ``disable_cache=False``.

    Attributes:
        key_to_rank_lidx: for each name, the rank of its file, and the file's number among that
            rank's files.
        pg: the process group; a `SingleGroup` for a process on its own.
        device: of the tensors.
    """

    def __init__(
        self,
        files: Files,
        headers: Sequence[tuple[SafeTensorsMetadata, int]],
        names: Mapping[str, SafeTensorsMetadata],
        settings: Settings,
        *,
        pg: Any,
        dtype: torch.dtype | None,
        cached: bool,
    ) -> None:
        """Tensors of files.

        Args:
            files: the files.
            headers: of each file, and its rank.
            names: of the tensors that may be requested, with the header of the file.
            settings: of the loader.
            pg: as the attribute.
            dtype: to convert tensors to.
            cached: whether to keep tensors, and hand out copies.
        """
        self._files: Files | None = files
        self._headers: dict[int, list[SafeTensorsMetadata]] = {}
        numbers: dict[str, tuple[int, int]] = {}
        for header, rank in headers:
            some = self._headers.setdefault(rank, [])
            numbers[header.src] = rank, len(some)
            some.append(header)
        self.key_to_rank_lidx = {name: numbers[header.src] for name, header in names.items()}
        self.pg = pg
        self.device = settings.device
        self._hand_out = settings.hand_out
        self._size: int = pg.size()
        self._dtype = dtype
        self._cache: dict[tuple[str, int], torch.Tensor] | None = {} if cached else None

    # ---- names and shapes ----

    def get_filename(self, tensor_name: str) -> str:
        """Path, as it was given, of the file with a tensor. Raises ValueError if no file has it."""
        return self._header(tensor_name).src

    def get_shape(self, tensor_name: str) -> list[int]:
        """Shape of a tensor, as in the header. Raises ValueError if no file has it."""
        return self._header(tensor_name).shape(tensor_name)

    @property
    def rank_loaders(self) -> dict[int, list[LazyTensorFactory]]:
        """By rank, its files, in the order of their numbers; empty after `close`."""
        if self._files is None:
            return {}
        return {
            rank: [
                LazyTensorFactory.of_buffer(self, header, rank, lidx)
                for lidx, header in enumerate(self._headers.get(rank, ()))
            ]
            for rank in range(self._size)
        }

    # ---- tensors ----

    def get_tensor(
        self, tensor_name: str, device: object = None, dtype: object = None
    ) -> torch.Tensor:
        """A whole tensor; in a group, on every rank.

        Args:
            tensor_name: its name.
            device: to move it to after loading; None: the loader's device.
            dtype: to convert it to, on the loader's device; None: the loader's dtype.

        Raises:
            ValueError: there is no such tensor, or the buffer is closed.
            OSError, MemoryError, SafetensorError: it could not be read; the message names file,
                tensor and cause.
        """
        return self.get_sharded(tensor_name, -1, device, dtype)

    def get_sharded(
        self, tensor_name: str, dim: int, device: object = None, dtype: object = None
    ) -> torch.Tensor:
        """This rank's shard of a tensor, split as `torch.chunk` splits; all of it for ``dim`` -1.

        A process without a group gets the whole tensor for any ``dim``, as from fastsafetensors.

        Raises as `get_tensor`, and in a group IndexError when the tensor has no such dimension.
        """
        result: torch.Tensor = self._hand_out(self._shard(tensor_name, dim, device, dtype))
        return result

    def _shard(self, tensor_name: str, dim: int, device: object, dtype: object) -> torch.Tensor:
        files = self._open()
        with self._refusing(tensor_name):
            header = self._header(tensor_name)
            wanted = dtype_wanted(dtype)
            _check_dim(dim)
            if self._size > 1 and dim != -1:
                shape = header.shape(tensor_name)
                if not 0 <= dim < len(shape):
                    raise IndexError(
                        f"tensor {tensor_name!r} of shape {shape} has no dimension {dim} to shard"
                    )
        if self._cache is None:
            wanted = wanted or self._dtype
            result = files.take(tensor_name, dim, wanted)
            if device is None and (wanted is None or wanted == result.dtype):
                return result
            return moved(result, device, wanted)
        kept = self._cache.get((tensor_name, dim))
        if kept is None:
            kept = moved(files.take(tensor_name, dim, self._dtype), None, self._dtype)
            self._cache[tensor_name, dim] = kept
        return moved(kept.clone(), device, wanted)

    def get_tensor_wrapped(
        self, tensor_name: str, device: object = None, dtype: object = None
    ) -> WrappedTensor:
        """`get_tensor` in fastsafetensors' wrapper."""
        return WrappedTensor(self.get_tensor(tensor_name, device, dtype))

    def get_sharded_wrapped(
        self, tensor_name: str, dim: int, device: object = None, dtype: object = None
    ) -> WrappedTensor:
        """`get_sharded` in fastsafetensors' wrapper."""
        return WrappedTensor(self.get_sharded(tensor_name, dim, device, dtype))

    def get_multi_cols(
        self, tensor_names: list[str], dim: int, device: object = None, dtype: object = None
    ) -> WrappedTensor:
        """This rank's shards of several tensors, concatenated along a dimension.

        They are in the order of ``tensor_names``, also when they are in several files.

        Raises as `get_sharded`, and ValueError when their other dimensions or dtypes differ.
        """
        names = list(tensor_names)
        with self._refusing(names[0] if names else ""):
            if not names:
                raise ValueError("get_multi_cols: no names given")
            _check_dim(dim)
            shapes = {}
            for name in names:
                shapes[name] = self._header(name).shape(name)
            along = _same_but_along(shapes, dim)
            wanted = dtype_wanted(dtype)
        shards = [self._shard(name, along, None, wanted) for name in names]
        if len({shard.dtype for shard in shards}) > 1:
            found = ", ".join(f"{n!r} {s.dtype}" for n, s in zip(names, shards, strict=True))
            raise ValueError(f"get_multi_cols: the dtypes differ: {found}; give one with dtype=")
        return WrappedTensor(self._hand_out(moved(_concatenated(shards, along), device, None)))

    def push_tensor(
        self, tensor_name: str, dst_rank: int, device: object = None, dtype: object = None
    ) -> torch.Tensor | None:
        """A whole tensor on rank ``dst_rank``; None on the others. Raises as `get_tensor`."""
        files = self._open()
        with self._refusing(tensor_name):
            self._header(tensor_name)
            if isinstance(dst_rank, bool) or not isinstance(dst_rank, int):
                raise TypeError(f"push_tensor: dst_rank={dst_rank!r} is not an integer")
            if not 0 <= dst_rank < self._size:
                raise ValueError(
                    f"push_tensor: rank {dst_rank} is not in the group, whose size is {self._size}"
                )
            wanted = dtype_wanted(dtype) or self._dtype
        result = files.push(tensor_name, dst_rank, wanted)
        return None if result is None else self._hand_out(moved(result, device, wanted))

    def as_dict(self, tensor_shard_dim: Mapping[str, int]) -> dict[str, WrappedTensor]:
        """`get_sharded_wrapped` of each name along its dimension."""
        return {name: self.get_sharded_wrapped(name, dim) for name, dim in tensor_shard_dim.items()}

    def iter_local_tensors(self, tensor_names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole tensors. RuntimeError in a group larger than one."""
        if self._size != 1:
            raise RuntimeError("iter_local_tensors requires a single-process group")
        for name in tensor_names:
            yield name, self.get_tensor(name)

    # ---- closing ----

    def close(self) -> None:
        """Free tensors that were not handed out. The others stay valid. May be repeated."""
        files, self._files = self._files, None
        self._cache = None if self._cache is None else {}
        if files is not None:
            files.close()

    def __enter__(self) -> FilesBufferOnDevice:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self, _at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        # Closing in a group may be collective, so only a single process closes by itself.
        if not _at_exit() and getattr(self, "_size", 0) == 1:
            self.close()

    def _open(self) -> Files:
        if self._files is None:
            raise ValueError("the buffer is closed: take tensors before close()")
        return self._files

    def _header(self, name: str) -> SafeTensorsMetadata:
        """Of the file with a tensor. Raises ValueError if no file has it."""
        self._open()
        if name not in self.key_to_rank_lidx:
            raise ValueError(unknown_key(name, self.key_to_rank_lidx))
        rank, lidx = self.key_to_rank_lidx[name]
        return self._headers[rank][lidx]

    @contextlib.contextmanager
    def _refusing(self, name: str) -> Iterator[None]:
        """Raise an error of arguments in the block also on ranks that wait for this one."""
        try:
            yield
        except Exception as error:
            self._open().refuse(name, error)


def unknown_key(name: object, known: Mapping[str, Any]) -> str:
    """Text of the error for a name that no file has, with the most similar known name."""
    text = f"key {name} was not found in files"
    if isinstance(name, str):
        near = difflib.get_close_matches(name, list(known)[:10_000], 1)
        if near:
            text += f"; did you mean {near[0]!r}?"
    return text


def _check_dim(dim: object) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim={dim!r} is not an integer")


def _same_but_along(shapes: Mapping[str, list[int]], dim: int) -> int:
    """The dimension, counted from the front; raises where the tensors differ in another one."""
    first, *rest = shapes
    ndim = len(shapes[first])
    along = dim + ndim if dim < 0 else dim
    if not 0 <= along < ndim:
        raise IndexError(f"tensor {first!r} of shape {shapes[first]} has no dimension {dim}")
    for name in rest:
        ours, theirs = list(shapes[first]), list(shapes[name])
        if len(theirs) == ndim:
            ours[along] = theirs[along]
        if ours != theirs:
            raise ValueError(
                f"get_multi_cols: {name!r} of shape {shapes[name]} does not fit"
                f" {first!r} of shape {shapes[first]} along dimension {along}"
            )
    return along


def _concatenated(shards: list[torch.Tensor], dim: int) -> torch.Tensor:
    import torch

    if len(shards) == 1:
        return shards[0]
    dtype = shards[0].dtype
    if dtype.itemsize == 1 and dtype.is_floating_point:  # torch.cat takes few of these
        raw = torch.cat([shard.view(torch.uint8) for shard in shards], dim=dim)
        return raw.view(dtype)
    return torch.cat(shards, dim=dim)
