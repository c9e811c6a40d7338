"""Which calls take the fast path, how the others are reported, and the comparison of ``verify``.

A `Fallback` raised here or below means that stock does the call. The code that catches it calls
stock with the caller's own arguments, then `fell_back` and `report_stock`.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import arrays, engine, tensors
from ..config import Config
from ..device import Device, find_device
from ..errors import Fallback, FallbackWarning, FaststError, warn_caller
from ..files.array_file import ArrayFile
from ..files.base import OpenedFile, open_checked
from ..files.cpu import HostFile
from ..files.cuda import DeviceFile
from ..files.stock_mapped import AsFast, ByStock, StockMappedFile
from ..layout import FileLayout
from ..report import SMALL_FILE, LoadReport, count, tell

if TYPE_CHECKING:
    import torch

__all__ = [
    "TORCH",
    "Destination",
    "SmallFile",
    "bound_to_load",
    "bound_to_open",
    "check_descriptors",
    "check_move",
    "check_size",
    "complain",
    "destination",
    "device_for_call",
    "fell_back",
    "is_small_for_arrays",
    "open_fast",
    "opened_for",
    "path_of",
    "report_stock",
    "same",
    "verified",
]

TORCH = ("pt", "torch", "pytorch")

SMALL_FOR_ARRAYS = 3 << 20
"""Bytes of a file up to which stock, which copies them, is faster than a map. One array of 1 KB
takes stock 28 us and a map 91; of 1 MiB 86 and 100; of 4 MiB 192 and 126. One of eight arrays of a
file of 2 MiB takes twice stock's time by a map, and all of them as long."""

FEW_HANDLES = 8
"""Open handles below which the limit of descriptors is not looked up, which takes 2 us."""

Destination: TypeAlias = "Device | arrays.ArrayMaker | ByStock | None"


def path_of(filename: object) -> str:
    """The path that a caller's file name means. Raises Fallback unless it is a str or a Path."""
    if type(filename) is str:
        return filename
    try:
        path = os.fspath(filename)  # type: ignore[call-overload]
    except TypeError:
        path = None
    if not isinstance(path, str):
        raise Fallback("the file name is no str")
    return path


def bound_to_load(filename: Any, device: Any = "cpu", *, backend: Any = "mmap") -> Any:
    """The arguments of ``load_file`` in their order; TypeError where they are not its own."""
    return filename, device, backend


def bound_to_open(
    filename: Any, framework: Any, device: Any = "cpu", *, backend: Any = "mmap"
) -> Any:
    """The same of ``safe_open``."""
    return filename, framework, device, backend


def device_for_call(framework: object, device: object, backend: object) -> Device | None:
    """The device that a call for torch tensors names, None for the CPU, if the call is eligible.

    Raises:
        Fallback: the call is for another framework or device, or a torch mode is in force.
    """
    error = engine.native_error()
    if error is not None:
        raise Fallback(error)
    if framework not in TORCH:
        raise Fallback(f"framework {framework!r} is not accelerated")
    if backend != "mmap":
        raise Fallback(f"backend {backend!r} is not accelerated")
    found = find_device(device)
    if not tensors.ordinary_mode():
        raise Fallback("a torch mode or default device is in force")
    return found


def destination(framework: object, device: object, backend: object) -> Destination:
    """Where a call's tensors go, and what they are, if the call is eligible. Raises Fallback."""
    if not isinstance(framework, str):
        raise Fallback("the framework is no str")
    if framework in TORCH:
        return device_for_call(framework, device, backend)
    maker = arrays.maker_for(framework)
    error = engine.native_error()
    if error is not None:
        raise Fallback(error)
    if backend != "mmap":
        raise Fallback(f"backend {backend!r} is not accelerated")
    if maker is None:
        if framework == "paddle":
            return ByStock("paddle", device)
        raise Fallback(f"framework {framework!r} is not accelerated")
    if device is not None and not (isinstance(device, str) and device == "cpu"):
        raise Fallback(f"framework {framework!r} has no device {device!r}")
    return maker


def check_descriptors() -> None:
    """Raise Fallback when our handles hold a quarter of the descriptors that the process may have.

    Before 0.9 stock's handles hold none once they are open. Programs rely on that: they open every
    shard of a model and close none.
    """
    held = engine.open_files()
    if held < FEW_HANDLES:
        return
    import resource  # Unix only, like the engine

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and held >= allowed // 4:
        raise Fallback("very many handles are open")


def check_move(config: Config) -> None:
    """Raise Fallback unless an integration may move tensors to a device in its library's place."""
    if config.verify:
        raise Fallback("verify is on, and moves to a device are then stock's")
    if not tensors.ordinary_mode():
        raise Fallback("a torch mode or default device is in force")


class SmallFile(Fallback):
    """The file is so small that stock is faster. This is intended, so nothing warns of it."""


def is_small_for_arrays(args: Any, kwargs: Any) -> bool:
    """Whether ``safe_open`` is called for arrays of a file that is left to stock for its size.

    Stock takes only 29 us for a file of three tensors, so this comes before all other checks.
    """
    framework = args[1] if len(args) > 1 else kwargs.get("framework")
    filename = args[0] if args else kwargs.get("filename")
    if type(framework) is not str or type(filename) is not str:
        return False
    if framework not in arrays.FRAMEWORKS:
        return False
    return 0 <= engine.path_bytes(filename) <= SMALL_FOR_ARRAYS


def open_fast(path: str, config: Config, target: Destination) -> OpenedFile:
    """Open a file with a valid header. Raises Fallback when stock must judge it.

    Args:
        path: of the file.
        config: options for this file, as long as it is open.
        target: the device its tensors go to, the maker of arrays, or whose tensors stock makes;
            None: torch's, on the CPU.
    """
    check_size(path, config, target)
    try:
        file, layout = open_checked(path, config)
    except (OSError, MemoryError) as error:
        raise Fallback(f"opening failed: {error}") from error
    return opened_for(file, layout, config, target)


def check_size(path: str, config: Config, target: Destination = None) -> None:
    """Raise Fallback when a file is so small that it goes to stock."""
    limit = config.small_file_bytes
    if isinstance(target, (arrays.ArrayMaker, ByStock)):
        limit = max(limit, SMALL_FOR_ARRAYS)
    if limit:
        try:
            size = os.stat(path).st_size
        except (OSError, ValueError) as error:
            raise Fallback("the file cannot be looked at") from error
        if size <= limit:
            raise SmallFile(SMALL_FILE)


def opened_for(
    file: engine.File, layout: FileLayout, config: Config, target: Destination
) -> OpenedFile:
    """An open file whose tensors go to a device, or to the CPU; see `open_fast`.

    Raises:
        Fallback: the options leave it to stock.
    """
    if target is None:
        return HostFile(file, layout, config)
    if isinstance(target, arrays.ArrayMaker):
        return ArrayFile(file, layout, config, target)
    if isinstance(target, ByStock):
        return StockMappedFile(file, layout, config, target)
    return DeviceFile(file, layout, config, target)


def fell_back(config: Config, call: str, path: str, fallback: Fallback) -> None:
    """Warn or raise as the option ``fallback`` says. Called after stock has accepted the call."""
    if isinstance(fallback, (AsFast, SmallFile)) or config.fallback == "auto":
        return
    text = f"{call} of {path} was left to stock safetensors: {fallback.reason}"
    if config.fallback == "error":
        raise FaststError(text)
    warn_caller(text, FallbackWarning)


def report_stock(
    call: str,
    file: object,
    device: object,
    fallback: Fallback,
    *,
    nbytes: int = 0,
    made: int = 0,
    seconds: float = 0.0,
) -> None:
    """Report a call that stock did, which handed out ``nbytes`` in ``made`` tensors."""
    reason = fallback.reason
    if count("stock", nbytes, made, seconds, reason):
        where = str("cpu" if device is None else device)
        tell(LoadReport(call, str(file), where, "stock", nbytes, made, seconds, None, reason))


# ---- verify ----


def verified(
    config: Config,
    path: str,
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Our result when it equals stock's in every byte, else stock's."""
    # Empty tensors share an offset, and stock orders equal offsets at random.
    order = [[name for name, t in found.items() if 0 not in t.shape] for found in (ours, theirs)]
    wrong = (
        [] if order[0] == order[1] and len(ours) == len(theirs) else ["the names or their order"]
    )
    wrong += [name for name, tensor in theirs.items() if not same(ours.get(name), tensor)]
    if not wrong:
        return ours
    complain(config, path, wrong[0])
    return theirs


def complain(config: Config, path: str, what: str) -> None:
    """Log that a result differed from stock's, or raise with ``fallback="error"``."""
    text = f"verify: {path}: {what} differs from stock's; stock's is used. Please report this."
    if config.fallback == "error":
        raise FaststError(text)
    logging.getLogger("fastst_patch").error(text)


def same(ours: Any, theirs: Any) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(theirs, torch.Tensor):
        return arrays.same(ours, theirs)
    if ours is None or ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if theirs.numel() == 0:
        return True
    raw = [tensors.raw_bytes(tensor) for tensor in (ours, theirs)]
    equal: bool = torch.equal(raw[0], raw[1])
    return equal
