"""The framework whose tensors a loader hands out: torch, or paddle by DLPack."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import OptionError

if TYPE_CHECKING:
    import torch

    HandOut = Callable[[torch.Tensor], Any]

__all__ = ["framework_name", "hand_out_of", "paddle_dtype"]

_NAMES = {"pt": "pytorch", "pytorch": "pytorch", "torch": "pytorch", "paddle": "paddle"}


def framework_name(framework: object) -> str:
    """``pytorch`` or ``paddle``, given a name of it, or fastsafetensors' object for it.

    Raises:
        OptionError: it is another framework.
    """
    get_name = getattr(framework, "get_name", None)
    name = get_name() if callable(get_name) else framework
    found = _NAMES.get(name) if isinstance(name, str) else None
    if found is None:
        raise OptionError(f"framework={framework!r}: allowed are {', '.join(_NAMES)}")
    return found


def hand_out_of(framework: str, device: torch.device) -> HandOut:
    """A function that makes a framework's tensor of one of torch's, over the same memory.

    Args:
        framework: as `framework_name` gives it.
        device: where the tensors are.

    Raises:
        ImportError: the framework is not installed.
        OptionError: the installed one cannot use the device.
    """
    return _as_it_is if framework == "pytorch" else _Paddle(device)


def _as_it_is(tensor: torch.Tensor) -> Any:
    return tensor


class _Paddle:
    """Makes paddle's tensors. They own the memory: torch's tensor lives as long as they do.

    PaddlePaddle 3.3 notes by address how to free what it imports. Where it imports an address
    twice, the first import is never freed. So a second request gets a view of the first tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self._paddle = paddle = _installed()
        self._made: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        if device.type != "cpu" and not (device.type == "cuda" and paddle.is_compiled_with_cuda()):
            raise OptionError(f"device={str(device)!r}: this PaddlePaddle is a build without it")

    def __call__(self, tensor: torch.Tensor) -> Any:
        """A paddle tensor over the memory of one of torch's.

        Raises:
            AttributeError, TypeError: paddle has no such dtype.
        """
        import torch

        dtype = paddle_dtype(tensor.dtype)
        if not tensor.numel():
            tensor = torch.empty_like(tensor)  # without a share in the memory of the load
        at = tensor.data_ptr()
        made = self._made.get(at)
        if made is not None and (made.dtype, list(made.shape)) == (dtype, list(tensor.shape)):
            return made.detach()
        if tensor.is_cuda:
            # The allocator, which waits for torch's streams alone, shall wait for paddle's work.
            stream = self._paddle.device.current_stream(f"gpu:{tensor.device.index}").stream_base
            external: Any = torch.cuda.ExternalStream
            tensor.record_stream(external(stream.cuda_stream, tensor.device))
        # Not every version of torch that is supported exports these dtypes.
        as_bytes = tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point
        raw = tensor.view(torch.uint8) if as_bytes else tensor
        result = self._paddle.utils.dlpack.from_dlpack(torch._C._to_dlpack(raw))
        result = result.view(dtype) if as_bytes else result
        if at:
            self._made[at] = result
        return result


def _installed() -> Any:
    try:
        return importlib.import_module("paddle")
    except ImportError as error:
        text = "framework='paddle' needs PaddlePaddle: pip install 'fastst-patch[paddle]'"
        raise ImportError(f"{text} ({error})") from error


def paddle_dtype(dtype: torch.dtype) -> Any:
    """A dtype of torch's in paddle. Raises AttributeError, TypeError: paddle has none."""
    name = str(dtype).removeprefix("torch.")
    found = getattr(_installed(), name)
    if str(found) != f"paddle.{name}":  # paddle.uint16 is bfloat16
        raise TypeError(f"paddle.{name} is {found}: PaddlePaddle has no such dtype")
    return found
