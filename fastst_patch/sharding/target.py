"""Where the tensors of a sharded load go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import device as devices
from ..errors import Doubt

if TYPE_CHECKING:
    import torch

__all__ = ["named", "target_of"]


def named(device: object) -> torch.device:
    """As torch means it: ``"cuda"`` is the current device, not the first, nor the rank's.

    Raises:
        RuntimeError, TypeError: it is none.
    """
    import torch

    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cuda", device)
    given: Any = "cpu" if device is None else device
    return torch.device(given)


def target_of(device: torch.device) -> devices.Target | None:
    """The device in use; None: the CPU.

    Raises:
        Doubt: it is of a kind that is not accelerated, or cannot be used now.
    """
    if device.type not in ("cpu", "cuda"):
        raise Doubt(f"device {str(device)!r} is not accelerated")
    return devices.torch_target(device)
