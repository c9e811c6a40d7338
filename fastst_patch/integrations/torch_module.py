"""``torch.nn.Module.to`` and ``.cuda``: CPU tensors go to CUDA through the pinned ring.

Stock copies tensor by tensor from pageable memory, in one thread, at about a fifth of the bus's
bandwidth. Here the conversion function that ``Module._apply`` gets is wrapped. Ordinary tensors of
the module are uploaded ahead of it, in the order in which ``_apply`` visits them, and stock's
conversion gets the uploaded copy. So stock's own code casts and sets memory formats, on the device,
and ``_apply`` treats identity, ``requires_grad``, gradients, tied weights, hooks and subclasses as
it always does.

Left to stock: tensors that overlap, or are not plain, strided, contiguous and in ordinary CPU
memory; tensors below a module with an ``_apply`` of its own, which may change them first; modules
with few bytes; calls in a torch mode; conversions that do not move to CUDA.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..config import current
from ..device import device_of, parse_device
from ..dropin.eligibility import check_move, fell_back, report_stock
from ..errors import Fallback
from .uploads import Uploads, ordinary, worth_it

if TYPE_CHECKING:
    import torch

__all__ = ["apply", "cuda", "to"]

_log = logging.getLogger("fastst_patch")
_expected = threading.local()  # .move: what the next `_apply` of this thread shall wrap


# ---- the calls ----


def to(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``Module.to``."""
    import torch

    if torch.compiler.is_compiling():
        return original(*args, **kwargs)
    try:
        parsed = _parsed(*args[1:], **kwargs)
    except Exception:  # stock raises it in its own words
        return original(*args, **kwargs)
    return _moving(parsed[0], parsed[1], original, args, kwargs)


def _parsed(*args: Any, **kwargs: Any) -> Any:
    """Device, dtype and so on, as the original reads them from its arguments."""
    import torch

    return torch._C._nn._parse_to(*args, **kwargs)


def cuda(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``Module.cuda``."""
    import torch

    if torch.compiler.is_compiling():
        return original(*args, **kwargs)
    try:
        named = kwargs.get("device", args[1] if len(args) > 1 else None)
        found = parse_device(named if type(named) is int else named or "cuda")
    except Exception:  # stock raises it in its own words
        return original(*args, **kwargs)
    return _moving(found, None, original, args, kwargs)


def _moving(
    named: torch.device | None, dtype: torch.dtype | None, original: Any, args: Any, kwargs: Any
) -> Any:
    """Call the original, so that the `_apply` that it calls wraps its conversion."""
    before = getattr(_expected, "move", None)
    if named is None or named.type != "cuda":
        if before is None:
            return original(*args, **kwargs)
        move = None  # the call is nested in another move, which it is no part of
    else:
        move = (named, dtype)
    try:
        _expected.move = move
        return original(*args, **kwargs)
    finally:
        _expected.move = before


def apply(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``Module._apply``, which both of them call with a conversion."""
    move = getattr(_expected, "move", None)
    if move is None:
        return original(*args, **kwargs)
    try:
        module, fn, recurse = _arguments(*args, **kwargs)
    except TypeError:  # stock raises it in its own words
        return original(*args, **kwargs)
    if not _is_conversion(fn):
        return original(*args, **kwargs)
    _expected.move = None  # `_apply` passes the wrapped conversion on to the modules below
    fallback: Fallback | None = None
    uploads: Uploads | None = None
    try:
        uploads = _uploads(module, recurse, *move)
    except Fallback as found:
        fallback = found
    except Exception as error:  # before anything was handed out: stock does it all
        _log.warning("Module.to: left to torch: %s: %s", type(error).__name__, error)
    if uploads is None:
        result = original(*args, **kwargs)
        if fallback is not None:
            report_stock("Module.to", type(module).__name__, move[0], fallback)
            fell_back(current(), "Module.to", type(module).__name__, fallback)
        return result
    with uploads:
        return original(module, _ahead_of(fn, uploads), recurse)


def _arguments(module: Any, fn: Any, recurse: Any = True) -> tuple[Any, Any, Any]:
    return module, fn, recurse


def _is_conversion(fn: Any) -> bool:
    """Whether a function is the conversion that ``to`` or ``cuda`` gives to ``_apply``.

    An ``_apply`` of a user's module may call others with functions of its own.
    """
    return (getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)) in _CONVERSIONS


# ---- the conversion ----


def _uploads(
    module: torch.nn.Module, recurse: bool, named: torch.device, dtype: torch.dtype | None
) -> Uploads | None:
    """The tensors of a module on their way; None where there is too little to move.

    Raises:
        Fallback: stock does better alone.
    """
    config = current()
    check_move(config)
    found = ordinary(_in_order(module, recurse))
    if not found or not worth_it(sum(tensor.nbytes for tensor in found)):
        return None
    device = device_of(named)
    assert device is not None
    device.native()
    uploads = Uploads("Module.to", type(module).__name__, device, config)
    uploads.expect_all(found, dtype)
    return uploads


def _ahead_of(
    fn: Callable[[torch.Tensor], torch.Tensor], uploads: Uploads
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Stock's conversion over tensors moved ahead of it."""
    import torch

    def conversion(t: torch.Tensor) -> torch.Tensor:
        # Autograd has to record the move of a tensor that needs a gradient, such as a buffer.
        moved = None if t.requires_grad and torch.is_grad_enabled() else uploads.moved(t)
        try:
            result = fn(t if moved is None else moved)
        except Exception as error:
            if not uploads.makes_room(error):
                raise
        else:
            if moved is not None and result is not moved:
                uploads.worked_on()
            return result
        del moved
        return fn(t)  # by stock alone, which raises its own exceptions

    return conversion


def _in_order(module: torch.nn.Module, recurse: bool) -> Iterator[torch.Tensor | None]:
    """Tensors of a module in the order in which ``_apply`` comes to them, maybe repeatedly."""
    if recurse:
        for child in module.children():
            if _applies_as_stock(child):
                yield from _in_order(child, True)
    for parameter in module._parameters.values():
        yield parameter
        if parameter is not None:
            yield parameter.grad
    yield from module._buffers.values()


def _applies_as_stock(module: torch.nn.Module) -> bool:
    """Whether ``_apply`` of a module is torch's own, so that its tensors stay the same until then.

    FSDP, for example, exchanges its parameters there. torch's own layers with an ``_apply`` do not
    change tensors: recurrent ones only rebuild a list of their weights.
    """
    found = getattr(type(module)._apply, "__module__", None) or ""
    return "_apply" not in module.__dict__ and found.startswith("torch.nn.modules.")


_MODULE = "torch.nn.modules.module"
_CONVERSIONS = {(_MODULE, "Module.to.<locals>.convert"), (_MODULE, "Module.cuda.<locals>.<lambda>")}
