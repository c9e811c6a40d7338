"""The files that one process reads for itself: their tensors by name, and the reports."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .. import report
from ..config import Config
from ..dropin import slices
from ..dropin.eligibility import complain, fell_back, same
from ..errors import Fallback, NameClashError
from ..files.base import OpenedFile
from ..files.remote import shown
from ..layout import FileLayout
from ..locks import shared
from ..report import Account
from .arguments import Settings
from .headers import Entry
from .messages import explained
from .prefetch import FilesPrefetcher
from .stock_file import StockFile

if TYPE_CHECKING:
    import torch

__all__ = ["LocalFiles", "bar_of", "cast"]

# Not a WeakSet: iterating over one raises where another thread opens files meanwhile.
_alive: weakref.WeakValueDictionary[int, LocalFiles] = weakref.WeakValueDictionary()


class LocalFiles:
    """Tensors of files that this process reads for itself. Usable from any thread.

    Holds the files and what was read ahead; tensors handed out outlive this object.

    Args:
        call: name of the caller, for reports.
        entries: the files, in the order in which they will be asked for.
        settings: of the loader.
        config: options of the files.
        keep: tensors for whose names it returns False are left out; None keeps all.
        unique: whether a name that occurs in two files is an error.
        files_ahead: how many files behind the one in use may be started; None: any number.
        resident: given the name and the bytes of a tensor handed out: how many bytes of it count
            against the budget, because they stay on the device; None: no bytes do.
        block_bytes: most bytes of a block that tensors share, if less than the budget makes it.
        collect: called with the account of a file and its device, in place of a report of the
            file; it takes over the counts.

    Raises:
        NameClashError: two files have a tensor of the same name.
        OSError, SafetensorError: a file is left to stock, which cannot open it.
    """

    def __init__(
        self,
        call: str,
        entries: Sequence[Entry],
        settings: Settings,
        config: Config,
        *,
        keep: Callable[[str], bool] | None = None,
        unique: bool = True,
        files_ahead: int | None = None,
        resident: Callable[[str, int], int] | None = None,
        block_bytes: int | None = None,
        collect: Callable[[Account, str], None] | None = None,
    ) -> None:
        self._call = call
        self._collect = collect
        self._config = config
        self._target = settings.target
        self._resident = resident
        self._resident_bytes = 0
        self._bar: Any = None
        self._stock_handles: dict[int, Any] = {}
        self._paths = [shown(entry.path) for entry in entries]
        self._layouts = [entry.layout for entry in entries]
        self.numbers = [_kept(layout, keep) for layout in self._layouts]
        self._places = self._index(unique)
        files = [
            entry.opened(call, config, settings.target, settings.device, settings.note)
            for entry in entries
        ]
        prefetcher = FilesPrefetcher(
            files,
            self.numbers,
            config.device_memory_budget,
            block_bytes=block_bytes,
            files_ahead=files_ahead,
            held=lambda: self._resident_bytes,
        )
        self._open: tuple[list[OpenedFile | StockFile], FilesPrefetcher] | None = files, prefetcher
        _alive[id(self)] = self

    def _index(self, unique: bool) -> dict[str, int]:
        places: dict[str, int] = {}
        expected = 0
        for k, (layout, numbers) in enumerate(zip(self._layouts, self.numbers, strict=True)):
            names = layout.names
            wanted = names if isinstance(numbers, range) else [names[i] for i in numbers]
            places.update(dict.fromkeys(wanted, k))
            expected += len(wanted)
        if unique and len(places) != expected:
            self._raise_name_clash()
        return places

    def _raise_name_clash(self) -> None:
        seen: dict[str, str] = {}
        for path, layout, numbers in zip(self._paths, self._layouts, self.numbers, strict=True):
            for i in numbers:
                name = layout.names[i]
                if name in seen:
                    raise NameClashError(
                        f"tensor {name!r} is in both {seen[name]} and {path}: names must be"
                        " unique among the files of one loader; load the files apart, or leave"
                        " one of the tensors out with set_tensor_filter"
                    )
                seen[name] = path

    def show(self, bar: Any) -> None:
        """Show the bytes of tensors handed out in a tqdm bar, which is closed with the files."""
        self._bar = bar

    def begin(self) -> None:
        """Start reading ahead. Returns at once."""
        files, prefetcher = self._still_open()
        if files:
            with files[0].account:
                prefetcher.begin()

    def _still_open(self) -> tuple[list[OpenedFile | StockFile], FilesPrefetcher]:
        found = self._open
        if found is None:
            raise ValueError("the files are closed: take tensors before close()")
        return found

    # ---- what is there ----

    def where(self, name: str) -> tuple[str, int]:
        """Path of the file that has a tensor, and the tensor's number in it. KeyError for none."""
        k, i = self._place(name)
        return self._paths[k], i

    def _place(self, name: str) -> tuple[int, int]:
        k = self._places[name]
        return k, self._layouts[k].index[name]

    # ---- tensors ----

    def take(self, name: str, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A whole tensor. ``dim`` is ignored: only a group cuts tensors; see `Files`.

        Raises:
            KeyError: there is no such tensor.
            OSError, MemoryError, SafetensorError: it could not be read.
            ValueError: the files are closed.
        """
        return cast(self, name, self.take_at(*self._place(name)), dtype)

    def push(self, name: str, dst_rank: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor for a rank, which can only be this one; see `Files`. Raises as `take`."""
        return self.take(name, -1, dtype)

    def take_at(self, k: int, i: int) -> torch.Tensor:
        """Tensor i of file k. Raises as `take`."""
        files, prefetcher = self._still_open()
        opened = files[k]
        try:
            with opened.account:
                result = self._taken(prefetcher, opened, k, i)
        except Exception as error:
            raise explained(error, self._paths[k], self._layouts[k].names[i]) from error
        nbytes = opened.layout.nbytes(i)
        if self._resident is not None:
            self._resident_bytes += self._resident(opened.layout.names[i], nbytes)
        if self._bar is not None:
            self._bar.update(nbytes)
        return result

    def _taken(
        self, prefetcher: FilesPrefetcher, opened: OpenedFile | StockFile, k: int, i: int
    ) -> torch.Tensor:
        try:
            ours = prefetcher.take(k, i)
        except (Fallback, MemoryError) as error:
            fallback = Fallback.alone(error)
        else:
            return self._verified(opened, k, i, ours) if self._config.verify else ours
        prefetcher.drop()  # what was read ahead may be the memory that is missing
        result: torch.Tensor = self._stock(opened, k, i).get_tensor(opened.layout.names[i])
        opened.account.reason = fallback.reason
        fell_back(self._config, self._call, self._paths[k], fallback)
        return result

    def slice(self, name: str) -> Any:
        """A slice of a tensor, as a handle's ``get_slice`` gives it. KeyError for none."""
        k, i = self._place(name)
        opened = self._still_open()[0][k]
        return opened.slice(i) if isinstance(opened, StockFile) else slices.FastSlice(opened, i)

    def _stock(self, opened: OpenedFile | StockFile, k: int, i: int) -> Any:
        """A handle of stock from which tensor i of file k can be taken."""
        if isinstance(opened, OpenedFile) and opened.file.feed is not None:
            return slices.stock_over(opened, numbers=[i])
        found = self._stock_handles.get(k)
        if found is None:
            found = opened.handle if isinstance(opened, StockFile) else slices.stock_over(opened)
            self._stock_handles[k] = found
        return found

    def _verified(
        self, opened: OpenedFile | StockFile, k: int, i: int, ours: torch.Tensor
    ) -> torch.Tensor:
        name = opened.layout.names[i]
        theirs: torch.Tensor = self._stock(opened, k, i).get_tensor(name)
        if same(ours, theirs):
            return ours
        complain(self._config, self._paths[k], f"tensor {name!r}")
        return theirs

    def settle(self) -> None:
        """Wait for what this thread has pending on the device: then any stream may use it."""
        if self._target is not None:
            self._target.synchronize()

    # ---- the end ----

    def refuse(self, name: str, error: Exception) -> NoReturn:
        """Raise an error of arguments: there are no other ranks to tell."""
        raise error

    def close(self) -> None:
        """Let go of the files and of what was not handed out, and report. May be repeated."""
        with shared:
            found, self._open = self._open, None
        if found is None:
            return
        files, prefetcher = found
        prefetcher.drop()
        self._stock_handles.clear()
        for path, opened in zip(self._paths, files, strict=True):
            self._report(path, opened)
        if self._bar is not None:
            self._bar.close()

    def done_with(self, k: int) -> None:
        """Report file k, whose tensors have all been asked for."""
        if self._open is not None:
            self._report(self._paths[k], self._open[0][k])

    def tell(self) -> None:
        """Report what was handed out since the last report."""
        found = self._open
        for path, opened in zip(self._paths, found[0] if found else (), strict=False):
            self._report(path, opened, last=False)

    def _report(self, path: str, opened: OpenedFile | StockFile, *, last: bool = True) -> None:
        if self._collect is not None:
            self._collect(opened.account, opened.device)
        else:
            opened.account.emit(self._call, path, opened.device, last=last)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._open is None

    def __del__(self, _at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        if not _at_exit() and hasattr(self, "_open"):
            self.close()


def _kept(layout: FileLayout, keep: Callable[[str], bool] | None) -> Sequence[int]:
    if keep is None:
        return range(len(layout.names))
    return [i for i, name in enumerate(layout.names) if keep(name)]


def bar_of(entries: Sequence[Entry], numbers: Sequence[Sequence[int]]) -> Any:
    """A tqdm bar for so many tensors: bytes, and GB/s."""
    from tqdm import tqdm

    total = sum(
        entry.layout.nbytes(i) for entry, some in zip(entries, numbers, strict=True) for i in some
    )
    return tqdm(total=total, unit="B", unit_scale=True, desc="Loading safetensors")


def cast(
    files: LocalFiles, name: str, tensor: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    """A tensor in another dtype, converted where it is.

    Raises:
        RuntimeError, NotImplementedError: torch cannot convert it so.
    """
    if dtype is None or tensor.dtype == dtype:
        return tensor
    try:
        result = tensor.to(dtype)
    except (RuntimeError, NotImplementedError) as error:
        raise type(error)(
            f"tensor {name!r} of {files.where(name)[0]} is {tensor.dtype}, which torch cannot"
            f" convert to {dtype}: {error}"
        ) from error
    files.settle()
    return result


def _tell_all() -> None:
    for found in _alive.valuerefs():
        files = found()
        if files is not None:
            files.tell()


report.before_the_end(_tell_all)
