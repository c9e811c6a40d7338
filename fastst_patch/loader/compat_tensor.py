"""The wrapped tensor that some methods of fastsafetensors return, and moving tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..dtypes import header_shape
from ..tensors import dtype_wanted
from .arguments import device_named
from .frameworks import paddle_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["WrappedTensor"]


class WrappedTensor:
    """A tensor in fastsafetensors' wrapper; `get_raw` returns the tensor.

    Other attributes are the tensor's own, and torch's functions accept the wrapper.

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
        nbytes: int = math.prod(self.real_tensor.shape) * self.real_tensor.element_size()
        return nbytes

    def to(self, device: object = None, dtype: object = None) -> WrappedTensor:
        """The tensor on another device or in another dtype; None keeps each."""
        import torch

        move = moved if isinstance(self.real_tensor, torch.Tensor) else moved_in_paddle
        return WrappedTensor(move(self.real_tensor, device, dtype_wanted(dtype)))

    def clone(self) -> WrappedTensor:
        """A copy."""
        return WrappedTensor(self.real_tensor.clone())

    def detach(self) -> WrappedTensor:
        """The tensor without its autograd history."""
        return WrappedTensor(self.real_tensor.detach())

    def contiguous(self) -> WrappedTensor:
        """The tensor in contiguous memory."""
        return WrappedTensor(self.real_tensor.contiguous())

    def view(self, dtype: object) -> WrappedTensor:
        """Its bytes as another dtype."""
        import torch

        wanted = dtype_wanted(dtype)
        if wanted is None:
            return self
        if not isinstance(self.real_tensor, torch.Tensor):
            wanted = paddle_dtype(wanted)
        return WrappedTensor(self.real_tensor.view(wanted))

    def reshape(self, shape: list[int]) -> WrappedTensor:
        """The tensor in another shape."""
        return WrappedTensor(self.real_tensor.reshape(shape))

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
