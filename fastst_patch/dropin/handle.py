"""Stock-compatible handle, slice, ``load_file`` and ``load_model``.

The rule everywhere: do it ourselves only when the outcome is certainly stock's, else let stock
do it with the caller's own arguments. Stock is reached lazily through the descriptor we hold,
so it sees the very file that was opened, even when the path means another one by now.
"""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import stock
from ..config import Config, current
from ..dtypes import PACKED
from ..errors import Fallback
from ..files.base import OpenedFile
from ..report import tell_unfinished
from .eligibility import (
    SmallFile,
    check_descriptors,
    complain,
    device_for_call,
    fell_back,
    open_fast,
    path_of,
    report_stock,
    same,
    verified,
)
from .slices import FastSlice, repr_as, stock_handle, stock_over

if TYPE_CHECKING:
    import torch

__all__ = [
    "FastHandle",
    "load_file",
    "load_model",
    "open_handle",
    "report_open_handles",
    "safe_open",
]

# ---- load_file ----


def _bind_load_file(
    filename: Any, device: Any = "cpu", *, backend: Any = "mmap"
) -> tuple[Any, Any, Any]:
    return filename, device, backend


def load_file(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """``safetensors.torch.load_file``, faster: same arguments, results and exceptions."""
    config, started = current(), time.perf_counter()
    try:
        path, opened, result = _fast_load_file(config, args, kwargs)
    except Fallback as error:
        fallback = Fallback.alone(error)
    else:
        opened.account.seconds = time.perf_counter() - started
        opened.account.emit("load_file", path, opened.device)
        if config.verify:
            return verified(config, path, result, stock.load_file(*args, **kwargs))
        return result
    return _stock_load_file(config, started, fallback, args, kwargs)


def _fast_load_file(
    config: Config, args: Any, kwargs: Any
) -> tuple[str, OpenedFile, dict[str, torch.Tensor]]:
    if "backend" in kwargs and not stock.BACKENDS:
        raise Fallback("this safetensors has no backend argument")
    try:
        filename, device, backend = _bind_load_file(*args, **kwargs)
    except TypeError:
        raise Fallback("the arguments are not load_file's") from None
    path = path_of(filename)
    opened = open_fast(path, config, device_for_call("pt", device, backend))
    return path, opened, _load_opened(opened)


def _load_opened(opened: OpenedFile) -> dict[str, torch.Tensor]:
    try:
        result = opened.all_tensors()
    except MemoryError as error:
        raise Fallback(f"not enough memory: {error}") from error
    if "offset_keys" not in stock.HANDLE_METHODS:  # before 0.6 load_file followed keys()
        return {name: result[name] for name in opened.layout.sorted_names}
    return result


def _stock_load_file(
    config: Config, started: float, fallback: Fallback, args: Any, kwargs: Any
) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = stock.load_file(*args, **kwargs)
    filename = args[0] if args else kwargs.get("filename")
    fell_back(config, "load_file", str(filename), fallback)
    device = args[1] if len(args) > 1 else kwargs.get("device", "cpu")
    nbytes = 0 if isinstance(fallback, SmallFile) else sum(t.nbytes for t in result.values())
    seconds = time.perf_counter() - started
    report_stock(
        "load_file", filename, device, fallback, bytes=nbytes, tensors=len(result), seconds=seconds
    )
    return result


def load_model(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
    """``safetensors.torch.load_model``, faster: stock's own code over our ``load_file``."""
    result: tuple[list[str], list[str]] = stock.load_model(load_file, *args, **kwargs)
    return result


# ---- safe_open ----


def _bind_safe_open(
    filename: Any, framework: Any, device: Any = "cpu", *, backend: Any = "mmap"
) -> tuple[Any, Any, Any, Any]:
    return filename, framework, device, backend


def open_handle(stock_class: Any, find_path: Any, args: Any, kwargs: Any) -> Any:
    """A fast handle where it equals stock's, else stock's own.

    Args:
        stock_class: ``safe_open`` or ``_safe_open_handle``, called for a fallback.
        find_path: from their first argument to a path.
        args: as the caller gave them.
        kwargs: as the caller gave them.
    """
    config, started = current(), time.perf_counter()
    filename: Any = args[0] if args else kwargs.get("filename", kwargs.get("f"))
    device: Any = None
    try:
        if "backend" in kwargs and not stock.BACKENDS:
            raise Fallback("this safetensors has no backend argument")
        try:
            filename, framework, device, backend = _bind_safe_open(*args, **kwargs)
        except TypeError:
            raise Fallback("the arguments are not safe_open's") from None
        path = find_path(filename)
        target = device_for_call(framework, device, backend)
        check_descriptors()
        return FastHandle(stock_class, open_fast(path, config, target), started)
    except Fallback as error:
        fallback = Fallback.alone(error)
    handle = stock.call(stock_class, args, kwargs)
    fell_back(config, "safe_open", str(filename), fallback)
    report_stock("safe_open", filename, device, fallback, seconds=time.perf_counter() - started)
    return handle


def safe_open(*args: Any, **kwargs: Any) -> Any:
    """``safetensors.safe_open``, faster: same arguments, methods, results and exceptions."""
    return open_handle(stock.safe_open, path_of, args, kwargs)


def path_of_file_object(file: Any) -> str:
    """What ``_safe_open_handle`` opens for a file object: the file at its name."""
    _ = file.fileno
    return path_of(file.name)


@functools.cache
def _closed_stock(stock_class: Any) -> Any:
    """A stock handle that is closed: the words for everything done to a closed handle."""
    with stock.small_file(b"{}      ") as file:
        handle = stock_handle(stock_class, file.name)
    handle.__exit__(None, None, None)
    return handle


class FastHandle:
    """Answers like a stock ``safe_open`` handle; whatever it does not know stock is asked.

    Closing forgets the file; tensors and slices handed out stay valid. Never closed, it goes
    with its last reference. Usable from many threads at once.
    """

    __slots__ = ("_opened", "_stock_class", "_stock_handle")

    def __init__(self, stock_class: Any, opened: OpenedFile, started: float) -> None:
        self._stock_class = stock_class
        self._opened: OpenedFile | None = opened
        self._stock_handle: Any = None
        opened.account.seconds = time.perf_counter() - started

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance(handle, safe_open) holds, as with stock's
        return self._stock_class

    # ---- asking stock ----

    def _stock(self) -> Any:
        opened = self._opened
        if opened is None:
            return _closed_stock(self._stock_class)
        if self._stock_handle is None:
            self._stock_handle = stock_over(opened, self._stock_class)
        return self._stock_handle

    def __getattr__(self, name: str) -> Any:
        # Only reached for what this class lacks: a version's news, or a misspelling. Of our own
        # an instance lacks what whoever made it has not set: an interrupt, or torch.compile.
        if name in FastHandle.__slots__:
            raise AttributeError(name)
        return getattr(self._stock(), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Handles cannot be pickled; stock says so in its own words."""
        return self._stock().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        """As stock's, with our address."""
        return repr_as(self, self._stock_class)

    # ---- the interface ----

    def keys(self, *args: Any, **kwargs: Any) -> Any:
        """Names of the tensors, sorted."""
        if self._opened is None or args or kwargs:
            return self._stock().keys(*args, **kwargs)
        return list(self._opened.layout.sorted_names)

    def metadata(self, *args: Any, **kwargs: Any) -> Any:
        """The header's free-form metadata, or None."""
        if self._opened is None or args or kwargs:
            return self._stock().metadata(*args, **kwargs)
        found = self._opened.layout.metadata
        return None if found is None else dict(found)

    def get_tensor(self, *args: Any, **kwargs: Any) -> Any:
        """The tensor of a name."""
        opened = self._opened
        i = None if opened is None else _number(opened, args, kwargs)
        if opened is None or i is None:
            return self._stock().get_tensor(*args, **kwargs)
        try:
            with opened.account:
                result = opened.tensor(i)
        except (Fallback, MemoryError) as error:
            fallback = Fallback.alone(error)
        else:
            if opened.config.verify:
                return self._verified_tensor(opened, result, args, kwargs)
            return result
        return self._left_to_stock("get_tensor", fallback, args, kwargs)

    def get_slice(self, *args: Any, **kwargs: Any) -> Any:
        """A view that reads when indexed."""
        opened = self._opened
        i = None if opened is None else _number(opened, args, kwargs)
        if opened is None or i is None or opened.layout.dtype(i) in PACKED:
            return self._stock().get_slice(*args, **kwargs)
        return FastSlice(opened, i)

    def __enter__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the handle itself."""
        return self._stock().__enter__(*args, **kwargs) if args or kwargs else self

    def __exit__(self, *args: Any, **kwargs: Any) -> None:
        """Close; may be repeated."""
        if len(args) != 3 or kwargs:
            _closed_stock(self._stock_class).__exit__(*args, **kwargs)
        self._close()

    def __del__(self, _at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        # At exit modules are taken apart, and the report's may be gone already.
        if not _at_exit() and hasattr(self, "_opened"):  # else interrupted as it was made
            self._close()

    # ---- inside ----

    def _close(self) -> None:
        opened, self._opened, self._stock_handle = self._opened, None, None
        if opened is not None:
            opened.account.emit("safe_open", opened.file.path, opened.device)

    def _left_to_stock(self, method: str, fallback: Fallback, args: Any, kwargs: Any) -> Any:
        opened = self._opened
        result = getattr(self._stock(), method)(*args, **kwargs)
        if opened is not None:
            opened.account.note = fallback.reason
            fell_back(opened.config, method, opened.file.path, fallback)
        return result

    def _verified_tensor(self, opened: OpenedFile, ours: Any, args: Any, kwargs: Any) -> Any:
        theirs = self._stock().get_tensor(*args, **kwargs)
        if same(ours, theirs):
            return ours
        complain(opened.config, opened.file.path, f"tensor {args or kwargs}")
        return theirs


def report_open_handles() -> None:
    """Report what handles have handed out that nobody has closed yet.

    For the end of a program or a cell: a handle's own report comes when it is closed, which
    handles in a script's globals never are. They stay open, and report what comes later apart.
    """
    # Handles are found, not kept in a list: opening is worth more than this.
    for found in gc.get_objects():
        if type(found) is FastHandle:
            try:  # not as an attribute: one that another thread is making has none yet
                opened = object.__getattribute__(found, "_opened")
            except AttributeError:
                continue
            if opened is not None:
                opened.account.emit("safe_open", opened.file.path, opened.device, last=False)
    tell_unfinished()


def _offset_keys(self: FastHandle, *args: Any, **kwargs: Any) -> Any:
    """Names of the tensors in file order."""
    opened = self._opened
    if opened is None or args or kwargs:
        return self._stock().offset_keys(*args, **kwargs)
    return list(opened.layout.names)


def _get_tensors(self: FastHandle, *args: Any, **kwargs: Any) -> Any:
    """Every tensor by name, in file order."""
    opened = self._opened
    if opened is None or args or kwargs:
        return self._stock().get_tensors(*args, **kwargs)
    try:
        with opened.account:
            result = opened.all_tensors()
    except (Fallback, MemoryError) as error:
        fallback = Fallback.alone(error)
    else:
        if not opened.config.verify:
            return result
        theirs = self._stock().get_tensors(*args, **kwargs)
        return verified(opened.config, opened.file.path, result, theirs)
    return self._left_to_stock("get_tensors", fallback, args, kwargs)


# Methods that came with later versions exist on our handle when they exist on stock's.
for _name, _method in (("offset_keys", _offset_keys), ("get_tensors", _get_tensors)):
    if _name in stock.HANDLE_METHODS:
        setattr(FastHandle, _name, _method)


def _number(opened: OpenedFile, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The tensor that get_tensor/get_slice arguments name; None when stock must say."""
    if len(args) == 1 and not kwargs:
        name = args[0]
    elif not args and len(kwargs) == 1:
        name = kwargs.get("name")
    else:
        return None
    if type(name) is not str:
        if not isinstance(name, str):
            return None
        name = str.__str__(name)  # a subclass may hash or compare in its own way
    return opened.layout.index.get(name)
