"""Arguments of fastsafetensors' interface, checked and translated to our options.

An argument at fastsafetensors' default does not change our option: those defaults suit another
engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import KIB, MIB, Config, current, with_options
from ..device import Device, device_of, parse_device
from ..errors import Fallback, OptionError
from ..machine import gds_obstacle
from .frameworks import framework_name, hand_out_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT_BOUNCE_KB",
    "DEFAULT_COPY_BLOCK",
    "DEFAULT_THREADS",
    "Settings",
    "boolean",
    "device_named",
    "filter_or_none",
    "group_size",
    "path_list",
    "rank_files",
    "with_copy_block",
]

_log = logging.getLogger("fastst_patch")

DEFAULT_BOUNCE_KB = 16 * 1024
DEFAULT_THREADS = 16
DEFAULT_COPY_BLOCK = 16 * 1024**3

_PROCESS_OPTIONS = ("fallback", "log_level")  # a loader cannot set these


class Settings:
    """Arguments of a loader, checked.

    Attributes:
        device: where tensors go, as torch names it; a CUDA device with its number.
        target: the same device for the engine; None for the CPU, and where stock must load.
        fallback: why stock must load; None where it need not.
        config: options for the files.
        note: for reports: why a requested feature is not used.
        framework: as `framework_name` gives it.
        hand_out: makes that framework's tensor of one of torch's.
    """

    def __init__(
        self,
        device: object,
        framework: object,
        *,
        bbuf_size_kb: object = DEFAULT_BOUNCE_KB,
        max_threads: object = DEFAULT_THREADS,
        nogds: object = False,
        use_fgds: object = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.framework = framework_name(framework)
        self.fallback: Fallback | None = None
        self.target: Device | None = None
        self.note: str | None = None
        named = device_named(device)
        self.device = str(named)
        if named.type == "cuda":
            self._find_target(named)
        elif named.type != "cpu":
            self.fallback = Fallback(f"device {self.device!r} is not accelerated")
        self.hand_out = hand_out_of(self.framework, named)
        self.config = self._config(bbuf_size_kb, max_threads, nogds, use_fgds, options or {})
        other = self.framework != "pytorch"
        if other and self.target and self.config.tensors == "dlpack":
            # An arena is reused without waiting for another framework's streams.
            raise OptionError(
                f"tensors='dlpack' is for torch: on a device, {self.framework} needs 'owned'"
            )

    def _find_target(self, named: torch.device) -> None:
        try:
            self.target = device_of(named)
        except Fallback as error:
            self.fallback = Fallback.alone(error)
        if self.target is not None:
            self.device = self.target.name
            return
        import torch

        torch.empty(0, device=named)  # raises torch's error where there is no such device

    def _config(
        self,
        bbuf_size_kb: object,
        max_threads: object,
        nogds: object,
        use_fgds: object,
        options: Mapping[str, Any],
    ) -> Config:
        chosen: dict[str, Any] = {}
        bounce = _positive("bbuf_size_kb", bbuf_size_kb)
        if bounce != DEFAULT_BOUNCE_KB:
            chosen["chunk_bytes"] = _chunk(bounce * KIB)
        threads = _positive("max_threads", max_threads)
        if threads != DEFAULT_THREADS:
            chosen["threads"] = min(threads, 64)
        wants_gds = boolean("use_fgds", use_fgds) | (not boolean("nogds", nogds))
        for name in options:
            if name in _PROCESS_OPTIONS or name not in Config.__dataclass_fields__:
                allowed = [k for k in Config.__dataclass_fields__ if k not in _PROCESS_OPTIONS]
                raise TypeError(
                    f"unexpected keyword argument {name!r}: allowed are fastsafetensors' arguments"
                    f" and the options {', '.join(allowed)}"
                )
        base = current()
        if wants_gds and self.target is not None and "io" not in options and base.io == "auto":
            obstacle = gds_obstacle()
            if obstacle is None:
                chosen["io"] = "gds"
            else:
                self.note = f"GDS was requested (nogds=False) and cannot be used: {obstacle}"
                _log.debug("%s", self.note)
        return with_options(base, {**chosen, **options})


def with_copy_block(config: Config, max_copy_block_size: object) -> Config:
    """The options, with ``chunk_bytes`` bounded by ``max_copy_block_size``."""
    block = _positive("max_copy_block_size", max_copy_block_size)
    if block >= config.chunk_bytes:
        return config
    return with_options(config, {"chunk_bytes": _chunk(block)})


def _chunk(nbytes: int) -> int:
    return max(64 * KIB, min(64 * MIB, nbytes))


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise OptionError(f"{name}={value!r}: allowed are whole numbers above 0")
    return value


def boolean(name: str, value: object) -> bool:
    """Check a flag. Raises OptionError unless it is True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r}: allowed are True and False")
    return value


def device_named(device: object) -> torch.device:
    """The torch.device of a text, number, torch.device or fastsafetensors' Device; None: the CPU.

    Raises:
        RuntimeError: torch knows no such device.
        TypeError: the argument is of another type.
    """
    as_str = getattr(device, "as_str", None)
    if callable(as_str):
        device = as_str()
    import torch

    kinds = (str, int, torch.device, type(None))
    if isinstance(device, bool) or not isinstance(device, kinds):
        raise TypeError(f"device={device!r}: allowed are a name such as 'cuda:0' or a torch.device")
    if device == "gpu" or (isinstance(device, str) and device.startswith("gpu:")):
        device = "cuda" + device[3:]  # DeviceType.GPU of fastsafetensors
    return parse_device(device)


def group_size(pg: Any) -> int:
    """Size of a process group; 1 for None.

    Raises:
        TypeError: ``pg`` is no group.
    """
    if pg is None:
        return 1
    size = getattr(pg, "size", None)
    if not callable(getattr(pg, "rank", None)) or not callable(size):
        raise TypeError(
            f"pg={pg!r}: allowed are None, SingleGroup() and a torch.distributed.ProcessGroup"
        )
    return int(size())


def filter_or_none(keep: object, name: str = "tensor_filter") -> Any:
    """Check a function of names. Raises TypeError where it cannot be called."""
    if keep is not None and not callable(keep):
        raise TypeError(f"{name}={keep!r}: give a function of a name, or None")
    return keep


def path_list(paths: object, what: str) -> list[str]:
    """Paths as str. Raises TypeError unless they are a sequence of str and PathLike."""
    if isinstance(paths, (str, bytes, os.PathLike)) or not isinstance(paths, Sequence):
        raise TypeError(f"{what}: expected a list of paths, not {paths!r}")
    return [one_path(path, what) for path in paths]


def one_path(path: object, what: str) -> str:
    """A path as str. Raises TypeError unless it is str or PathLike."""
    found = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(found, str):
        raise TypeError(f"{what}: expected a path, not {path!r}")
    return found


def rank_files(filenames: object, size: int) -> dict[int, list[str]]:
    """Check files by rank, in a group of ``size`` ranks.

    Raises:
        TypeError: they are no mapping of ranks to lists of paths.
        ValueError: a rank is not in the group.
    """
    if not isinstance(filenames, Mapping):
        raise TypeError(
            f"add_filenames: expected a dict of ranks and their files, such as {{0: [path]}},"
            f" not {filenames!r}"
        )
    result: dict[int, list[str]] = {}
    for rank, paths in filenames.items():
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"add_filenames: rank {rank!r} is not an integer")
        if not 0 <= rank < size:
            raise ValueError(
                f"add_filenames: rank {rank} is not in the group, whose size is {size}"
            )
        result[rank] = path_list(paths, f"add_filenames, files of rank {rank}")
    return result
