"""The loader that callers of fastsafetensors know, and its context manager for a list of files."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from .. import sharding
from ..config import Config, pop, push
from ..dtypes import header_shape
from ..tensors import dtype_wanted
from .arguments import (
    DEFAULT_BOUNCE_KB,
    DEFAULT_COPY_BLOCK,
    DEFAULT_THREADS,
    Settings,
    boolean,
    filter_or_none,
    one_path,
    path_list,
    rank_files,
    with_copy_block,
)
from .buffer import FilesBufferOnDevice
from .compat_tensor import WrappedTensor
from .headers import Entry, open_entries
from .local_files import LocalFiles, bar_of

if TYPE_CHECKING:
    import torch

__all__ = ["SafeTensorsFileLoader", "fastsafe_open", "group_size"]

_log = logging.getLogger("fastst_patch")


def group_size(pg: Any) -> tuple[int, int]:
    """Rank and size of a process group; (0, 1) for None.

    Raises:
        TypeError: it is no group.
    """
    if pg is None:
        return 0, 1
    rank, size = getattr(pg, "rank", None), getattr(pg, "size", None)
    if not callable(rank) or not callable(size):
        raise TypeError(
            f"pg={pg!r}: allowed are None, SingleGroup() and a torch.distributed.ProcessGroup"
        )
    return int(rank()), int(size())


class SafeTensorsFileLoader:
    """Loads tensors of many files, as fastsafetensors' class of that name does.

    Arguments are fastsafetensors'. Those left at their defaults leave our options alone:

    Args:
        pg: process group; None or `SingleGroup` for a process on its own.
        device: where tensors go; without a number the current device, whatever the rank.
        bbuf_size_kb: ``chunk_bytes``, from 64 KiB to 64 MiB.
        max_threads: ``threads``, up to 64.
        nogds: False asks for GPU Direct Storage (``io="gds"``). Where it cannot work, or where
            the option ``io`` says something else, bytes go through pinned memory; the report
            says why. True never asks for it.
        set_numa: no longer matters: the threads of the caller are left alone.
        disable_cache: False keeps what a buffer has handed out, on the device, and gives copies;
            the same on all ranks, since what is kept is not exchanged again.
        debug_log: the logger ``fastst_patch`` tells details on stderr until `close`.
        framework: ``pt``, ``pytorch`` or ``torch``.
        use_fgds: asks for GPU Direct Storage, too.
        **options: options of ours for these files, such as ``io`` or ``device_memory_budget``.

    Raises:
        OptionError: a value is not allowed (a ValueError).
        TypeError: an argument is unknown or of a wrong type.
        RuntimeError, AssertionError: torch has no such device.
        RankError: in a group, instead of these, where ranks are not all wrong in the same way: of
            the ranks whose arguments are right, when they name files.
    """

    def __init__(  # noqa: PLR0917 - the order is fastsafetensors'
        self,
        pg: Any = None,
        device: Any = "cpu",
        bbuf_size_kb: int = DEFAULT_BOUNCE_KB,
        max_threads: int = DEFAULT_THREADS,
        nogds: bool = False,
        set_numa: bool = True,
        disable_cache: bool = True,
        debug_log: bool = False,
        framework: str = "pytorch",
        use_fgds: bool = False,
        **options: Any,
    ) -> None:
        self._call = "SafeTensorsFileLoader"
        self._log_token: object = None
        self._closed = False
        self._filter: Callable[[str], bool] | None = None
        self._files: dict[int, list[str]] = {}
        self._entries: dict[str, Entry] = {}
        self._names: dict[str, Entry] = {}
        self._shared: sharding.ShardedFiles | None = None  # of a group
        self._lent = False  # a buffer closes them
        self.pg = pg
        self._rank, self._size = group_size(pg)
        try:
            boolean("set_numa", set_numa)
            self._cached = not boolean("disable_cache", disable_cache)
            debug = boolean("debug_log", debug_log)
            self._settings = Settings(
                device,
                framework,
                bbuf_size_kb=bbuf_size_kb,
                max_threads=max_threads,
                nogds=nogds,
                use_fgds=use_fgds,
                options=options,
            )
        except Exception as error:
            if self._size > 1:
                _refuse(pg, error)  # the others hear it when they name files
            raise
        if debug:
            self._log_token = push({"log_level": "debug"})

    # ---- files ----

    def add_filenames(self, filenames: Mapping[int, list[str]]) -> None:
        """Name files, by the rank that reads them. Their headers are read, and nothing else.

        In a group every rank names the same files, and headers are compared over the ranks.

        Raises:
            ValueError: a rank is not in the group, or the loader is closed.
            TypeError: it is no dict of ranks and paths.
            OSError, SafetensorError: a file cannot be opened, or its header is wrong; the message
                names the file. None of these files was added then.
        """
        try:
            self._check()
            added = rank_files(filenames, self._size)
        except Exception as error:
            if self._size > 1:
                _refuse(self.pg, error)
            raise
        if self._size > 1:
            self._add_shared(added)
            return
        wanted = _in_turns(added)
        for entry in open_entries(wanted, self._settings):
            self._entries[entry.path] = entry
            self._names.update(dict.fromkeys(entry.layout.names, entry))
        for rank, paths in added.items():
            self._files.setdefault(rank, []).extend(paths)
        _log.debug("%s: %d files, %d tensors", self._call, len(self._entries), len(self._names))

    def _add_shared(self, added: dict[int, list[str]]) -> None:
        files = {rank: list(paths) for rank, paths in self._files.items()}
        for rank, paths in added.items():
            files.setdefault(rank, []).extend(paths)
        shared = self._share(files, self._settings.config)
        self._let_go()
        self._files, self._shared = files, shared

    def _share(self, files: Mapping[int, list[str]], config: Config) -> sharding.ShardedFiles:
        group, device = sharding.Group.of(self.pg), self._settings.device
        return sharding.ShardedFiles(files, group, device, config, call=self._call)

    def _let_go(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None and not self._lent:
            shared.close()
        self._lent = False

    def set_tensor_filter(self, keep_tensor: Callable[[str], bool] | None) -> None:
        """Load only tensors whose name it is True for; None loads all.

        The others are not read, `get_keys` omits them, and asking for them is a ValueError.
        """
        self._filter = filter_or_none(keep_tensor)

    def get_keys(self) -> list[str]:
        """Names of all tensors, in the order of the files, in offset order."""
        names = self._names if self._shared is None else self._shared.names
        keep = self._filter
        return list(names) if keep is None else [name for name in names if keep(name)]

    def get_shape(self, tensor_name: str) -> list[int]:
        """Shape of a tensor, as the header has it.

        Raises:
            KeyError: no file has it.
            ValueError: it is filtered out.
        """
        if self._filter is not None and not self._filter(tensor_name):
            raise ValueError(f"get_shape: key {tensor_name} is filtered out")
        if self._size > 1:
            if self._shared is None:
                raise KeyError(tensor_name)
            return _description(self._shared, tensor_name)[1]
        layout = self._names[tensor_name].layout
        return layout.shape(layout.index[tensor_name])

    def _metadata(self) -> dict[str, dict[str, str]]:
        """The free-form metadata of each file; empty for a file that has none."""
        found: Mapping[str, Mapping[str, str] | None]
        if self._shared is not None:
            found = {source.path: source.metadata() for source in self._shared.sources}
        else:
            found = {path: entry.layout.metadata for path, entry in self._entries.items()}
        return {path: dict(metadata or {}) for path, metadata in found.items()}

    # ---- tensors ----

    def copy_files_to_device(
        self,
        dtype: Any = None,
        use_buf_register: bool = True,
        max_copy_block_size: int = DEFAULT_COPY_BLOCK,
        allow_inflight: bool = False,
        borrowed_tensors: bool = False,
    ) -> FilesBufferOnDevice:
        """Start reading the files, and return at once.

        Args:
            dtype: to convert every tensor to, on the device, smaller or larger; None or
                ``"AUTO"`` leaves each as it is in the file.
            use_buf_register: no longer matters: what cuFile needs registered is.
            max_copy_block_size: ``chunk_bytes``, where that is larger.
            allow_inflight: no longer matters: tensors are always handed out one by one.
            borrowed_tensors: no longer matters: tensors always own their memory. True is refused
                in groups, as fastsafetensors does.

        Returns:
            The tensors. Reading runs ahead within ``device_memory_budget``, to the CPU by 128
            MiB of the page cache.

        Raises:
            FaststError: a name occurs in two of the files.
            OptionError, ValueError: a value is not allowed, or the loader is closed.
            OSError, SafetensorError: a file cannot be opened.
        """
        self._check()
        boolean("use_buf_register", use_buf_register)
        boolean("allow_inflight", allow_inflight)
        if boolean("borrowed_tensors", borrowed_tensors) and self._size != 1:
            raise ValueError("borrowed_tensors requires a single-process loader group")
        wanted = dtype_wanted(dtype)
        config = with_copy_block(self._settings.config, max_copy_block_size)
        if self._size > 1:
            return self._copy_shared(wanted, config)
        entries = list(self._entries.values())
        files = LocalFiles(self._call, entries, self._settings, config, keep=self._filter)
        if config.progress:
            files.show(bar_of(entries, files.numbers))
        places = {
            name: (entry.rank, lidx)
            for lidx, (entry, numbers) in enumerate(zip(entries, files.numbers, strict=True))
            for name in map(entry.layout.names.__getitem__, numbers)
        }

        def describe(name: str) -> tuple[str, list[int]]:
            return files.where(name)[0], files.shape(name)

        made = FilesBufferOnDevice(
            files, places, describe, group=(0, 1), dtype=wanted, cached=self._cached
        )
        files.begin()
        return made

    copy_file_to_device = copy_files_to_device
    """As fastsafetensors' README spells it."""

    def _copy_shared(self, wanted: torch.dtype | None, config: Config) -> FilesBufferOnDevice:
        shared = self._shared
        if shared is None or self._lent or config != shared.config:
            shared = self._share(self._files, config)
        else:
            self._lent = True
        shared.read_ahead()
        at = {path: (rank, k) for rank, some in self._files.items() for k, path in enumerate(some)}
        keep = self._filter
        names = [name for name in shared.names if keep is None or keep(name)]
        return FilesBufferOnDevice(
            shared,
            {name: at[shared.where(name)[0]] for name in names},
            functools.partial(_description, shared),
            group=(self._rank, self._size),
            dtype=wanted,
            cached=self._cached,
        )

    # ---- the end ----

    def reset(self) -> None:
        """Forget the files. Buffers made of them stay as they are."""
        self._files, self._entries, self._names = {}, {}, {}
        self._let_go()

    def close(self) -> None:
        """Forget the files for good; may be repeated. Buffers and tensors stay as they are."""
        self._closed = True
        self.reset()
        self._quiet()

    def _quiet(self) -> None:
        token, self._log_token = self._log_token, None
        if token is not None:
            pop(token)

    def _check(self) -> None:
        if self._closed:
            raise ValueError("the loader is closed: make another")

    def __enter__(self) -> SafeTensorsFileLoader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self, _at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        if not _at_exit() and getattr(self, "_log_token", None) is not None:
            self._quiet()


def _refuse(pg: Any, error: Exception) -> NoReturn:
    """Raise an error of arguments on all ranks of a group, while the others open files.

    Raises:
        RankError: on all; or the error itself, where all are wrong in the same way.
    """
    sharding.Group.of(pg).agree(error)
    raise error


def _description(files: sharding.ShardedFiles, name: str) -> tuple[str, list[int]]:
    """Path of the file that has a tensor, and the tensor's shape in it. KeyError for none."""
    return files.where(name)[0], header_shape(*files.describe(name))


def _in_turns(files: Mapping[int, list[str]]) -> list[tuple[str, int]]:
    """Each rank's first file, then each rank's second, and so on."""
    longest = max((len(paths) for paths in files.values()), default=0)
    return [
        (paths[at], rank)
        for at in range(longest)
        for rank, paths in files.items()
        if at < len(paths)
    ]


class fastsafe_open:  # noqa: N801 - fastsafetensors' name
    """Files opened together, as fastsafetensors' context manager does.

    Args:
        filenames: a path, a list of paths, or a dict of ranks and their paths.
        framework: ``pt``, ``pytorch`` or ``torch``.
        pg: process group; None for a process on its own.
        device: where tensors go.
        nogds: as of `SafeTensorsFileLoader`.
        debug_log: as of `SafeTensorsFileLoader`.
        max_copy_block_size: as of `SafeTensorsFileLoader.copy_files_to_device`.
        use_fgds: as of `SafeTensorsFileLoader`.

    Raises as these do.
    """

    def __init__(  # noqa: PLR0917 - the order is fastsafetensors'
        self,
        filenames: Any,
        framework: str = "pt",
        pg: Any = None,
        device: Any = "cpu",
        nogds: bool = False,
        debug_log: bool = False,
        max_copy_block_size: int = DEFAULT_COPY_BLOCK,
        use_fgds: bool = False,
    ) -> None:
        if isinstance(filenames, Mapping):
            files: Mapping[int, list[str]] = filenames
        elif isinstance(filenames, (str, os.PathLike)):
            files = {0: [one_path(filenames, "fastsafe_open")]}
        else:
            files = {0: path_list(filenames, "fastsafe_open")}
        self.loader = SafeTensorsFileLoader(
            pg,
            device,
            nogds=nogds,
            debug_log=debug_log,
            framework=framework,
            use_fgds=use_fgds,
        )
        self.loader._call = "fastsafe_open"
        try:
            self.loader.add_filenames(files)
            self.fb = self.loader.copy_files_to_device(max_copy_block_size=max_copy_block_size)
        except BaseException:
            self.loader.close()
            raise

    def metadata(self) -> dict[str, dict[str, str]]:
        """The free-form metadata of each file; empty for a file that has none."""
        return self.loader._metadata()

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self.fb.key_to_rank_lidx)

    get_keys = keys

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor by name; it stays valid when the context is left."""
        return self.fb.get_tensor(name)

    def get_tensor_wrapped(self, name: str) -> WrappedTensor:
        """A tensor by name, in fastsafetensors' wrapper."""
        return self.fb.get_tensor_wrapped(name)

    def close(self) -> None:
        """Let go of what was not handed out. May be repeated."""
        self.fb.close()
        self.loader.close()

    def __enter__(self) -> fastsafe_open:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
