"""``load_file`` and ``safe_open`` of URLs, which stock does not know.

Nothing of a URL is left to stock: it would say that there is no such file. Arguments that are not
ours to judge are judged by stock over an empty file.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from .. import engine, stock
from ..config import current
from ..device import find_device
from ..errors import Fallback
from ..files.base import OpenedFile
from ..files.remote import (
    StandInFile,
    is_remote,
    local_file,
    naming,
    not_by_stock,
    open_remote,
    refused_url,
    shown,
)
from .eligibility import (
    TORCH,
    Destination,
    bound_to_load,
    bound_to_open,
    destination,
    fell_back,
    opened_for,
)
from .slices import stock_over

if TYPE_CHECKING:
    import torch

__all__ = ["by_stock_or_us", "is_url", "load_url", "open_url", "theirs_or", "with_path"]

_T = TypeVar("_T")


def is_url(filename: object) -> bool:
    """Whether a caller's file name is a URL, and there is no file of that name."""
    return type(filename) is str and is_remote(filename)


def theirs_or(standing: Any, args: Any, kwargs: Any, ours: Callable[[], _T]) -> _T:
    """What is to be had for a URL: of other code that stood in stock's place, as without us."""
    if standing is not None and not stock.own(standing):
        with contextlib.suppress(Exception):
            theirs: _T = stock.call(standing, args, kwargs)
            return theirs
    return ours()


def with_path(function: Any, standing: Any, args: Any, kwargs: Any) -> Callable[[str], Any]:
    """A call for the local file at another path."""

    def call(path: str) -> Any:
        if args:
            return function(standing, (path, *args[1:]), kwargs)
        return function(standing, args, {**kwargs, "filename": path})

    return call


def by_stock_or_us(
    fallback: Fallback, path: object, by_stock: Callable[[], _T], by_us: Callable[[str], _T]
) -> _T:
    """A call that is left to stock; for a stand-in, what we do with the file that it stands for.

    Args:
        fallback: why it is left to stock. It need not have been seen that the file is a stand-in.
        path: of the file.
        by_stock: does the call.
        by_us: does it for a URL.
    """
    url = fallback.url if isinstance(fallback, StandInFile) else None
    if url is None:
        try:
            return by_stock()
        except stock.SafetensorError as error:
            url = refused_url(path, error)
            if url is None:
                raise
    return by_us(url)


def load_url(url: str, args: Any, kwargs: Any, local: Callable[[str], Any]) -> Any:
    """``load_file`` of a URL.

    Args:
        url: its file name.
        args: of the call.
        kwargs: of the call.
        local: does the call for a local file instead.

    Raises as `load_file`, and RemoteError.
    """
    config, started = current(), time.perf_counter()
    path = local_file(url, config)
    if path is not None:
        return local(path)
    try:
        _, device, backend = bound_to_load(*args, **kwargs)
        target = _destination("pt", device)
    except (Fallback, TypeError) as error:
        _ask_stock(stock.load_file, args, kwargs)
        raise not_by_stock(shown(url), Fallback.alone(error)) from None
    if backend != "mmap":  # which is for local files; but stock knows which there are
        _ask_stock(stock.load_file, args, kwargs)
    opened = opened_for(*open_remote(url, config), config, target)
    fallback: Fallback | None = None
    try:
        with naming(opened.file.path):
            result = opened.all_tensors()
    except Fallback as error:  # the device's driver failed
        fallback = Fallback.alone(error)
    if fallback is not None:
        result = _by_stock(opened)
        opened.account.reason = fallback.reason
        fell_back(config, "load_file", opened.file.path, fallback)
    if "offset_keys" not in stock.HANDLE_METHODS:  # before 0.6 load_file followed keys()
        result = {name: result[name] for name in opened.layout.sorted_names}
    opened.account.seconds = time.perf_counter() - started
    opened.account.emit("load_file", opened.file.path, opened.device)
    return result


def _by_stock(opened: OpenedFile) -> dict[str, torch.Tensor]:
    """All tensors, made by stock: one at a time, since each is read into memory before."""
    return {
        name: stock_over(opened, numbers=[i]).get_tensor(name)
        for i, name in enumerate(opened.layout.names)
    }


def open_url(
    url: str,
    stock_class: Any,
    args: Any,
    kwargs: Any,
    *,
    local: Callable[[str], Any],
    made: Callable[[Any, OpenedFile, float], Any],
) -> Any:
    """``safe_open`` of a URL.

    Args:
        url: its file name.
        stock_class: ``safe_open``.
        args: of the call.
        kwargs: of the call.
        local: does the call for a local file instead.
        made: makes a handle of the class, the file, and the time at which opening it began.

    Raises as `safe_open`, and RemoteError.
    """
    config, started = current(), time.perf_counter()
    path = local_file(url, config)
    if path is not None:
        return local(path)
    try:
        _, framework, device, backend = bound_to_open(*args, **kwargs)
        target = _destination(framework, device)
    except (Fallback, TypeError) as error:
        _ask_stock(stock_class, args, kwargs)
        raise not_by_stock(shown(url), Fallback.alone(error)) from None
    if backend != "mmap":
        _ask_stock(stock_class, args, kwargs)
    return made(stock_class, opened_for(*open_remote(url, config), config, target), started)


def _destination(framework: object, device: object) -> Destination:
    """As `destination`. Torch's modes are allowed on the CPU, where we call torch as stock does."""
    try:
        return destination(framework, device, "mmap")
    except Fallback:
        ours = framework in TORCH and engine.native_error() is None
        if not ours or find_device(device) is not None:
            raise
    return None


def _ask_stock(function: Any, args: Any, kwargs: Any) -> None:
    """Raise what stock raises for arguments beside the file's name."""
    with stock.small_file(b"{}      ") as empty:
        if args:
            args = (empty.name, *args[1:])
        else:
            kwargs = {**kwargs, "filename": empty.name}
        stock.call(function, args, kwargs)
