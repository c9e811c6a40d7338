"""`ParallelLoader`: iterates over every tensor of many files, and reads files ahead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..report import Account
from .arguments import (
    DEFAULT_BOUNCE_KB,
    DEFAULT_THREADS,
    Settings,
    boolean,
    filter_or_none,
    group_size,
    path_list,
)
from .files_loader import SafeTensorsFileLoader
from .headers import Entry, open_entries
from .local_files import LocalFiles, bar_of

if TYPE_CHECKING:
    import torch

__all__ = ["ParallelLoader"]

_log = logging.getLogger("fastst_patch")


class ParallelLoader:
    """Iterates over the tensors of files, as fastsafetensors' class of that name does.

    Arguments are fastsafetensors'. Those at their defaults do not change our options.

    Args:
        pg: process group; None or `SingleGroup` for a process on its own.
        hf_weights_files: paths of the files.
        max_concurrent_producers: must be 1, as with fastsafetensors; ``max_threads`` is the number
            of workers.
        queue_size: how many files are read ahead, within the budget: -1 starts a file when the one
            before it is used up, 0 also reads the next file, n also reads n more.
        use_tqdm_on_load: a bar with bytes and GB/s, on rank 0.
        device: where tensors go; without a number the current device.
        bbuf_size_kb: as of `SafeTensorsFileLoader`.
        max_threads: as of `SafeTensorsFileLoader`.
        nogds: as of `SafeTensorsFileLoader`.
        set_numa: has no effect.
        debug_log: as of `SafeTensorsFileLoader`.
        framework: as of `SafeTensorsFileLoader`.
        tensor_filter: tensors for whose name it is False are neither read nor yielded. Only in
            groups of one, or with ``all_local``.
        all_local: every rank reads its files alone, without the group.
        max_batch_bytes: most bytes of one block that tensors share; a larger tensor has a block of
            its own.
        use_chunk_budget_as_allocation_size: has no effect: a block is as large as its tensors.
            Needs ``max_batch_bytes`` or ``device_memory_budget``, as with fastsafetensors.
        device_memory_budget: bytes on the device of tensors yielded and of those read ahead. When
            the yielded tensors reach it, reads continue one block ahead; nothing fails. Without
            it, the option of the same name bounds the tensors read ahead.
        accumulate_resident: False if the caller does not keep tensors: then they do not count.
        resident_tensor: True for names of tensors that the caller keeps; None: it keeps all.
        use_fgds: as of `SafeTensorsFileLoader`.
        broadcast_run_bytes: has no effect: a group exchanges units of its own size.
        broadcast_run_tensors: has no effect.
        overlap_io: has no effect: a tensor is yielded when its own bytes have arrived.
        borrowed_tensors: has no effect: tensors own their memory. Needs
            ``accumulate_resident=False`` and one process, as with fastsafetensors.
        **options: our options for these files, such as ``io``.

    Raises:
        OptionError, ValueError: a value is not allowed, or not together with another.
        TypeError: an argument is unknown or of a wrong type.
    """

    def __init__(  # noqa: PLR0917 - the order is fastsafetensors'
        self,
        pg: Any,
        hf_weights_files: Sequence[str],
        max_concurrent_producers: int = 1,
        queue_size: int = 0,
        use_tqdm_on_load: bool = True,
        device: Any = "cpu",
        bbuf_size_kb: int = DEFAULT_BOUNCE_KB,
        max_threads: int = DEFAULT_THREADS,
        nogds: bool = False,
        set_numa: bool = True,
        debug_log: bool = False,
        framework: str = "pytorch",
        tensor_filter: Callable[[str], bool] | None = None,
        all_local: bool = False,
        max_batch_bytes: int | None = None,
        use_chunk_budget_as_allocation_size: bool = False,
        device_memory_budget: int | None = None,
        accumulate_resident: bool = True,
        resident_tensor: Callable[[str], bool] | None = None,
        use_fgds: bool = False,
        broadcast_run_bytes: int = 16 << 20,
        broadcast_run_tensors: int = 64,
        overlap_io: bool = True,
        borrowed_tensors: bool = False,
        **options: Any,
    ) -> None:
        if max_concurrent_producers != 1:
            raise ValueError(
                f"max_concurrent_producers must be 1 (got {max_concurrent_producers}):"
                " max_threads sets the number of workers"
            )
        if isinstance(queue_size, bool) or not isinstance(queue_size, int) or queue_size < -1:
            raise OptionError(f"queue_size={queue_size!r}: allowed are whole numbers from -1 on")
        self._files = path_list(hf_weights_files, "hf_weights_files")
        self._queue_size = queue_size
        self._bar_wanted = boolean("use_tqdm_on_load", use_tqdm_on_load)
        self._filter = filter_or_none(tensor_filter)
        self._batch = _bytes_or_none("max_batch_bytes", max_batch_bytes, 1)
        self._budget = _bytes_or_none("device_memory_budget", device_memory_budget, 0)
        self._accumulate = boolean("accumulate_resident", accumulate_resident)
        self._resident_tensor = filter_or_none(resident_tensor, "resident_tensor")
        boolean("overlap_io", overlap_io)
        pg = None if boolean("all_local", all_local) else pg
        self._size = group_size(pg)
        self._check_together(
            boolean("use_chunk_budget_as_allocation_size", use_chunk_budget_as_allocation_size),
            boolean("borrowed_tensors", borrowed_tensors),
            (broadcast_run_bytes, broadcast_run_tensors),
        )
        if self._budget is not None:
            options["device_memory_budget"] = self._budget
        self.loader = SafeTensorsFileLoader(
            pg,
            device,
            bbuf_size_kb=bbuf_size_kb,
            max_threads=max_threads,
            nogds=nogds,
            set_numa=set_numa,
            debug_log=debug_log,
            framework=framework,
            use_fgds=use_fgds,
            **options,
        )
        self.loader._call = "ParallelLoader"

    def _check_together(self, sized: bool, borrowed: bool, runs: tuple[int, int]) -> None:
        if sized and self._batch is None and self._budget is None:
            raise ValueError(
                "use_chunk_budget_as_allocation_size requires max_batch_bytes or"
                " device_memory_budget"
            )
        if self._filter is not None and self._size > 1:
            raise ValueError(
                "tensor_filter requires a single-process loader group (all_local=True or pg=None):"
                " every rank gets every tensor of the others"
            )
        if self._resident_tensor is not None and not self._accumulate:
            raise ValueError("resident_tensor requires accumulate_resident=True")
        if borrowed and self._accumulate:
            raise ValueError("borrowed_tensors requires accumulate_resident=False")
        if borrowed and self._size > 1:
            raise ValueError("borrowed_tensors requires a single-process loader group")
        if any(not isinstance(one, int) or one < 0 for one in runs):
            raise ValueError("broadcast run limits must be whole numbers from 0 on")

    def iterate_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, file by file, in offset order.

        The headers of all files are read first, in parallel: a damaged or missing file raises
        before any data is read. Tensors own their memory. The end of the iterator frees tensors
        that were read ahead, also where it is closed early.

        Raises:
            OSError, MemoryError, SafetensorError: a file cannot be opened or read; the message
                names the file, and the tensor.
            ValueError: the loader is closed.
        """
        self.loader._check()
        return self._iterate_group() if self._size > 1 else self._iterate_alone()

    def _iterate_alone(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._iterate(self._open())

    def _open(self) -> list[Entry]:
        """The files, with their headers."""
        return open_entries([(path, 0) for path in self._files], self.loader._settings)

    def _iterate(
        self, entries: list[Entry], collect: Callable[[Account, str], None] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of open files.

        Args:
            entries: of `_open`; emptied, since they hold descriptors.
            collect: as of `LocalFiles`.
        """
        settings: Settings = self.loader._settings
        config = settings.config
        files = LocalFiles(
            self.loader._call,
            entries,
            settings,
            config,
            keep=self._filter,
            unique=False,  # as with fastsafetensors, files may have the same names
            files_ahead=self._queue_size + 1,
            resident=self._resident(),
            block_bytes=self._batch,
            collect=collect,
        )
        names = [entry.layout.names for entry in entries]
        numbers = files.numbers
        if self._bar_wanted or config.progress:
            files.show(bar_of(entries, numbers))
        entries.clear()  # from here on, only `files` holds descriptors
        try:
            files.begin()
            for k, some in enumerate(numbers):
                for i in some:
                    yield names[k][i], settings.hand_out(files.take_at(k, i))
                files.done_with(k)
        finally:
            files.close()

    def _resident(self) -> Callable[[str, int], int] | None:
        """Bytes of a yielded tensor that count against the budget."""
        if self._budget is None or not self._accumulate:
            return None
        kept = self._resident_tensor
        return lambda name, nbytes: nbytes if kept is None or kept(name) else 0

    def _iterate_group(self) -> Iterator[tuple[str, torch.Tensor]]:
        loader, size = self.loader, self._size
        loader.reset()
        loader.add_filenames({rank: self._files[rank::size] for rank in range(size)})
        with loader.copy_files_to_device() as buffer:
            for name in buffer.key_to_rank_lidx:
                yield name, buffer.get_tensor(name)

    def close(self) -> None:
        """Forget the files; may be repeated. An iterator in progress continues."""
        self.loader.close()

    def __enter__(self) -> ParallelLoader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _bytes_or_none(name: str, value: object, low: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise OptionError(f"{name}={value!r}: allowed are whole numbers from {low} on, and None")
    return value
