"""The framework whose tensors a loader hands out, over the memory of torch's where it can be.

==========  ========================================================================================
framework   what is handed out
==========  ========================================================================================
pytorch     the tensor itself
numpy       an array over its memory; on the CPU only
jax         ``jax.device_put`` of that array; from a device, by DLPack
tensorflow  ``tensorflow.convert_to_tensor`` of that array; from a device, a copy by DLPack
paddle      a tensor by DLPack
==========  ========================================================================================
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import OptionError

if TYPE_CHECKING:
    import torch

    HandOut = Callable[[torch.Tensor], Any]

__all__ = ["framework_name", "hand_out_of", "paddle_dtype"]

_NAMES = {
    "pt": "pytorch",
    "pytorch": "pytorch",
    "torch": "pytorch",
    "paddle": "paddle",
    "np": "numpy",
    "numpy": "numpy",
    "jax": "jax",
    "flax": "jax",
    "tf": "tensorflow",
    "tensorflow": "tensorflow",
}


def framework_name(framework: object) -> str:
    """Which row of the table above it is, given a name, or fastsafetensors' object for it.

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
    makers: dict[str, Callable[[torch.device], HandOut]] = {
        "numpy": _NumPy,
        "jax": _Jax,
        "tensorflow": _TensorFlow,
        "paddle": _Paddle,
    }
    return makers[framework](device) if framework in makers else _as_it_is


def _as_it_is(tensor: torch.Tensor) -> Any:
    return tensor


def _array_over(tensor: torch.Tensor) -> Any:
    """An array over the memory of one of torch's tensors on the CPU.

    Raises:
        TypeError: NumPy has no such dtype.
    """
    import numpy as np
    import torch

    with contextlib.suppress(ImportError):
        importlib.import_module("ml_dtypes")  # brings bfloat16 and the float8 dtypes
    dtype, shape = np.dtype(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape)
    if not tensor.numel():
        return np.zeros(shape, dtype)
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().view(dtype).reshape(shape)


class _NumPy:
    """Makes arrays. They are as torch's tensors are: two of one tensor share memory."""

    def __init__(self, device: torch.device) -> None:
        _require("NumPy", device, device.type == "cpu")

    def __call__(self, tensor: torch.Tensor) -> Any:
        """An array over the memory of one of torch's tensors.

        Raises:
            OptionError: the tensor is not on the CPU.
            TypeError: NumPy has no such dtype.
        """
        _require("NumPy", tensor.device, not tensor.is_cuda)
        return _array_over(tensor)


class _Jax:
    """Makes JAX's arrays, which nobody writes to. On the CPU they are over aligned memory."""

    def __init__(self, device: torch.device) -> None:
        self._jax = jax = _installed("jax", "JAX")
        on_gpu = device.type == "cuda"
        _require("JAX", device, device.type == "cpu" or (on_gpu and _has(jax.devices, "gpu")))

    def __call__(self, tensor: torch.Tensor) -> Any:
        """A JAX array of one of torch's tensors.

        Raises:
            TypeError: JAX has no such dtype.
        """
        if not tensor.is_cuda:
            return self._jax.device_put(_array_over(tensor))
        raw, name = _plain(tensor)
        made = self._jax.dlpack.from_dlpack(raw)
        return made if name is None else made.view(name)


class _TensorFlow:
    """Makes TensorFlow's tensors.

    It updates a variable in place if nobody else refers to its tensor. So of memory that was
    handed out before, a copy is handed out.
    """

    def __init__(self, device: torch.device) -> None:
        self._tf = tf = _installed("tensorflow", "TensorFlow")
        on_gpu = device.type == "cuda"
        _require(
            "TensorFlow",
            device,
            device.type == "cpu" or (on_gpu and _has(tf.config.list_physical_devices, "GPU")),
        )
        self._given: set[int] = set()

    def __call__(self, tensor: torch.Tensor) -> Any:
        """A TensorFlow tensor of one of torch's.

        Raises:
            TypeError: TensorFlow has no such dtype.
        """
        tf = self._tf
        if not tensor.is_cuda:
            at = tensor.data_ptr()
            if at in self._given:
                tensor = tensor.clone()
            self._given.add(at)
            return tf.convert_to_tensor(_array_over(tensor))
        import torch

        raw, name = _plain(tensor)
        lent = tf.experimental.dlpack.from_dlpack(torch._C._to_dlpack(raw))
        # TensorFlow drops memory while its kernels still read it, and torch would reuse it.
        made = tf.identity(lent)
        tf.test.experimental.sync_devices()
        return made if name is None else tf.bitcast(made, name)


class _Paddle:
    """Makes paddle's tensors. They own the memory: torch's tensor lives as long as they do.

    PaddlePaddle 3.3 notes by address how to free what it imports. Where it imports an address
    twice, the first import is never freed. So a second request gets a view of the first tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self._paddle = paddle = _installed("paddle", "PaddlePaddle")
        self._made: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        on_gpu = device.type == "cuda"
        able = device.type == "cpu" or (on_gpu and paddle.is_compiled_with_cuda())
        _require("PaddlePaddle", device, able)

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
        raw, name = _plain(tensor)
        result = self._paddle.utils.dlpack.from_dlpack(torch._C._to_dlpack(raw))
        result = result if name is None else result.view(dtype)
        if at:
            self._made[at] = result
        return result


def _plain(tensor: torch.Tensor) -> tuple[torch.Tensor, str | None]:
    """A tensor for DLPack, as bytes where torch may not export its dtype; then the dtype's name."""
    import torch

    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
        return tensor.view(torch.uint8), str(tensor.dtype).removeprefix("torch.")
    return tensor, None


def _require(library: str, device: torch.device, able: bool) -> None:
    if not able:
        raise OptionError(f"device={str(device)!r}: this {library} is a build without it")


def _has(devices: Callable[[str], Any], kind: str) -> bool:
    try:
        return bool(devices(kind))
    except RuntimeError:  # JAX raises it where there are none
        return False


def _installed(module: str, library: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        text = f"framework={module!r} needs {library}: pip install 'fastst-patch[{module}]'"
        raise ImportError(f"{text} ({error})") from error


def paddle_dtype(dtype: torch.dtype) -> Any:
    """A dtype of torch's in paddle. Raises AttributeError, TypeError: paddle has none."""
    name = str(dtype).removeprefix("torch.")
    found = getattr(_installed("paddle", "PaddlePaddle"), name)
    if str(found) != f"paddle.{name}":  # paddle.uint16 is bfloat16
        raise TypeError(f"paddle.{name} is {found}: PaddlePaddle has no such dtype")
    return found
