"""`LazyTensorFactory`: the tensors of one file, made when they are requested."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from .arguments import boolean, group_size
from .compat_tensor import WrappedTensor
from .metadata import DType, SafeTensorsMetadata

if TYPE_CHECKING:
    from .buffer import FilesBufferOnDevice

__all__ = ["LazyTensorFactory"]


class LazyTensorFactory:
    """The tensors of one file. `FilesBufferOnDevice.rank_loaders` has one of each of its files.

    Args:
        metadata: of the file.
        device: where tensors go.
        rank: that the file was named for.
        local_rank: whether this is that rank; if not, ``tensors`` is empty.
        factory_idx_bits: has no effect: messages between ranks need no tags.
        lidx: number of the file.
        copier: None: the engine reads the file.
        framework: as of `SafeTensorsFileLoader`.
        disable_cache: as of `SafeTensorsFileLoader`.

    Raises:
        OptionError: there is a copier.
    """

    _of_buffer = False

    def __init__(  # noqa: PLR0917 - the order is fastsafetensors'
        self,
        metadata: SafeTensorsMetadata,
        device: Any,
        rank: int,
        local_rank: bool,
        factory_idx_bits: int,
        lidx: int,
        copier: None,
        framework: Any,
        disable_cache: bool = True,
    ) -> None:
        if copier is not None:
            raise OptionError(f"copier={copier!r}: allowed is None: the engine reads the file")
        self.metadata = metadata
        self.device = device
        self.rank = rank
        self.lidx = lidx
        self.framework = framework
        self.disable_cache = boolean("disable_cache", disable_cache)
        self._local = boolean("local_rank", local_rank)
        self._dtype: Any = DType.AUTO
        self._buffer: FilesBufferOnDevice | None = None

    @classmethod
    def of_buffer(
        cls, buffer: FilesBufferOnDevice, metadata: SafeTensorsMetadata, rank: int, lidx: int
    ) -> LazyTensorFactory:
        """Of one of a buffer's files."""
        local = buffer.pg.size() == 1 or buffer.pg.rank() == rank
        made = cls(metadata, buffer.device, rank, local, 0, lidx, None, metadata.framework)
        made._buffer, made._of_buffer = buffer, True
        return made

    # ---- reading ----

    def submit_io(
        self, use_buf_register: bool, max_copy_block_size: int, allow_inflight: bool = False
    ) -> None:
        """Start reading the file. Arguments as of `SafeTensorsFileLoader.copy_files_to_device`."""
        if not self._local or self._buffer is not None:
            return
        from .files_loader import SafeTensorsFileLoader

        loader = SafeTensorsFileLoader(
            None, self.device, framework=self.framework, disable_cache=self.disable_cache
        )
        loader.add_filenames({0: [self.metadata.src]})
        self._buffer = loader.copy_files_to_device(
            use_buf_register=use_buf_register,
            max_copy_block_size=max_copy_block_size,
            allow_inflight=allow_inflight,
        )

    def wait_io(
        self, dtype: Any = DType.AUTO, noalign: bool = False, borrowed_tensors: bool = False
    ) -> None:
        """Convert tensors to a dtype from now on. Does not wait: a request waits for its bytes.

        Args:
            dtype: as of `FilesBufferOnDevice.get_tensor`.
            noalign: has no effect: tensors are always aligned.
            borrowed_tensors: has no effect: tensors always own their memory.
        """
        boolean("noalign", noalign)
        boolean("borrowed_tensors", borrowed_tensors)
        self._dtype = dtype

    # ---- tensors ----

    @property
    def tensors(self) -> Mapping[str, WrappedTensor]:
        """The tensors by name, each made when it is requested; empty on other ranks than `rank`."""
        buffer = self._buffer if self._local else None
        return _Tensors(buffer, self.metadata, self._dtype)

    def push(self, pg: Any, tensor_name: str, dst_rank: int, src_rank: int) -> WrappedTensor | None:
        """As `FilesBufferOnDevice.push_tensor`. ``src_rank`` is the file's rank."""
        if src_rank != self.rank:
            raise ValueError(f"src_rank={src_rank}: the file is that of rank {self.rank}")
        buffer = self._open(pg)
        dst_rank = 0 if buffer.pg.size() == 1 else dst_rank
        result = buffer.push_tensor(tensor_name, dst_rank, None, self._dtype)
        return None if result is None else WrappedTensor(result)

    def shuffle(self, pg: Any, tensor_name: str, dim: int) -> WrappedTensor:
        """As `FilesBufferOnDevice.get_sharded`."""
        return self._open(pg).get_sharded_wrapped(tensor_name, dim, None, self._dtype)

    def shuffle_multi_cols(self, pg: Any, tensor_names: Sequence[str], dim: int) -> WrappedTensor:
        """As `FilesBufferOnDevice.get_multi_cols`."""
        return self._open(pg).get_multi_cols(list(tensor_names), dim, None, self._dtype)

    def free_dev_ptrs(self) -> None:
        """Forget the file; may be repeated. What a buffer has read ahead goes with the buffer."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None and not self._of_buffer:
            buffer.close()

    def _open(self, pg: Any) -> FilesBufferOnDevice:
        if self._buffer is None:
            raise ValueError(f"{self.metadata.src}: submit_io was not called, or it is freed")
        size = group_size(pg)
        if size != self._buffer.pg.size():
            raise ValueError(
                f"pg: a group of {size}, and the file is read by {self._buffer.pg.size()} ranks;"
                " take the factory from FilesBufferOnDevice.rank_loaders of that group"
            )
        return self._buffer


class _Tensors(Mapping[str, WrappedTensor]):
    """The tensors of one file by name."""

    def __init__(
        self, buffer: FilesBufferOnDevice | None, metadata: SafeTensorsMetadata, dtype: Any
    ) -> None:
        # No list of the names: one is made for each access to `LazyTensorFactory.tensors`.
        self._loaded = {} if buffer is None else buffer.key_to_rank_lidx
        self._metadata = metadata
        self._buffer = buffer
        self._dtype = dtype

    def __getitem__(self, name: str) -> WrappedTensor:
        if self._buffer is None or name not in self:
            raise KeyError(name)
        if self._buffer.pg.size() > 1:
            raise RuntimeError(f"tensor {name!r}: ranks take tensors together; use shuffle")
        return self._buffer.get_tensor_wrapped(name, None, self._dtype)

    def __contains__(self, name: object) -> bool:  # the base class would make the tensor
        return name in self._loaded and name in self._metadata

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._metadata.names if name in self._loaded)

    def __len__(self) -> int:
        return sum(1 for _ in self)
