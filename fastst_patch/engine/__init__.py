"""Python's side of the native engine: files, arenas, jobs and tensors.

Objects here own native handles and release them when collected. `_lib` turns native errors into
exceptions. What a process needs only once it loads is imported at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._lib import native_error, native_file
from .faults import clear_faults, fault_calls, set_fault
from .system import (
    ask_for_huge_pages,
    counters,
    dicts_holding,
    memory_headroom,
    read_ceiling,
    shutdown,
    touch,
)

if TYPE_CHECKING:
    from .arenas import Arena, adopt_arena, alloc_arena, borrow_arena, map_arena
    from .devices import DeviceHandle, DeviceInfo, compare, device_info, open_device
    from .files import (
        FedFile,
        File,
        Residency,
        feed_file,
        header_of,
        open_file,
        open_files,
        parse_header,
        path_bytes,
        read_layout,
        residency,
    )
    from .importing import (
        DlDtype,
        dl_table,
        dtype_bits,
        dtype_names,
        import_tensors,
        make_arrays,
        np_table,
        set_dl_dtype,
        set_np_dtype,
    )
    from .jobs import Destination, Job, JobStats, prefetch, read, upload

__all__ = [
    "Arena",
    "Destination",
    "DeviceHandle",
    "DeviceInfo",
    "DlDtype",
    "FedFile",
    "File",
    "Job",
    "JobStats",
    "Residency",
    "adopt_arena",
    "alloc_arena",
    "ask_for_huge_pages",
    "borrow_arena",
    "clear_faults",
    "compare",
    "counters",
    "device_info",
    "dicts_holding",
    "dl_table",
    "dtype_bits",
    "dtype_names",
    "fault_calls",
    "feed_file",
    "header_of",
    "import_tensors",
    "make_arrays",
    "map_arena",
    "memory_headroom",
    "native_error",
    "native_file",
    "np_table",
    "open_device",
    "open_file",
    "open_files",
    "parse_header",
    "path_bytes",
    "prefetch",
    "read",
    "read_ceiling",
    "read_layout",
    "residency",
    "set_dl_dtype",
    "set_fault",
    "set_np_dtype",
    "shutdown",
    "touch",
    "upload",
]

_LATE = ("arenas", "devices", "files", "importing", "jobs")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for part in _LATE:
        found = vars(importlib.import_module(f".{part}", __name__))
        globals().update((one, found[one]) for one in __all__ if one in found)
    return globals()[name]
