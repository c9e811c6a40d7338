"""The wrapped tensor that some methods of fastsafetensors return, and moving tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..dtypes import header_shape
from ..errors import OptionError
from ..tensors import dtype_wanted
from .arguments import device_named
from .frameworks import paddle_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["WrappedTensor"]


class WrappedTensor:
    """A tensor in fastsafetensors' wrapper; `get_raw` returns the tensor.

    Other attributes are the tensor's own, and torch's functions accept the wrapper. Methods that
    make another tensor are for torch and paddle; they raise OptionError for other frameworks.

    Attributes:
        real_tensor: the tensor.
    """

    __slots__ = ("real_tensor",)

    def __init__(self, tensor: Any) -> None:
        self.real_tensor = tensor

    def get_raw(self) -> Any:
        """The tensor itself."""
        return self.real_tensor

    def get_shape(self) -> list[int]:
        """Its shape; for packed 4-bit dtypes, of numbers and not of bytes."""
        return header_shape(list(self.real_tensor.shape), self.real_tensor.dtype)

    def get_nbytes(self) -> int:
        """Bytes of its elements."""
        tensor = self.real_tensor
        if hasattr(tensor, "element_size"):  # torch and paddle
            size = tensor.element_size()
        else:
            size = getattr(tensor.dtype, "itemsize", None) or tensor.dtype.size  # TensorFlow
        nbytes: int = math.prod(tensor.shape) * size
        return nbytes

    def _tensor_for(self, method: str) -> Any:
        tensor = self.real_tensor
        package = type(tensor).__module__.partition(".")[0]
        if hasattr(tensor, "element_size"):
            return tensor
        raise OptionError(f"{method}: of torch and paddle, not {package}: use get_raw()")

    def to(self, device: object = None, dtype: object = None) -> WrappedTensor:
        """The tensor on another device or in another dtype; None keeps each."""
        import torch

        tensor = self._tensor_for("to")
        move = moved if isinstance(tensor, torch.Tensor) else moved_in_paddle
        return WrappedTensor(move(tensor, device, dtype_wanted(dtype)))

    def clone(self) -> WrappedTensor:
        """A copy."""
        return WrappedTensor(self._tensor_for("clone").clone())

    def detach(self) -> WrappedTensor:
        """The tensor without its autograd history."""
        return WrappedTensor(self._tensor_for("detach").detach())

    def contiguous(self) -> WrappedTensor:
        """The tensor in contiguous memory."""
        return WrappedTensor(self._tensor_for("contiguous").contiguous())

    def view(self, dtype: object) -> WrappedTensor:
        """Its bytes as another dtype."""
        import torch

        tensor, wanted = self._tensor_for("view"), dtype_wanted(dtype)
        if wanted is None:
            return self
        if not isinstance(tensor, torch.Tensor):
            wanted = paddle_dtype(wanted)
        return WrappedTensor(tensor.view(wanted))

    def reshape(self, shape: list[int]) -> WrappedTensor:
        """The tensor in another shape."""
        return WrappedTensor(self._tensor_for("reshape").reshape(shape))

    def __getitem__(self, index: Any) -> WrappedTensor:
        return WrappedTensor(self.real_tensor[index])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real_tensor, name)

    def __repr__(self) -> str:
        return f"WrappedTensor({self.real_tensor!r})"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call torch's function with the tensors inside."""
        return function(*_unwrapped(args), **_unwrapped(kwargs or {}))


def _unwrapped(found: Any) -> Any:
    if isinstance(found, WrappedTensor):
        return found.real_tensor
    if isinstance(found, (list, tuple)):
        return type(found)(_unwrapped(one) for one in found)
    if isinstance(found, dict):
        return {key: _unwrapped(one) for key, one in found.items()}
    return found


def moved(tensor: torch.Tensor, device: object, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor on another device, or in another dtype; None keeps each."""
    if device is None:
        return tensor if dtype is None else tensor.to(dtype)
    named = device_named(device)
    same_device = named.type == tensor.device.type and (
        named.index is None or named.index == tensor.device.index
    )
    if same_device:
        return tensor if dtype is None else tensor.to(dtype)
    return tensor.to(named) if dtype is None else tensor.to(named, dtype)


def moved_in_paddle(tensor: Any, device: object, dtype: torch.dtype | None) -> Any:
    """The same of paddle's tensors."""
    place = None if device is None else str(device_named(device)).replace("cuda", "gpu")
    return tensor.to(place, None if dtype is None else paddle_dtype(dtype))
