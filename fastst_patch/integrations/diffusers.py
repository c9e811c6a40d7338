"""diffusers with a device_map: a file's tensors go to their devices ahead of the loop over them.

``load_model_dict_into_meta`` walks a state dict that was loaded to the CPU, whatever the
device_map, casts each tensor there, and copies it from pageable memory. Here it walks tensors
that are on their device already: the casts happen there, and there is nothing left to copy.

Left to diffusers: quantized models, offload to disk or to the CPU, loading without a device_map
(``pipe.to("cuda")`` is ``Module.to``), small files.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..config import current
from ..device import Device, device_of, parse_device
from ..dropin.eligibility import check_move, fell_back, report_stock
from ..errors import Fallback, FaststError
from .uploads import Uploads, ordinary, worth_it

if TYPE_CHECKING:
    import torch

__all__ = ["load_into_meta"]

_log = logging.getLogger("fastst_patch")
_MODULE = "diffusers.models.model_loading_utils"


def load_into_meta(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``load_model_dict_into_meta``: put a state dict on the devices of a device_map."""
    try:
        ahead = _ahead(*args, **kwargs) if len(args) >= 2 else None
    except FaststError:  # fallback="error"
        raise
    except Exception as error:  # for an unknown argument the original decides
        _log.warning("diffusers: left to it: %s: %s", type(error).__name__, error)
        ahead = None
    if ahead is None:
        return original(*args, **kwargs)
    model, _, *rest = args
    with contextlib.ExitStack() as stack:
        for uploads in ahead.uploads:
            stack.enter_context(uploads)
        try:
            return original(model, ahead, *rest, **kwargs)
        except Exception as error:
            if not ahead.makes_room(error):
                raise
        # Stock does the rest, from the tensor that did not fit: it casts on the CPU and copies one
        # tensor at a time, and raises its own exceptions.
        return original(model, ahead.left(), *rest, **kwargs)


def _ahead(
    model: Any,
    state_dict: dict[str, torch.Tensor],
    dtype: Any = None,
    *,
    hf_quantizer: Any = None,
    device_map: Any = None,
    **others: Any,
) -> _Ahead | None:
    """The state dict with tensors that are moved ahead; None where diffusers does it all."""
    if not device_map or hf_quantizer is not None or isinstance(dtype, str):
        return None
    config, name = current(), type(model).__name__
    try:
        check_move(config)
        place = sys.modules[_MODULE]._determine_param_device
        expected = model.state_dict()  # what is not in it is skipped
        wanted: dict[str, list[torch.Tensor]] = {}
        devices: dict[str, Device] = {}
        for tensor_name, tensor in state_dict.items():
            named = place(tensor_name, device_map) if tensor_name in expected else "cpu"
            if named in ("disk", "cpu"):
                continue
            device = device_of(parse_device(named))
            if device is not None:
                devices[device.name] = device
                wanted.setdefault(device.name, []).append(tensor)
        wanted = {to: ordinary(found) for to, found in wanted.items()}
        if not worth_it(sum(t.nbytes for found in wanted.values() for t in found)):
            return None
        for device in devices.values():
            device.native()
    except Fallback as fallback:
        report_stock("diffusers", name, "cuda", fallback)
        fell_back(config, "diffusers", name, fallback)
        return None
    ahead = _Ahead(state_dict)
    for to, found in wanted.items():
        ahead.uploads.append(Uploads("diffusers", name, devices[to], config))
        ahead.uploads[-1].expect_all(found, dtype)
    return ahead


class _Ahead(dict[str, "torch.Tensor"]):
    """A state dict whose items are on their devices when they are walked."""

    def __init__(self, state_dict: dict[str, torch.Tensor]) -> None:
        super().__init__(state_dict)
        self.uploads: list[Uploads] = []
        self._done = 0  # tensors that the loop has finished

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:  # type: ignore[override]
        for name, tensor in super().items():
            yield name, self._moved(tensor)  # no variable: it would keep the moved tensor alive
            self._done += 1

    def makes_room(self, error: Exception) -> bool:
        """Whether the loop ran out of device memory; frees the tensors moved ahead then."""
        # On every device: the exception does not say which one is full.
        return bool([uploads for uploads in self.uploads if uploads.makes_room(error)])

    def left(self) -> dict[str, torch.Tensor]:
        """The tensor at which the loop stopped, and all behind it, as they were given."""
        return dict(itertools.islice(super().items(), self._done, None))

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        for uploads in self.uploads:
            moved = uploads.moved(tensor)
            if moved is not None:
                uploads.worked_on()  # casts, which stock does on the CPU
                return moved
        return tensor
