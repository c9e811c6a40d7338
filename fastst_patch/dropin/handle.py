"""Stock-compatible handle, ``load_file`` and ``load_model``.

Our code does a call only when the result certainly equals stock's; else stock does it with the
caller's own arguments. A stock handle is opened when it is needed, through our descriptor, so it
reads the file that was opened even when the path leads to another one by now.

Functions that take ``standing`` are told what stood in the place of stock's before ours.
"""

from __future__ import annotations

import contextlib
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
from ..report import SMALL_FILE, LoadReport, count_small, tell, tell_unfinished
from .eligibility import (
    TORCH,
    SmallFile,
    bound_to_load,
    bound_to_open,
    check_descriptors,
    complain,
    destination,
    device_for_call,
    fell_back,
    is_small_for_arrays,
    open_fast,
    path_of,
    report_stock,
    same,
    verified,
)
from .prefetch_loader import UPSTREAM, open_loader
from .remote import by_stock_or_us, is_url, load_url, open_url, theirs_or, with_path
from .slices import FastSlice, TensorMeta, repr_as, stock_handle, stock_over

if TYPE_CHECKING:
    import torch

__all__ = [
    "FastHandle",
    "load_file",
    "load_file_over",
    "load_model",
    "load_model_over",
    "report_open_handles",
    "safe_open",
    "safe_open_handle_over",
    "safe_open_over",
]

# ---- load_file ----


def load_file(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """``safetensors.torch.load_file``, faster: same arguments, results and exceptions."""
    return load_file_over(None, args, kwargs)


def load_file_over(standing: Any, args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
    """`load_file` in the place of what stood there; None: of stock's own."""
    filename = args[0] if args else kwargs.get("filename")
    if type(filename) is str and "://" in filename and is_url(filename):
        local = with_path(load_file_over, standing, args, kwargs)
        return theirs_or(standing, args, kwargs, lambda: load_url(filename, args, kwargs, local))
    config, started = current(), time.perf_counter()
    try:
        path, opened, result = _fast_load_file(config, args, kwargs)
    except (Fallback, MemoryError) as error:
        fallback = Fallback.alone(error)
    else:
        opened.account.seconds = time.perf_counter() - started
        opened.account.emit("load_file", path, opened.device)
        if config.verify:
            return verified(config, path, result, stock.load_file(*args, **kwargs))
        return result
    return by_stock_or_us(
        fallback,
        filename,
        lambda: _stock_load_file(standing, config, fallback, args, kwargs, started=started),
        lambda url: load_url(url, args, kwargs, with_path(load_file_over, standing, args, kwargs)),
    )


def _fast_load_file(
    config: Config, args: Any, kwargs: Any
) -> tuple[str, OpenedFile, dict[str, torch.Tensor]]:
    if "backend" in kwargs and not stock.BACKENDS:
        raise Fallback("this safetensors has no backend argument")
    try:
        filename, device, backend = bound_to_load(*args, **kwargs)
    except TypeError:
        raise Fallback("the arguments are not load_file's") from None
    path = path_of(filename)
    opened = open_fast(path, config, device_for_call("pt", device, backend))
    result = opened.all_tensors()
    if "offset_keys" not in stock.HANDLE_METHODS:  # before 0.6 load_file followed keys()
        result = {name: result[name] for name in opened.layout.sorted_names}
    return path, opened, result


def _left_to(standing: Any, stock_function: Any) -> Any:
    """What does the calls that ours does not: stock.

    Where other code stood in its place, a name that stock finds no file for goes there: it may be
    a URL.
    """
    if standing is None or stock.own(standing):
        return stock_function

    def either(*args: Any, **kwargs: Any) -> Any:
        try:
            return stock.call(stock_function, args, kwargs)
        except FileNotFoundError as error:
            missing = error
        with contextlib.suppress(Exception):
            return stock.call(standing, args, kwargs)
        raise missing

    return either


def _stock_load_file(
    standing: Any, config: Config, fallback: Fallback, args: Any, kwargs: Any, *, started: float
) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = _left_to(standing, stock.load_file)(*args, **kwargs)
    filename = args[0] if args else kwargs.get("filename")
    fell_back(config, "load_file", str(filename), fallback)
    device = args[1] if len(args) > 1 else kwargs.get("device", "cpu")
    tensors = (
        result.values() if isinstance(result, dict) else ()
    )  # of other code it may be anything
    nbytes = 0 if isinstance(fallback, SmallFile) else sum(getattr(t, "nbytes", 0) for t in tensors)
    seconds = time.perf_counter() - started
    report_stock(
        "load_file", filename, device, fallback, nbytes=nbytes, made=len(tensors), seconds=seconds
    )
    return result


def load_model(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
    """``safetensors.torch.load_model``, faster: stock's own code over our ``load_file``."""
    return load_model_over(None, args, kwargs)


def load_model_over(standing: Any, args: Any, kwargs: Any) -> tuple[list[str], list[str]]:
    """`load_model` where `standing` stood in the place of ``load_file``; None: stock's own."""

    def loading(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return load_file_over(standing, args, kwargs)

    result: tuple[list[str], list[str]] = stock.load_model(loading, *args, **kwargs)
    return result


# ---- safe_open ----


def _open_handle(stock_class: Any, find_path: Any, standing: Any, args: Any, kwargs: Any) -> Any:
    """A fast handle where it equals stock's, else stock's own.

    Args:
        stock_class: ``safe_open`` or ``_safe_open_handle``.
        find_path: from their first argument to a path.
        standing: called for a fallback; None: the class itself.
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
            filename, framework, device, backend = bound_to_open(*args, **kwargs)
        except TypeError:
            raise Fallback("the arguments are not safe_open's") from None
        path = find_path(filename)
        target = destination(framework, device, backend)
        check_descriptors()
        return FastHandle(stock_class, open_fast(path, config, target), started)
    except Fallback as error:
        fallback = Fallback.alone(error)

    def by_stock() -> Any:
        handle = stock.call(_left_to(standing, stock_class), args, kwargs)
        fell_back(config, "safe_open", str(filename), fallback)
        report_stock("safe_open", filename, device, fallback, seconds=time.perf_counter() - started)
        return handle

    def by_us(url: str) -> Any:
        local = with_path(safe_open_over, standing, args, kwargs)
        return open_url(url, stock_class, args, kwargs, local=local, made=FastHandle)

    return by_stock_or_us(fallback, filename, by_stock, by_us)


def safe_open(*args: Any, **kwargs: Any) -> Any:
    """``safetensors.safe_open``, faster: same arguments, methods, results and exceptions."""
    return safe_open_over(None, args, kwargs)


def safe_open_over(standing: Any, args: Any, kwargs: Any) -> Any:
    """`safe_open` in the place of what stood there; None: of stock's own."""
    if is_small_for_arrays(args, kwargs):  # before all else: see `count_small`
        try:  # `suppress` takes 0.5 us more, where stock takes 16 us for all
            handle = stock.call(stock.safe_open, args, kwargs)
        except stock.SafetensorError:
            pass  # below: it may be a stand-in
        else:
            if count_small():
                filename = args[0] if args else kwargs["filename"]
                tell(LoadReport("safe_open", filename, "cpu", "stock", 0, 0, 0.0, None, SMALL_FILE))
            return handle
    filename = args[0] if args else kwargs.get("filename")
    if type(filename) is str and "://" in filename and is_url(filename):
        local = with_path(safe_open_over, standing, args, kwargs)

        def ours() -> Any:
            return open_url(filename, stock.safe_open, args, kwargs, local=local, made=FastHandle)

        return theirs_or(standing, args, kwargs, ours)
    return _open_handle(stock.safe_open, path_of, standing, args, kwargs)


# `help` and interactive shells show it.
for _function, _module in (
    (load_file, "safetensors.torch"),
    (load_model, "safetensors.torch"),
    (safe_open, "safetensors"),
):
    vars(_function)["__signature__"] = stock.Signature(_module, _function.__name__)


def safe_open_handle_over(standing: Any, args: Any, kwargs: Any) -> Any:
    """``safetensors._safe_open_handle``: `safe_open` for file objects."""
    return _open_handle(stock.safe_open_handle, _path_of_file_object, standing, args, kwargs)


def _path_of_file_object(file: Any) -> str:
    """What ``_safe_open_handle`` opens for a file object: the file at its name."""
    _ = file.fileno
    return path_of(file.name)


@functools.cache
def _closed_stock(stock_class: Any) -> Any:
    """A closed stock handle, which raises stock's exceptions for uses of a closed handle."""
    with stock.small_file(b"{}      ") as file:
        handle = stock_handle(stock_class, file.name, framework=stock.any_framework())
    handle.__exit__(None, None, None)
    return handle


class FastHandle:
    """Behaves like a stock ``safe_open`` handle; stock does all calls that it does not know.

    Closing it releases the file; tensors and slices handed out stay valid. Without being closed
    it is released with its last reference. Usable from many threads at once.
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

    # ---- calls of stock ----

    def _stock(self) -> Any:
        opened = self._opened
        if opened is None:
            return _closed_stock(self._stock_class)
        if self._stock_handle is None:
            self._stock_handle = stock_over(opened, self._stock_class)
        return self._stock_handle

    def __getattr__(self, name: str) -> Any:
        # Called for names that this class lacks: methods of newer versions, and misspellings. Our
        # own attributes are missing after an interrupt in the constructor, or under torch.compile.
        if name in FastHandle.__slots__:
            raise AttributeError(name)
        return getattr(self._stock(), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise stock's exception: handles cannot be pickled."""
        return self._stock().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        """Stock's text with the address of this object."""
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
        if opened is not None and opened.ready and len(args) == 1 and not kwargs:
            found = opened.ready.pop(args[0], None) if type(args[0]) is str else None
            if found is not None:
                opened.count(1, found.nbytes)
                return found
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
        if opened is not None and i is not None and opened.layout.dtype(i) in PACKED:
            return stock_over(opened, self._stock_class, (i,)).get_slice(*args, **kwargs)
        if opened is None or i is None:
            return self._stock().get_slice(*args, **kwargs)
        return FastSlice(opened, i)

    def get_tensor_meta(self, *args: Any, **kwargs: Any) -> Any:
        """Dtype, shape and place of a tensor as the header has them."""
        opened = self._opened
        i = None if opened is None else _number(opened, args, kwargs)
        if opened is not None and i is not None:
            return TensorMeta(opened.layout, i)
        # Where stock has no such method, another that takes a name raises what it would.
        judge = "get_tensor_meta" if "get_tensor_meta" in stock.HANDLE_METHODS else "get_slice"
        return getattr(self._stock(), judge)(*args, **kwargs)

    def prefetch(self, *args: Any, **kwargs: Any) -> Any:
        """Start reading tensors, to be taken one by one: see `PrefetchLoader`."""
        opened, started = self._opened, time.perf_counter()
        if opened is None:  # without the method, another raises that the file is closed
            return self._stock().prefetch(*args, **kwargs) if UPSTREAM else self._stock().keys()
        if opened.framework not in TORCH:  # raises, or is stock's, as of a handle of stock
            return self._stock().prefetch(*args, **kwargs)
        try:
            return open_loader(opened, args, kwargs)
        except Fallback as error:
            fallback = Fallback.alone(error)
        result = self._left_to_stock("prefetch", fallback, args, kwargs)
        seconds = time.perf_counter() - started
        device = opened.device if kwargs.get("device") is None else kwargs["device"]
        report_stock("prefetch", opened.file.path, device, fallback, seconds=seconds)
        return result

    def __enter__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the handle itself."""
        return self._stock().__enter__(*args, **kwargs) if args or kwargs else self

    def __exit__(self, *args: Any, **kwargs: Any) -> None:
        """Close; may be repeated."""
        if len(args) != 3 or kwargs:
            _closed_stock(self._stock_class).__exit__(*args, **kwargs)
        self._close()

    def __del__(self, _at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        # When Python exits, the report's module may be gone already.
        if not _at_exit() and hasattr(self, "_opened"):  # else the constructor was interrupted
            self._close()

    # ---- inside ----

    def _close(self) -> None:
        opened, self._opened, self._stock_handle = self._opened, None, None
        if opened is not None:
            if opened.file.feed is not None:
                opened.stop()
            opened.account.emit("safe_open", opened.file.path, opened.device)

    def _left_to_stock(self, method: str, fallback: Fallback, args: Any, kwargs: Any) -> Any:
        opened = self._opened
        if opened is not None and opened.file.feed is not None and method != "prefetch":
            i = _number(opened, args, kwargs)  # None: all tensors
            numbers = range(len(opened.layout.names)) if i is None else (i,)
            handle = stock_over(opened, self._stock_class, numbers)
        else:
            handle = self._stock()
        result = getattr(handle, method)(*args, **kwargs)
        if opened is not None:
            opened.account.reason = fallback.reason
            fell_back(opened.config, method, opened.file.path, fallback)
        return result

    def _verified_tensor(self, opened: OpenedFile, ours: Any, args: Any, kwargs: Any) -> Any:
        theirs = self._stock().get_tensor(*args, **kwargs)
        if same(ours, theirs):
            return ours
        complain(opened.config, opened.file.path, f"tensor {args or kwargs}")
        return theirs


def report_open_handles() -> None:
    """Report what handles that are still open have handed out.

    For the end of a program or a cell: a handle reports when it is closed, and handles in a
    script's globals never are. They stay open; tensors handed out later go into another report.
    """
    # Handles are searched for, not kept in a list, which would make opening slower.
    for found in gc.get_objects():
        if type(found) is FastHandle:
            try:  # an unfinished handle of another thread has none, and would call stock
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


# Later versions added these methods: our handle has those that stock's handle has.
for _name, _method in (("offset_keys", _offset_keys), ("get_tensors", _get_tensors)):
    if _name in stock.HANDLE_METHODS:
        setattr(FastHandle, _name, _method)


def _number(opened: OpenedFile, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The number of the tensor that arguments name; None when stock must judge them."""
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
