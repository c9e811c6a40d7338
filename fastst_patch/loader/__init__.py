"""The explicit loader: many files, one process or a group of them, fastsafetensors' interface.

    arguments -> files_loader, mapping -> buffer -> local -> walk -> entries, stockfile

`SafeTensorsFileLoader` names files and reads their headers (`entries`). Its
``copy_files_to_device`` gives a `FilesBufferOnDevice` (`buffer`), which hands out tensors of
`local` files or of a group's (`fastst_patch.sharding`). `walk` reads ahead of what is asked for.
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
