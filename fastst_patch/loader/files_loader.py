"""fastsafetensors' loader, and its context manager for a list of files."""

from __future__ import annotations

import collections
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ..config import Config, pop, push
from ..errors import OptionError
from ..files.remote import shown
from ..layout import FileLayout
from ..tensors import dtype_wanted
from .arguments import (
    DEFAULT_BOUNCE_KB,
    DEFAULT_COPY_BLOCK,
    DEFAULT_THREADS,
    Settings,
    boolean,
    filter_or_none,
    group_size,
    one_path,
    path_list,
    rank_files,
    with_copy_block,
)
from .buffer import Files, FilesBufferOnDevice
from .compat_tensor import WrappedTensor
from .headers import Entry, open_entries
from .local_files import LocalFiles, bar_of
from .metadata import SafeTensorsMetadata, TensorFrame
from .stock_file import layout_of

if TYPE_CHECKING:
    import torch

    from .. import sharding  # else imported for groups alone: it takes more than this module

__all__ = ["SafeTensorsFileLoader", "fastsafe_open"]

_log = logging.getLogger("fastst_patch")

_COPIERS = ("gds", "fgds", "nogds", "unified")


class SafeTensorsFileLoader:
    """Loads tensors of many files, as fastsafetensors' class of that name does.

    Arguments are fastsafetensors'. Those at their defaults do not change our options:

    Args:
        pg: process group; None or `SingleGroup` for a process on its own.
        device: where tensors go; without a number the current device, whatever the rank.
        bbuf_size_kb: ``chunk_bytes``, from 64 KiB to 64 MiB.
        max_threads: ``threads``, up to 64.
        nogds: False requests GPU Direct Storage (``io="gds"``). Where it cannot work, or where the
            option ``io`` has another value, bytes go through pinned memory, and the report says
            why. True does not request it.
        set_numa: has no effect: the caller's threads are not moved.
        disable_cache: False keeps each tensor that a buffer has handed out, on the device, and
            hands out copies. It must be the same on all ranks, because kept tensors are not
            exchanged again.
        debug_log: log details of ``fastst_patch`` on stderr until `close`.
        framework: ``pt``, ``pytorch`` or ``torch``; in one process also ``np``, ``jax``, ``tf``
            or ``paddle``.
        use_fgds: requests GPU Direct Storage, too.
        **options: our options for these files, such as ``io`` or ``device_memory_budget``.

    Attributes:
        pg: as given.
        meta: for each path the header of the file, and the rank that the file was added for.

    Raises:
        OptionError: a value is not allowed (a ValueError).
        TypeError: an argument is unknown or of a wrong type.
        RuntimeError, AssertionError: torch has no such device.
        RankError: in a group, instead of these, where the ranks' errors differ. Ranks whose
            arguments are right raise it when they add files.
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
        self._names: dict[str, SafeTensorsMetadata] = {}
        self.meta: dict[str, tuple[SafeTensorsMetadata, int]] = {}
        self._sharded: sharding.ShardedFiles | None = None  # of a group
        self._buffer_closes = False  # a buffer uses `_sharded`, and closes it
        self.pg = pg
        self._size = group_size(pg)
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
            if self._size > 1 and self._settings.framework != "pytorch":
                raise OptionError(f"framework={framework!r}: a group exchanges torch's tensors")
        except Exception as error:
            if self._size > 1:
                _refuse(pg, error)  # the others receive it when they add files
            raise
        if debug:
            self._log_token = push({"log_level": "debug"})

    # ---- files ----

    def add_filenames(self, filenames: Mapping[int, list[str]]) -> None:
        """Add files, by the rank that reads them. Only their headers are read.

        In a group, all ranks add the same files, and the headers are compared.

        Raises:
            ValueError: a rank is not in the group, or the loader is closed.
            TypeError: ``filenames`` is no dict of ranks and paths.
            OSError, SafetensorError: a file cannot be opened, or its header is wrong; the message
                names the file. None of these files is added then.
        """
        try:
            self._check()
            added = rank_files(filenames, self._size)
        except Exception as error:
            if self._size > 1:
                _refuse(self.pg, error)
            raise
        if self._size > 1:
            self._add_sharded(added)
            return
        from ..sharding.opening import in_turns

        for entry in open_entries(in_turns(added), self._settings):
            self._entries[entry.path] = entry
            self._describe(entry.path, entry.layout, entry.rank)
        for rank, paths in added.items():
            self._files.setdefault(rank, []).extend(paths)
        _log.debug("%s: %d files, %d tensors", self._call, len(self._entries), len(self._names))

    def _add_sharded(self, added: dict[int, list[str]]) -> None:
        files = {rank: list(paths) for rank, paths in self._files.items()}
        for rank, paths in added.items():
            files.setdefault(rank, []).extend(paths)
        sharded = self._open_sharded(files, self._settings.config)
        self._close_sharded()
        self._files, self._sharded = files, sharded
        ranks = {path: rank for rank, paths in files.items() for path in paths}
        for source in sharded.sources:
            by_stock = source.fallback is not None
            layout = layout_of(source.path) if by_stock else source.layout
            self._describe(source.path, layout, ranks[source.path])

    def _describe(self, path: str, layout: FileLayout, rank: int) -> None:
        header = SafeTensorsMetadata.of_layout(layout, self._settings.framework, shown(path))
        self.meta[path] = header, rank
        self._names.update(dict.fromkeys(layout.names, header))

    def _open_sharded(
        self, files: Mapping[int, list[str]], config: Config
    ) -> sharding.ShardedFiles:
        from .. import sharding

        group, device = sharding.Group.of(self.pg), self._settings.device
        return sharding.ShardedFiles(files, group, device, config, call=self._call)

    def _close_sharded(self) -> None:
        sharded, self._sharded = self._sharded, None
        if sharded is not None and not self._buffer_closes:
            sharded.close()
        self._buffer_closes = False

    @classmethod
    def process_extension_config(
        cls, ext_config: Mapping[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        """Arguments of the class, given those of an `AutoLoader`'s file.

        Raises:
            OptionError: ``copier_type`` is none that the engine stands for.
        """
        found = dict(ext_config)
        copier = found.pop("copier_type", "gds")
        if copier not in _COPIERS:
            raise OptionError(f"copier_type={copier!r}: allowed are {', '.join(_COPIERS)}")
        use_fgds = copier == "fgds" or found.pop("use_fgds", False)
        return {**found, "nogds": copier not in ("gds", "fgds"), "use_fgds": use_fgds}

    def set_tensor_filter(self, keep_tensor: Callable[[str], bool] | None) -> None:
        """Load only tensors for whose name ``keep_tensor`` is True; None loads all.

        The others are not read, `get_keys` omits them, and requesting them raises ValueError.
        """
        self._filter = filter_or_none(keep_tensor)

    def get_keys(self) -> list[str]:
        """Names of all tensors, in the order of the files, in offset order."""
        return [name for name in self._names if self._filter is None or self._filter(name)]

    @property
    def frames(self) -> Mapping[str, TensorFrame]:
        """Where each tensor lies in its file, by name."""
        found = [header.tensors for header, _ in self.meta.values()]
        return collections.ChainMap(*reversed(found))  # which begins with the last

    def get_shape(self, tensor_name: str) -> list[int]:
        """Shape of a tensor, as in the header.

        Raises:
            KeyError: no file has it.
            ValueError: it is filtered out.
        """
        if self._filter is not None and not self._filter(tensor_name):
            raise ValueError(f"get_shape: key {tensor_name} is filtered out")
        return self._names[tensor_name].shape(tensor_name)

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
                ``"AUTO"``: the dtype in the file.
            use_buf_register: has no effect: buffers that cuFile needs are always registered.
            max_copy_block_size: bounds ``chunk_bytes``.
            allow_inflight: has no effect: tensors are always handed out one by one.
            borrowed_tensors: has no effect: tensors always own their memory. True is refused in
                groups, as by fastsafetensors.

        Returns:
            The tensors. Reads run ahead within ``device_memory_budget``; to the CPU, by 128 MiB of
            the page cache.

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
            return self._copy_sharded(wanted, config)
        entries = list(self._entries.values())
        names = self.get_keys()
        keep = None if self._filter is None else set(names).__contains__
        files = LocalFiles(self._call, entries, self._settings, config, keep=keep)
        if config.progress:
            files.show(bar_of(entries, files.numbers))
        made = self._buffer(files, names, wanted)
        files.begin()
        return made

    def _buffer(
        self, files: Files, names: Sequence[str], wanted: torch.dtype | None
    ) -> FilesBufferOnDevice:
        from ..sharding import SingleGroup

        return FilesBufferOnDevice(
            files,
            list(self.meta.values()),
            {name: self._names[name] for name in names},
            self._settings,
            pg=SingleGroup() if self.pg is None else self.pg,
            dtype=wanted,
            cached=self._cached,
        )

    copy_file_to_device = copy_files_to_device
    """The same, as fastsafetensors' README spells it."""

    def _copy_sharded(self, wanted: torch.dtype | None, config: Config) -> FilesBufferOnDevice:
        sharded = self._sharded
        if sharded is None or self._buffer_closes or config != sharded.config:
            sharded = self._open_sharded(self._files, config)
        else:
            self._buffer_closes = True
        sharded.read_ahead()
        return self._buffer(sharded, self.get_keys(), wanted)

    # ---- closing ----

    def reset(self) -> None:
        """Forget the files. Buffers made of them stay valid."""
        self._files, self._entries, self._names, self.meta = {}, {}, {}, {}
        self._close_sharded()

    def close(self) -> None:
        """Forget the files for good; may be repeated. Buffers and tensors stay valid."""
        self._closed = True
        self.reset()
        self._restore_logging()

    def _restore_logging(self) -> None:
        token, self._log_token = self._log_token, None
        if token is not None:
            pop(token)

    def _check(self) -> None:
        if self._closed:
            raise ValueError("the loader is closed: make a new one")

    def __enter__(self) -> SafeTensorsFileLoader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self, _at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        if not _at_exit() and getattr(self, "_log_token", None) is not None:
            self._restore_logging()


def _refuse(pg: Any, error: Exception) -> NoReturn:
    """Raise an error of arguments on all ranks of a group; the others call this or open files.

    Raises:
        RankError: on all ranks; or ``error`` itself, where all ranks have the same one.
    """
    from ..sharding import Group

    Group.of(pg).agree(error)
    raise error


class fastsafe_open:  # noqa: N801 - fastsafetensors' name
    """Files opened together, as by fastsafetensors' context manager.

    Args:
        filenames: a path, a list of paths, or a dict of ranks and their paths.
        framework: as of `SafeTensorsFileLoader`.
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
        """The free-form metadata of each file; empty for a file without."""
        return {path: header.metadata or {} for path, (header, _) in self.loader.meta.items()}

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self.fb.key_to_rank_lidx)

    get_keys = keys

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor by name; it stays valid after the context."""
        return self.fb.get_tensor(name)

    def get_tensor_wrapped(self, name: str) -> WrappedTensor:
        """A tensor by name, in fastsafetensors' wrapper."""
        return self.fb.get_tensor_wrapped(name)

    def close(self) -> None:
        """Free tensors that were not handed out. May be repeated."""
        self.fb.close()
        self.loader.close()

    def __enter__(self) -> fastsafe_open:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
