"""The explicit loader: many files, one process or a group of them, fastsafetensors' interface.

    parallel -> files_loader, mapping -> buffer, local_files -> prefetch, headers -> stock_file

`SafeTensorsFileLoader` (`files_loader`) takes names of files and reads their headers (`headers`).
Its ``copy_files_to_device`` returns a `FilesBufferOnDevice` (`buffer`). The buffer hands out
tensors of one process (`local_files`, which reads ahead by `prefetch`) or of a group
(`fastst_patch.sharding`). `arguments` checks what callers pass.
"""

from __future__ import annotations

from .buffer import FilesBufferOnDevice
from .compat_tensor import WrappedTensor
from .files_loader import SafeTensorsFileLoader, fastsafe_open
from .mapping import FastSafetensorsFile, TensorInfo

__all__ = [
    "FastSafetensorsFile",
    "FilesBufferOnDevice",
    "SafeTensorsFileLoader",
    "TensorInfo",
    "WrappedTensor",
    "fastsafe_open",
]
